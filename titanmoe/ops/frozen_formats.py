"""Number formats of frozen weights: 8 or 4 bits a value, and the scales that multiply them.

A weight is a matrix (R, C) of outputs and inputs, or a stack of them. It is stored as a few tensors of bytes, its
parts: the payload, and scales. Bytes, because what casts parameters to a dtype to compute in, as FSDP2 does before it
gathers them, leaves integers alone, and because gloo sends no 8-bit floats. Every part is a matrix, too, of bytes that
belong to rows and columns of the weight, so a weight is cut by cutting its parts.

    float8-channel  e4m3 codes; a float32 scale per output
    float8-block    e4m3 codes; a float32 scale per 128 x 128 values (as in DeepSeek-V3's checkpoints), the last partial
    mx              e4m3 codes; per 32 inputs a scale that is a power of two (OCP Microscaling Formats v1.0)
    nf4             two 4-bit codes a byte, the first in the high half; per 64 inputs a scale (QLoRA, arXiv 2305.14314)

What is all zeros comes back as zeros. Values that are not finite are refused by `quantize`.

Shape suffixes: R rows (outputs), C columns (inputs), B values of a block, b blocks in a row, g groups of rows;
`...` any leading dims.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.float8 import BLOCK, Scaling
from titanmoe.ops.float8 import quantize as quantize_powers_of_two
from titanmoe.ops.scaled_casts import BLOCK_SIZE, FP8

_LARGEST_CODE = torch.finfo(FP8).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_FLOAT_BYTES = 4
_SCALES_PER_GROUP = 256
_LARGEST_SCALE_CODE = 127

# The means of 16 equally likely slices of a normal distribution (8 and 8, sharing the zero), scaled to [-1, 1].
# Appendix E of the paper has these numbers.
_NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Part:
    """A tensor of bytes.

    Attributes:
        suffix: of its parameter's name.
        rows: of the weight, that one row of bytes is for.
        columns: of the weight, that one entry is for; None if it is for all of them.
        bytes: of an entry.
    """

    suffix: str
    rows: int
    columns: int | None
    bytes: int

    def shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """For a weight of these sizes."""
        num_entries = 1 if self.columns is None else -(-num_columns // self.columns)
        return -(-num_rows // self.rows), num_entries * self.bytes

    def row_slice(self, rows: slice) -> slice:
        """For these rows of the weight, which begin with a row of bytes."""
        return slice(rows.start // self.rows, -(-rows.stop // self.rows))

    def column_slice(self, columns: slice) -> slice:
        if self.columns is None:
            return slice(None)
        return slice(columns.start // self.columns * self.bytes, -(-columns.stop // self.columns) * self.bytes)


class Format(Protocol):
    """How a weight is stored.

    Attributes:
        name: see `format_named`.
        parts: the payload first.
    """

    @property
    def name(self) -> str: ...

    @property
    def parts(self) -> tuple[Part, ...]: ...

    def quantize(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        """The parts of a float32 matrix, uint8. Rows that share scales are to be all there."""

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The values (..., R, C), computed in float32."""


def row_multiple(format: Format) -> int:
    """Where rows may be cut without cutting what shares a scale."""
    return max(part.rows for part in format.parts)


def column_multiple(format: Format) -> int:
    """Where columns may be cut."""
    return max(part.columns or 1 for part in format.parts)


def matrix_shape(format: Format, payload_shape: Sequence[int]) -> tuple[int, ...]:
    """(..., R, C) of the weight."""
    return (*payload_shape[:-1], payload_shape[-1] * (format.parts[0].columns or 1))


def check_finite(scales: Tensor) -> None:
    """
    Raises:
        ValueError: values that are not finite went into a scale.
    """
    if not scales.isfinite().all():
        raise ValueError("values that are not finite cannot be quantised")


@dataclass(frozen=True)
class Float8Channel:
    name: str = "float8-channel"
    parts: tuple[Part, ...] = (Part("payload", 1, 1, 1), Part("scale", 1, None, _FLOAT_BYTES))

    def quantize(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        scale_R1 = _scales(values_RC.abs().amax(-1, keepdim=True))
        return _codes(values_RC / scale_R1), _bytes(scale_R1)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        payload, scale = parts
        return _scaled(payload, _floats(scale), dtype)


@dataclass(frozen=True)
class Float8Block:
    name: str = "float8-block"
    parts: tuple[Part, ...] = (
        Part("payload", 1, 1, 1),
        Part("scale", BLOCK_SIZE, BLOCK_SIZE, _FLOAT_BYTES),
    )

    def quantize(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        num_rows, num_columns = values_RC.shape
        padded_RC = F.pad(values_RC, (0, -num_columns % BLOCK_SIZE, 0, -num_rows % BLOCK_SIZE))
        blocks_gRbB = padded_RC.view(-1, BLOCK_SIZE, padded_RC.shape[1] // BLOCK_SIZE, BLOCK_SIZE)
        scale_gb = _scales(blocks_gRbB.abs().amax((1, 3)))
        return _codes(values_RC / _expand_blocks(scale_gb, num_rows, num_columns)), _bytes(scale_gb)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        payload, (num_rows, num_columns) = parts[0], parts[0].shape[-2:]
        scale_gC = _floats(parts[1]).repeat_interleave(BLOCK_SIZE, -1)[..., :num_columns]
        num_whole = num_rows // BLOCK_SIZE
        whole, rest = payload.split([num_whole * BLOCK_SIZE, num_rows % BLOCK_SIZE], -2)
        whole = whole.unflatten(-2, (num_whole, BLOCK_SIZE))
        values = _scaled(whole, scale_gC[..., :num_whole, None, :], dtype).flatten(-3, -2)
        return torch.cat([values, _scaled(rest, scale_gC[..., -1:, :], dtype)], -2) if rest.numel() else values


@dataclass(frozen=True)
class MX:
    """Scales are rounded up to the next power of two (see `float8.Scaling`); the number of columns is a multiple
    of 32. A byte is the exponent, biased by 127 (e8m0)."""

    name: str = "mx"
    parts: tuple[Part, ...] = (Part("payload", 1, 1, 1), Part("scale", 1, BLOCK, 1))

    def quantize(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        codes_RC, scale_Rb = quantize_powers_of_two(values_RC, -1, Scaling("block"))
        check_finite(scale_Rb)
        return codes_RC.view(torch.uint8), (scale_Rb.view(torch.int32) >> 23).to(torch.uint8)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        payload, scale = parts
        blocks = payload.unflatten(-1, (-1, BLOCK))
        return _scaled(blocks, scale.view(torch.float8_e8m0fnu).float()[..., None], dtype).flatten(-2)


@dataclass(frozen=True)
class NF4:
    """The number of columns is a multiple of the block.

    Scales are float32; or, quantised again ("double quantisation"), signed bytes of steps from a mean, both float32
    and of a group: all scales of so many rows. QLoRA's groups are of 256 scales in a row, wherever rows end, about one
    mean of the whole weight; groups of whole rows with a mean each are as good, and can be cut between ranks.

    Attributes:
        block: values that share a scale, even.
        group_rows: rows whose scales are a group; 0 if scales are not quantised.
    """

    block: int = 64
    group_rows: int = 0

    @classmethod
    def for_columns(cls, num_columns: int, block: int = 64, double_quant: bool = True) -> NF4:
        """With groups of at most 256 scales, or of one row: a power of two of rows, so that many cuts are possible."""
        if not double_quant:
            return cls(block)
        return cls(block, 1 << (max(1, _SCALES_PER_GROUP * block // num_columns).bit_length() - 1))

    @property
    def name(self) -> str:
        return f"nf4-{self.block}-{self.group_rows}"

    @property
    def parts(self) -> tuple[Part, ...]:
        payload = Part("payload", 1, 2, 1)
        if not self.group_rows:
            return payload, Part("scale", 1, self.block, _FLOAT_BYTES)
        return payload, Part("scale", 1, self.block, 1), Part("scale_group", self.group_rows, None, 2 * _FLOAT_BYTES)

    def quantize(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        blocks_RbB = values_RC.unflatten(-1, (-1, self.block))
        scale_Rb = blocks_RbB.abs().amax(-1)
        check_finite(scale_Rb)
        quotients_RC = (blocks_RbB / torch.where(scale_Rb == 0, 1.0, scale_Rb)[..., None]).flatten(1)
        codes_RC = torch.zeros_like(quotients_RC, dtype=torch.uint8)
        for lower, upper in itertools.pairwise(_NF4_LEVELS):  # three times as fast as torch.bucketize on the CPU
            codes_RC += quotients_RC > (lower + upper) / 2
        payload = codes_RC[:, ::2] << 4 | codes_RC[:, 1::2]
        if not self.group_rows:
            return payload, _bytes(scale_Rb)
        return payload, *self._quantize_scales(scale_Rb)

    def _quantize_scales(self, scale_Rb: Tensor) -> tuple[Tensor, Tensor]:
        """Signed bytes (R, b); mean and step of each group (g, 2)."""
        groups = scale_Rb.split(self.group_rows)
        mean_g = torch.stack([group.mean() for group in groups])
        largest_g = torch.stack([(group - mean).abs().amax() for group, mean in zip(groups, mean_g, strict=True)])
        step_g = largest_g / _LARGEST_SCALE_CODE
        mean_R1, step_R1 = (self._of_rows(of_g[:, None], scale_Rb.shape[0]) for of_g in (mean_g, step_g))
        steps_Rb = (scale_Rb - mean_R1) / torch.where(step_R1 == 0, 1.0, step_R1)
        return steps_Rb.round().to(torch.int8).view(torch.uint8), _bytes(torch.stack([mean_g, step_g], dim=1))

    def _of_rows(self, of_groups: Tensor, num_rows: int) -> Tensor:
        return of_groups.repeat_interleave(self.group_rows, -2)[..., :num_rows, :]

    def scales(self, parts: Sequence[Tensor]) -> Tensor:
        """Of the blocks, float32 (..., R, b)."""
        if not self.group_rows:
            return _floats(parts[1])
        mean, step = self._of_rows(_floats(parts[2]), parts[1].shape[-2]).split(1, -1)
        return torch.addcmul(mean, parts[1].view(torch.int8).float(), step).clamp_(min=0)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        payload = parts[0]
        values = _nf4_pairs(payload.device).index_select(0, payload.reshape(-1).int()).view(torch.float32)
        blocks = values.view(*payload.shape[:-1], -1, self.block)
        return blocks.mul_(self.scales(parts)[..., None]).to(dtype).flatten(-2)


@functools.lru_cache
def format_named(name: str) -> Format:
    """The format of a name: "float8-channel", "float8-block", "mx", or "nf4" with two numbers, as its own name has."""
    if name.startswith("nf4-"):
        block, group_rows = map(int, name.split("-")[1:])
        return NF4(block, group_rows)
    formats: dict[str, Format] = {"float8-channel": Float8Channel(), "float8-block": Float8Block(), "mx": MX()}
    return formats[name]


@functools.lru_cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """For each byte the two values that it stands for: 8 bytes, as one int64, which is looked up faster than two."""
    levels = torch.tensor(_NF4_LEVELS)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def _scales(largest: Tensor) -> Tensor:
    """1 where all values are zero. Below the smallest normal number, a scale would lack bits."""
    check_finite(largest)
    return torch.where(largest == 0, 1.0, (largest.float() / _LARGEST_CODE).clamp_min(_SMALLEST_SCALE))


def _codes(quotients: Tensor) -> Tensor:
    # Rounding may push the largest quotient above the largest code, which the cast would turn into NaN.
    return quotients.clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(FP8).view(torch.uint8)


def _bytes(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.uint8)


def _floats(part: Tensor) -> Tensor:
    return part.view(torch.float32)


def _expand_blocks(scale: Tensor, num_rows: int, num_columns: int) -> Tensor:
    scale = scale.repeat_interleave(BLOCK_SIZE, -1)[..., :num_columns]
    return scale.repeat_interleave(BLOCK_SIZE, -2)[..., :num_rows, :]


def _scaled(payload: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`code * scale`, computed in float32 and rounded once; codes themselves are exact in bfloat16.

    On the CPU torch 2.11 to 2.13 converts codes one at a time. Shifted, the bits of an e4m3 code are a float16 that is
    smaller by the difference of biases: four times as fast. (But not of the code for NaN, which no weight has.)
    """
    if payload.device.type != "cpu":
        return payload.view(FP8).to(dtype).mul_(scale)
    bits = payload.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float().mul_(scale * 2.0**8).to(dtype)
