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

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.grouped_mm import expert_rows
from titanmoe.ops.rows import works_in_blocks

BLOCK = 32
"""Values that share a scale in MX."""

_MANTISSA_BITS = 23
_BIASED_LARGEST = 254  # of float32
_EXPONENT_MASK = 0x7F800000

_PIECE_NUMEL = 1 << 18
"""Values that are rounded at a time on the CPU, so that intermediates stay in its caches."""


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
    scale, inverse = scales_for(largest.float(), scaling)
    quotients = values * inverse.to(values.dtype)
    if scaling.rounding == "down":
        limit = torch.finfo(scaling.dtype).max
        quotients = quotients.clamp(-limit, limit)
    return quotients.to(scaling.dtype), scale


def scales_for(largest: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """The scale of values whose largest magnitude is `largest` (float32), and what to multiply them with."""
    exponent = _scale_exponent(largest, scaling)
    scale = (exponent << _MANTISSA_BITS).view(torch.float32)
    inverse = ((_BIASED_LARGEST - exponent) << _MANTISSA_BITS).view(torch.float32)
    return torch.where(largest < math.inf, scale, math.nan), inverse


def _scale_exponent(largest: Tensor, scaling: Scaling) -> Tensor:
    """The biased exponent of the scale, int32. By integers: a division that a compiler makes faster may round up."""
    mantissa, exponent = math.frexp(torch.finfo(scaling.dtype).max)
    bits = largest.view(torch.int32)
    if scaling.rounding == "up":
        # Adds one to the exponent where the mantissa is larger than that of the largest code.
        bits = bits + int((2 - 2 * mantissa) * (1 << _MANTISSA_BITS)) - 1
    return ((bits >> _MANTISSA_BITS) - (exponent - 1)).clamp(1, _BIASED_LARGEST)


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
    groups = [rows for _, rows in expert_rows(offsets_E)]
    if scaling.shared_by == "block" and all(rows.stop % BLOCK == 0 for rows in groups):
        groups = [slice(0, groups[-1].stop)]  # no block is of two experts
    rounded_RC = torch.zeros_like(x_RC)
    for rows in groups:
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
    missing = -values.shape[dim] % BLOCK if scaling.shared_by == "block" else 0
    if missing:
        padded = F.pad(values, (0, missing) if dim == -1 else (0, 0, 0, missing))
        return _rounded(padded, dim, scaling).narrow(dim, 0, values.shape[dim]).contiguous()
    rounded_ = torch.empty_like(values)
    if values.numel() == 0:
        return rounded_
    num_sharing = {"tensor": values.numel(), "row": values.shape[dim], "block": BLOCK}[scaling.shared_by]
    num_columns = values.shape[-1] if dim == -2 and scaling.shared_by != "tensor" else 1
    values_ABC = values.view(-1, num_sharing, num_columns)
    step_A = step_B = values.numel()
    if works_in_blocks(values):
        step_B = min(num_sharing, max(1, _PIECE_NUMEL // num_columns))
        step_A = max(1, _PIECE_NUMEL // (num_columns * step_B))
    for some_ABC, out_ABC in zip(values_ABC.split(step_A), rounded_.view_as(values_ABC).split(step_A), strict=True):
        pieces_ABC = some_ABC.split(step_B, dim=1)
        largest_A1C = functools.reduce(
            torch.maximum, (piece_ABC.float().abs().amax(1, keepdim=True) for piece_ABC in pieces_ABC)
        )
        scale_A1C, inverse_A1C = scales_for(largest_A1C, scaling)
        for piece_ABC, piece_out_ABC in zip(pieces_ABC, out_ABC.split(step_B, dim=1), strict=True):
            quotients_ABC = piece_ABC * inverse_A1C
            piece_out_ABC.copy_(_round_codes_(quotients_ABC, scaling).mul_(scale_A1C))
    return rounded_


def _round_codes_(quotients: Tensor, scaling: Scaling) -> Tensor:
    """Cast to codes and back, in place: by hand, as torch 2.11 to 2.13 casts codes one at a time on the CPU.

    Adding and subtracting a number whose last place is the distance between codes rounds as a cast does.
    """
    code = torch.finfo(scaling.dtype)
    if scaling.rounding == "down":
        quotients.clamp_(-code.max, code.max)
    powers = quotients.abs().clamp_(min=code.smallest_normal)
    powers.view(torch.int32).bitwise_and_(_EXPONENT_MASK)
    powers.mul_(1.5 * code.eps * (1 << _MANTISSA_BITS))
    return quotients.add_(powers).sub_(powers)
