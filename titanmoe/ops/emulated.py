"""Low precision without its hardware: operands are rounded to what the codes can hold, and multiplied as they are.

Scales are powers of two and codes have three bits of mantissa, so a rounded value is exact in bfloat16, and a product
of two in float32: results differ from those of the hardware by the order of summation only.

Shape suffixes: R rows (sorted by expert), C columns, E experts, N output features, K input features.
"""

from __future__ import annotations

from torch import Tensor

from titanmoe.ops.float8 import BLOCK, Scaling, rounded, rounded_groups
from titanmoe.ops.grouped_mm import Kernel, rows_times_rows, rows_times_weights
from titanmoe.ops.scaled_product import Along, Operand


class EmulatedKernels:
    """Any scaling on any device. Experts may have any number of rows: their last blocks may be partial.

    Args:
        plain_kernel: what multiplies, of experts.
    """

    name = "emulated"

    def __init__(self, scaling: Scaling, plain_kernel: Kernel = "auto") -> None:
        self.scaling = scaling
        self.plain_kernel = plain_kernel
        self.feature_multiple = BLOCK if scaling.shared_by == "block" else 16

    def row_multiple(self, trains: bool) -> int:
        return 1

    def quantize_rows(self, x_RC: Tensor, offsets_E: Tensor | None) -> Operand:
        return (rounded(x_RC, -1, self.scaling),)

    def quantize_weights(self, w_ENK: Tensor, along: Along) -> Operand:
        return (rounded(w_ENK, -1 if along == "in" else -2, self.scaling),)

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        (x_RC,), (w,) = rows, weights
        if offsets_E is None:
            return x_RC @ (w.t() if along == "in" else w)
        return rows_times_weights(x_RC, w, offsets_E, num_rows, transpose=along == "in", kernel_name=self.plain_kernel)

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        if offsets_E is None:
            return rounded(dy_RN, -2, self.scaling).t() @ rounded(x_RK, -2, self.scaling)
        dy_RN, x_RK = (rounded_groups(operand, offsets_E, self.scaling) for operand in (dy_RN, x_RK))
        return rows_times_rows(dy_RN, x_RK, offsets_E, kernel_name=self.plain_kernel)
