"""MXFP8 products on Blackwell: quantised by torchao's kernels, multiplied by torch's.

All that is private to torchao is named here; checked against torchao 0.18. Its own differentiable functions are not
used: they would quantise a frozen weight again in every step, and always compute its gradient. Which kernel quantises
what, and how its scales are laid out, is as in `_compute_{fwd,dgrad,wgrad}_sm100` of torchao's `mxfp8_grouped_mm` and
in `mx_mm` of its `mxfp8_linear`.

Scales are in blocks of 128 x 4, as the tensor cores read them (cuBLAS: block scaling factors layout).

Shape suffixes: R rows (sorted by expert), C columns, E experts, N output features, K input features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.float8 import BLOCK, Scaling
from titanmoe.ops.native_float8 import check_groups, scaled_rows_times_weights
from titanmoe.ops.quiet_import import import_quietly
from titanmoe.ops.scaled_product import Along, Operand

TILE = 128
"""Of rows and of features: what torchao's kernels for experts take (their README says 32)."""

_FORMATS = "torchao.prototype.mx_formats.kernels"
_EXPERTS = "torchao.prototype.moe_training.kernels.mxfp8"


def missing_packages() -> list[str]:
    """What torchao's kernels for Blackwell import, and is not installed."""
    return import_quietly(f"{_EXPERTS}.cute_utils")._missing_cutedsl_runtime_packages()


class _MXKernels:
    name = "torchao"

    def __init__(self, scaling: Scaling) -> None:
        assert scaling.shared_by == "block" and scaling.dtype == torch.float8_e4m3fn, scaling
        import_quietly(_FORMATS), import_quietly(_EXPERTS)
        self.mode = {"up": "rceil", "down": "floor"}[scaling.rounding]

    def _along_columns(self, values: Tensor) -> Operand:
        """Codes and plain scales of values along their last dim. The kernel takes bfloat16."""
        from torchao.prototype.mx_formats.kernels import triton_to_mxfp8_dim0

        return triton_to_mxfp8_dim0(values.to(torch.bfloat16).contiguous(), BLOCK, self.mode)

    def _along_rows(self, x_RC: Tensor) -> Operand:
        """Codes (C, R) and plain scales (C, R / 32) of a matrix, along its rows."""
        from torchao.prototype.mx_formats.kernels import mxfp8_quantize_cuda

        _, codes_RC, _, scales_Cr = mxfp8_quantize_cuda(
            x_RC.contiguous(), rowwise=False, colwise=True, scaling_mode=self.mode
        )
        return codes_RC.t(), scales_Cr


class MXLinearKernels(_MXKernels):
    """`torch._scaled_mm`."""

    feature_multiple = BLOCK

    def row_multiple(self, trains: bool) -> int:
        return 1  # what the gradient of the weight lacks is added there

    def quantize_rows(self, x_RC: Tensor, offsets_E: Tensor | None) -> Operand:
        return self._blocked(self._along_columns(x_RC))

    def quantize_weights(self, w_ENK: Tensor, along: Along) -> Operand:
        return self._blocked(self._along_columns(w_ENK) if along == "in" else self._along_rows(w_ENK))

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        (a, a_scales), (b, b_scales) = rows, weights
        return torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=torch.bfloat16)

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        missing = -dy_RN.shape[0] % BLOCK
        operands = (F.pad(operand, (0, 0, 0, missing)) if missing else operand for operand in (dy_RN, x_RK))
        dy_NR, x_KR = (self._blocked(self._along_rows(operand)) for operand in operands)
        return self.multiply(dy_NR, x_KR, "in", None, 0)

    def _blocked(self, operand: Operand) -> Operand:
        from torchao.prototype.mx_formats.kernels import triton_mx_block_rearrange

        codes, scales = operand
        return codes, triton_mx_block_rearrange(scales).flatten()


class MXGroupedKernels(_MXKernels):
    """`torch._scaled_grouped_mm`. Every expert has a multiple of 128 rows, and so does the whole."""

    feature_multiple = TILE

    def row_multiple(self, trains: bool) -> int:
        return TILE

    def quantize_rows(self, x_RC: Tensor, offsets_E: Tensor | None) -> Operand:
        assert offsets_E is not None
        from torchao.prototype.moe_training.kernels.mxfp8 import mxfp8_quantize_2d_1x32_cutedsl

        check_groups(offsets_E, TILE)
        if not x_RC.shape[0]:
            return (x_RC.to(torch.float8_e4m3fn),)
        return mxfp8_quantize_2d_1x32_cutedsl(x_RC, scaling_mode=self.mode, offs=offsets_E)

    def quantize_weights(self, w_ENK: Tensor, along: Along) -> Operand:
        """Codes (E, K, N) or (E, N, K), column-major, and scales."""
        from torchao.prototype.moe_training.kernels.mxfp8 import (
            mxfp8_quantize_cuda_3d,
            triton_mx_block_rearrange_per_group_3d,
        )

        if along == "in":
            codes_ENK, scales_ENk = self._along_columns(w_ENK)
            scales = triton_mx_block_rearrange_per_group_3d(scales_ENk)
            return codes_ENK.transpose(-2, -1), scales
        return mxfp8_quantize_cuda_3d(
            w_ENK.contiguous(), BLOCK, scale_block_dim1=BLOCK, scale_block_dim2=1, scaling_mode=self.mode
        )

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        assert offsets_E is not None
        b, b_scales = weights
        if not rows[0].shape[0]:
            return b.new_empty(0, b.shape[2], dtype=torch.bfloat16)
        a, a_scales = rows
        return scaled_rows_times_weights(a, b, a_scales, b_scales, offsets_E, num_rows, fast=False)

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        from torchao.prototype.moe_training.kernels.mxfp8 import triton_mx_block_rearrange_2d_K_groups

        assert offsets_E is not None  # and its groups were checked where the rows were quantised
        if not x_RK.shape[0]:
            return x_RK.new_zeros(offsets_E.shape[0], dy_RN.shape[1], x_RK.shape[1], dtype=torch.bfloat16)
        (dy_NR, dy_scales_Nr), (x_KR, x_scales_Kr) = self._along_rows(dy_RN), self._along_rows(x_RK)
        dw_ENK = torch._scaled_grouped_mm(
            dy_NR,
            x_KR.t(),
            triton_mx_block_rearrange_2d_K_groups(dy_scales_Nr, offsets_E // BLOCK),
            triton_mx_block_rearrange_2d_K_groups(x_scales_Kr, offsets_E // BLOCK),
            offs=offsets_E,
            out_dtype=torch.bfloat16,
        )
        # Of a group without rows, kernels leave the gradient undefined (pytorch#172439).
        is_empty_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)) == 0
        return dw_ENK.masked_fill_(is_empty_E[:, None, None], 0.0)
