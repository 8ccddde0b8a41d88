"""FP8 products by the kernels of torch: `_scaled_grouped_mm` for experts, `_scaled_mm` for linear layers.

Checked against torch 2.11 and 2.13. Both want the right operand column-major, so every operand is cast into the layout
in which values that are summed are neighbours, and the right one is passed as a transposed view.

Shape suffixes: R rows (sorted by expert), B groups of 16 rows, C columns, E experts, N output features, K input
features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.float8 import Scaling, quantize, scales_for
from titanmoe.ops.grouped_mm import zero_tail_
from titanmoe.ops.scaled_product import Along, Operand

MULTIPLE = 16
"""Of features, and of what a gradient of weights sums over: kernels read 16 codes at a time."""


class _Float8Kernels:
    feature_multiple = MULTIPLE

    def __init__(self, scaling: Scaling) -> None:
        assert scaling.shared_by != "block" and scaling.rounding == "up", scaling
        self.scaling = scaling

    def quantize_rows(self, x_RC: Tensor, offsets_E: Tensor | None) -> Operand:
        return fused(cast, x_RC, self.scaling)

    def quantize_weights(self, w_ENK: Tensor, along: Along) -> Operand:
        return fused(cast if along == "in" else cast_transposed, w_ENK, self.scaling)


class Float8LinearKernels(_Float8Kernels):
    """`torch._scaled_mm`, one scale per tensor or per row.

    As in torchao's recipes (`Float8LinearConfig` of 0.18), only the product itself sums in the precision of the tensor
    core, which is less than float32; gradients do not.
    """

    name = "scaled_mm"

    def row_multiple(self, trains: bool) -> int:
        return 1  # what the gradient of the weight lacks is added there

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        return _scaled_mm(rows, weights, fast=along == "in")

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        missing = -dy_RN.shape[0] % MULTIPLE
        operands = (F.pad(operand, (0, 0, 0, missing)) if missing else operand for operand in (dy_RN, x_RK))
        dy_NR, x_KR = (fused(cast_transposed, operand, self.scaling) for operand in operands)
        return _scaled_mm(dy_NR, x_KR, fast=False)


def _scaled_mm(left: Operand, right: Operand, fast: bool) -> Tensor:
    (a, a_scales), (b, b_scales) = left, right
    has_rows = a_scales.dim() == 2
    if fast or not has_rows:
        b_scales = b_scales.t() if has_rows else b_scales
        return torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
    # The kernel for rows is slow if it sums well (pytorch#147971). With powers of two, scaling later is as exact.
    one = a_scales.new_ones(())
    y = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=False)
    return fused(_scaled, y, a_scales, b_scales)


def _scaled(y: Tensor, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    return (y.float() * row_scales * column_scales.t()).to(y.dtype)


class Float8GroupedKernels(_Float8Kernels):
    """`torch._scaled_grouped_mm`, one scale per row.

    All three products sum in the precision of the tensor core, as in torchao 0.18 (`fp8_grouped_mm`).
    """

    name = "scaled_grouped_mm"

    def row_multiple(self, trains: bool) -> int:
        return MULTIPLE if trains else 1

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        assert offsets_E is not None
        (x_RC, x_scales_R1), (w_EDC, w_scales_ED1) = rows, weights
        if not x_RC.shape[0]:
            return x_RC.new_empty(0, w_EDC.shape[1], dtype=torch.bfloat16)
        w_ECD, x_scales_R, w_scales_ED = w_EDC.transpose(-2, -1), x_scales_R1.squeeze(-1), w_scales_ED1.squeeze(-1)
        return scaled_rows_times_weights(x_RC, w_ECD, x_scales_R, w_scales_ED, offsets_E, num_rows, fast=True)

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        assert offsets_E is not None
        if not x_RK.shape[0]:
            return x_RK.new_zeros(offsets_E.shape[0], dy_RN.shape[1], x_RK.shape[1], dtype=torch.bfloat16)
        check_groups(offsets_E, MULTIPLE)
        groups = fused(with_empty_groups, offsets_E, x_RK.shape[0] // MULTIPLE)
        dy_NR, dy_scales_EN = fused(cast_groups, dy_RN, *groups, self.scaling)
        x_KR, x_scales_EK = fused(cast_groups, x_RK, *groups, self.scaling)
        return torch._scaled_grouped_mm(
            dy_NR,
            x_KR.t(),
            dy_scales_EN.flatten(),
            x_scales_EK.flatten(),
            offs=groups[-1],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


# An operator, so that what recomputation by op keeps is the result with its zeros, and not what they are written over.
@torch.library.custom_op("titanmoe::scaled_rows_times_weights", mutates_args=())
def scaled_rows_times_weights(
    x_RC: Tensor, w_ECD: Tensor, x_scales: Tensor, w_scales: Tensor, offsets_E: Tensor, num_rows: int, *, fast: bool
) -> Tensor:
    """`torch._scaled_grouped_mm` of rows and weights, with zeros in the rows beyond the last offset."""
    y_RD = torch._scaled_grouped_mm(
        x_RC, w_ECD, x_scales, w_scales, offs=offsets_E, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return zero_tail_(y_RD, offsets_E, num_rows)


@scaled_rows_times_weights.register_fake
def _(
    x_RC: Tensor, w_ECD: Tensor, x_scales: Tensor, w_scales: Tensor, offsets_E: Tensor, num_rows: int, *, fast: bool
) -> Tensor:
    # Looks at shapes and strides as the kernel does.
    return torch._scaled_grouped_mm(
        x_RC, w_ECD, x_scales, w_scales, offs=offsets_E, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def check_groups(offsets_E: Tensor, multiple: int) -> None:
    """Kernels give wrong numbers for other groups, or read what is not theirs. Does not wait for a device.

    Raises:
        RuntimeError: a group is no multiple of `multiple` rows. On a GPU, it is the next operation there that fails.
    """
    message = f"experts' rows must be padded to multiples of {multiple}"
    torch._assert_async((offsets_E % multiple == 0).all(), message)


def cast(values: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Contiguous codes, and scales along the last dim."""
    codes, scales = quantize(values, -1, scaling)
    return codes.contiguous(), scales


def cast_transposed(values: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """`cast` along the last dim but one, which then is the last."""
    return cast(values.transpose(-2, -1), scaling)


def with_empty_groups(offsets_E: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where blocks of 16 rows go so that an expert without rows has one, of zeros, and its gradient is zero: kernels
    leave that of a group without rows undefined (pytorch#172439).

    Args:
        offsets_E: the ends of groups, multiples of 16.
        num_blocks: of rows.

    Returns:
        For each block of now (`num_blocks` + E): that of before, -1 if it is zeros; and its expert, any beyond the last
        end. The new ends of the groups (E), int32.
    """
    num_experts = offsets_E.shape[0]
    is_empty_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)) == 0
    num_added_E = is_empty_E.cumsum(0, dtype=torch.int32)
    ends_E = offsets_E + MULTIPLE * num_added_E
    block_B = torch.arange(num_blocks + num_experts, dtype=torch.int32, device=offsets_E.device)
    group_B = torch.searchsorted(ends_E, MULTIPLE * block_B, right=True)  # beyond the last end: E
    expert_B = group_B.clamp(max=num_experts - 1)
    has_rows_B = (group_B < num_experts) & ~is_empty_E[expert_B]
    return torch.where(has_rows_B, block_B - num_added_E[expert_B], -1), expert_B, ends_E


def cast_groups(
    x_RC: Tensor, source_B: Tensor, expert_B: Tensor, ends_E: Tensor, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """Cast the rows of each expert by themselves, with a scale for each of its columns; see `with_empty_groups`.

    Returns:
        Codes (C, 16 B), contiguous; zero beyond the last end. Scales (E, C).
    """
    blocks_B16C = x_RC.unflatten(0, (-1, MULTIPLE))[source_B.clamp(min=0)]
    blocks_B16C = torch.where((source_B >= 0)[:, None, None], blocks_B16C, 0.0)
    # Magnitudes are ordered as their bits are, and integers have a maximum in hardware. NaN is the largest.
    bits_BC = blocks_B16C.abs().amax(1).float().view(torch.int32)
    bits_EC = bits_BC.new_zeros(ends_E.shape[0], x_RC.shape[1])
    bits_EC = bits_EC.scatter_reduce(0, expert_B[:, None].expand_as(bits_BC), bits_BC, "amax")
    scales_EC, inverse_EC = scales_for(bits_EC.view(torch.float32), scaling)
    codes_B16C = (blocks_B16C * inverse_EC.to(x_RC.dtype)[expert_B][:, None]).to(scaling.dtype)
    return codes_B16C.flatten(0, 1).t().contiguous(), scales_EC


def fused(function: Callable[..., Any], values: Tensor, *args: Any) -> Any:
    """Call a function, compiled where that makes one or two kernels of it: on a GPU, unless all around it is compiled.

    Each is compiled for few kinds of operands (torch stops at eight of one function): without gradients, contiguous.
    """
    if not _gains(values):
        return function(values, *args)
    return _compiled(function)(values.detach().contiguous(), *args)


def _gains(values: Tensor) -> bool:
    return values.device.type == "cuda" and not torch.compiler.is_compiling()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Tiles of two dims: what is transposed is then read and written by whole cache lines.
    return torch.compile(function, dynamic=True, options={"triton.prefer_nd_tiling": True})
