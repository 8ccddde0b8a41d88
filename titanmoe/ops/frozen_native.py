"""FP8 products with frozen weights whose codes and scales are multiplied as they are stored.

Rows are rounded to FP8 as they come, and are the only thing that is. y = x w^T sums over inputs: a scale per output
multiplies the result, one per block of 128 x 128 is the kernel's affair. dx = dy w sums over outputs: scales of outputs
multiply dy before it is rounded, and what is multiplied with is codes alone. No weight is quantised a second time; for
dx its codes are transposed, since kernels read what is summed over side by side.

Shape suffixes: R rows (sorted by expert), C columns of rows, D outputs of a product, E experts, N output features, K
input features; small letters: blocks of 128 of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from titanmoe.ops.float8 import Scaling, quantize, rounded
from titanmoe.ops.frozen import Parts, rows_times_frozen
from titanmoe.ops.native_float8 import MULTIPLE, Float8GroupedKernels, Float8LinearKernels, cast, fused
from titanmoe.ops.scaled_casts import BLOCK_SIZE, FP8

ROW = Scaling("row")


class ChannelKernels:
    """A scale per output, by the kernels of training in FP8."""

    feature_multiple = MULTIPLE

    def __init__(self, kernels: Float8LinearKernels | Float8GroupedKernels) -> None:
        self.kernels = kernels
        self.name = kernels.name

    def product(self, x_RK: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        rows = self.kernels.quantize_rows(x_RK, offsets_E)
        return self.kernels.multiply(rows, _codes_and_scales(parts, offsets_E), "in", offsets_E, num_rows)

    def input_gradient(self, dy_RN: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        codes_ENK, scales_EN1 = _codes_and_scales(parts, offsets_E)
        rows = fused(cast_scaled, dy_RN, scales_EN1, offsets_E)
        codes_EKN = _transposed(codes_ENK)
        ones_EK1 = scales_EN1.new_ones(*codes_EKN.shape[:-1], 1)
        return self.kernels.multiply(rows, (codes_EKN, ones_EK1), "out", offsets_E, num_rows)


class BlockLinearKernels:
    """A scale per 128 x 128 values of a linear layer, and per 128 of a row: cuBLAS' kernel for Hopper."""

    name = "block_scaled_mm"
    feature_multiple = BLOCK_SIZE

    def product(self, x_RK: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        return self._multiply(x_RK, *_codes_and_scales(parts, offsets_E))

    def input_gradient(self, dy_RN: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        codes_NK, scales_nk = _codes_and_scales(parts, offsets_E)
        return self._multiply(dy_RN, _transposed(codes_NK), scales_nk.t())

    def _multiply(self, x_RC: Tensor, codes_DC: Tensor, scales_dc: Tensor) -> Tensor:
        num_rows, missing = x_RC.shape[0], -x_RC.shape[0] % MULTIPLE  # scales of rows begin at 16 bytes, too
        padded_RC = F.pad(x_RC, (0, 0, 0, missing)) if missing else x_RC
        rows_RC, scales_cR = fused(cast_blocks, padded_RC)
        return block_scaled_mm(rows_RC, scales_cR, codes_DC, scales_dc)[:num_rows]


# An operator, as torch.compile of torch 2.11 does not know what is in it.
@torch.library.custom_op("titanmoe::block_scaled_mm", mutates_args=())
def block_scaled_mm(x_RC: Tensor, x_scales_cR: Tensor, w_DC: Tensor, w_scales_dc: Tensor) -> Tensor:
    """x w^T in bfloat16, of codes with scales per 1 x 128 and per 128 x 128. All contiguous."""
    # cuBLAS wants scales of rows row by row, and those of a weight block column by block column, each padded to fours.
    padded_dc = F.pad(w_scales_dc, (0, -w_scales_dc.shape[1] % 4)).contiguous()
    return F.scaled_mm(
        x_RC,
        w_DC.t(),
        x_scales_cR.t(),
        ScalingType.BlockWise1x128,
        padded_dc.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


@block_scaled_mm.register_fake
def _(x_RC: Tensor, x_scales_cR: Tensor, w_DC: Tensor, w_scales_dc: Tensor) -> Tensor:
    return x_RC.new_empty(x_RC.shape[0], w_DC.shape[0], dtype=torch.bfloat16)


def cast_scaled(dy_RN: Tensor, scales_EN1: Tensor, offsets_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows, after each was multiplied with the scales of its expert's outputs."""
    return cast(dy_RN.float() * _scales_of_rows(dy_RN.shape[0], scales_EN1, offsets_E), ROW)


def _scales_of_rows(num_rows: int, scales_EN1: Tensor, offsets_E: Tensor | None) -> Tensor:
    """(R, N) or (1, N); those of rows of no expert are any."""
    scales_EN = scales_EN1.squeeze(-1)
    if offsets_E is None:
        return scales_EN[None]
    row_R = torch.arange(num_rows, dtype=offsets_E.dtype, device=offsets_E.device)
    expert_R = torch.searchsorted(offsets_E, row_R, right=True).clamp(max=offsets_E.shape[0] - 1)
    return scales_EN[expert_R]


def cast_blocks(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R, C); a scale for each 128 values of a row (c, R)."""
    codes_RcB, scales_Rc1 = quantize(values_RC.unflatten(-1, (-1, BLOCK_SIZE)), -1, ROW)
    return codes_RcB.flatten(-2), scales_Rc1.squeeze(-1).t().contiguous()


class EmulatedFrozenKernels:
    """The same roundings without the hardware: weights are dequantised, and rows rounded to what codes can hold."""

    name = "emulated"

    def __init__(self, has_blocks: bool) -> None:
        self.has_blocks = has_blocks
        self.feature_multiple = BLOCK_SIZE if has_blocks else MULTIPLE

    def product(self, x_RK: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        return self._multiply(self._rounded(x_RK), parts, offsets_E, num_rows, transpose=True)

    def input_gradient(self, dy_RN: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        if self.has_blocks:
            rows_RN = self._rounded(dy_RN)
        else:
            scales = _scales_of_rows(dy_RN.shape[0], _codes_and_scales(parts, offsets_E)[1], offsets_E)
            rows_RN = (self._rounded(dy_RN.float() * scales) / scales).to(dy_RN.dtype)
        return self._multiply(rows_RN, parts, offsets_E, num_rows, transpose=False)

    def _rounded(self, rows_RC: Tensor) -> Tensor:
        if not self.has_blocks:
            return rounded(rows_RC, -1, ROW)
        return rounded(rows_RC.unflatten(-1, (-1, BLOCK_SIZE)), -1, ROW).flatten(-2)

    def _multiply(
        self, rows_RC: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int, *, transpose: bool
    ) -> Tensor:
        name = "float8-block" if self.has_blocks else "float8-channel"
        return rows_times_frozen(
            rows_RC, list(parts), offsets_E, num_rows, name, transpose=transpose, kernel_name="loop"
        )


def _codes_and_scales(parts: Parts, offsets_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (N, K) or (E, N, K); scales (N, 1) or (E, N, 1), or (n, k) of blocks, float32."""
    first = 0 if offsets_E is None else 1
    payload, scales = (part.flatten(first, -2) for part in parts)
    return payload.view(FP8), scales.view(torch.float32)


def _transposed(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8).transpose(-2, -1).contiguous().view(FP8)
