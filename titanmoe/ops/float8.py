"""Values in 8 bits: e4m3 codes, and scales that are powers of two.

A scale is shared by a whole tensor, by a row, or by a block of 32 neighbours (MX; OCP Microscaling Formats v1.0) along
the dim over which a product sums. A value is `code * scale`.

All scales are powers of two, as MX demands and torchao's rowwise recipe has it. Multiplying with one is exact, so that
an error is that of the cast alone; and since codes are floating-point numbers, it does not matter to a value whose
neighbours share its scale, unless one of them is 2 ** 14 times larger. A row that is cut over ranks is therefore
quantised as a whole one is.

Shape suffixes: R rows (sorted by expert), C columns, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from titanmoe.ops.grouped_mm import expert_rows

BLOCK = 32
"""Values that share a scale in MX."""

_MANTISSA_BITS = 23
_BIASED_LARGEST = 254  # of float32


@dataclass(frozen=True)
class Scaling:
    """How scales are chosen.

    Attributes:
        shared_by: what shares a scale: a tensor, a row (of values that are summed over), or a block of 32 of a row.
        rounding: of the scale. "up": the smallest power of two at which no code is beyond the largest ("RCEIL", of
            NVIDIA's cuBLAS). "down": that of the largest value's own exponent ("FLOOR", of the OCP specification);
            values within an eighth of the next power of two are cut to the largest code.
        dtype: of the codes; e4m3fn, or e4m3fnuz where hardware has that one.
    """

    shared_by: Literal["tensor", "row", "block"]
    rounding: Literal["up", "down"] = "up"
    dtype: torch.dtype = torch.float8_e4m3fn


def quantize(values: Tensor, dim: int, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Codes, and float32 scales.

    Args:
        values: of at least two dims, float32 or bfloat16; those of a block are consecutive along `dim`, whose size is
            then a multiple of 32.
        dim: -1 or -2, the dim that is summed over.

    Returns:
        Codes of the shape of `values`; scales with `dim` divided by 32, with size 1 there, or with no dims. What
        shares a scale with a value that is not finite has a scale that is not a number.
    """
    if scaling.shared_by == "block":
        codes, scales = _quantize(values.unflatten(dim, (-1, BLOCK)), dim, scaling)
        return codes.flatten(dim - 1, dim), scales.squeeze(dim)
    return _quantize(values, dim if scaling.shared_by == "row" else None, scaling)


def _quantize(values: Tensor, dim: int | None, scaling: Scaling) -> tuple[Tensor, Tensor]:
    magnitudes = values.abs()
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)
    exponent = _scale_exponent(largest.float(), scaling)
    scale = (exponent << _MANTISSA_BITS).view(torch.float32)
    inverse = ((_BIASED_LARGEST - exponent) << _MANTISSA_BITS).view(torch.float32)
    quotients = values * inverse.to(values.dtype)
    if scaling.rounding == "down":
        limit = torch.finfo(scaling.dtype).max
        quotients = quotients.clamp(-limit, limit)
    return quotients.to(scaling.dtype), torch.where(largest.isfinite(), scale, torch.nan)


def _scale_exponent(largest: Tensor, scaling: Scaling) -> Tensor:
    """The biased exponent of the scale, int32."""
    largest_code = torch.finfo(scaling.dtype).max
    if scaling.rounding == "up":
        bits = (largest / largest_code).view(torch.int32) + ((1 << _MANTISSA_BITS) - 1)
        exponent = bits >> _MANTISSA_BITS
    else:
        exponent = (largest.view(torch.int32) >> _MANTISSA_BITS) - (int(largest_code).bit_length() - 1)
    return exponent.clamp(1, _BIASED_LARGEST)


def dequantize(codes: Tensor, scales: Tensor, dim: int, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """The values. Exact in bfloat16 and in float32, but for those near the ends of their range."""
    values = codes.to(dtype)
    if scaling.shared_by != "block":
        return values.mul_(scales.to(dtype))
    blocked = values.unflatten(dim, (-1, BLOCK))
    blocked.mul_(scales.to(dtype).unsqueeze(dim))
    return values


# What a product sees of its operands, in their own dtype: as custom operators, which torch.compile does not look into.


@torch.library.custom_op("titanmoe::round_to_float8", mutates_args=())
def _round(values: Tensor, dim: int, shared_by: str, rounding: str) -> Tensor:
    return _rounded(values, dim, Scaling(shared_by, rounding))  # type: ignore[arg-type]


@_round.register_fake
def _(values: Tensor, dim: int, shared_by: str, rounding: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.custom_op("titanmoe::round_groups_to_float8", mutates_args=())
def _round_groups(x_RC: Tensor, offsets_E: Tensor, shared_by: str, rounding: str) -> Tensor:
    scaling = Scaling(shared_by, rounding)  # type: ignore[arg-type]
    rounded_RC = torch.zeros_like(x_RC)
    for _, rows in expert_rows(offsets_E):
        rounded_RC[rows] = _rounded(x_RC[rows], -2, scaling)
    return rounded_RC


@_round_groups.register_fake
def _(x_RC: Tensor, offsets_E: Tensor, shared_by: str, rounding: str) -> Tensor:
    return torch.empty_like(x_RC, memory_format=torch.contiguous_format)


def rounded(values: Tensor, dim: int, scaling: Scaling) -> Tensor:
    """The values as they come back from e4m3fn codes. See `quantize`; a last block may be partial."""
    return _round(values.contiguous(), dim, scaling.shared_by, scaling.rounding)


def rounded_groups(x_RC: Tensor, offsets_E: Tensor, scaling: Scaling) -> Tensor:
    """`rounded` along the rows of each expert by itself; zero beyond the last offset."""
    return _round_groups(x_RC.contiguous(), offsets_E, scaling.shared_by, scaling.rounding)


def _rounded(values: Tensor, dim: int, scaling: Scaling) -> Tensor:
    size = values.shape[dim]
    if values.numel() == 0:
        return torch.empty_like(values)
    if scaling.shared_by == "block" and size % BLOCK:
        whole = size - size % BLOCK
        pieces = (values.narrow(dim, 0, whole), values.narrow(dim, whole, size - whole))
        by_row = Scaling("row", scaling.rounding, scaling.dtype)
        return torch.cat([_rounded(pieces[0], dim, scaling), _rounded(pieces[1], dim, by_row)], dim)
    codes, scales = quantize(values, dim, scaling)
    return dequantize(codes, scales, dim, scaling, values.dtype)
