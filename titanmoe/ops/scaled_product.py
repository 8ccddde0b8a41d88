"""Products in low precision: operands are quantised as they come, results are in the dtype of the input.

A product y = x w^T has three: itself (summed over K), the gradient of x (over N) and that of w (over rows). Each
quantises its two operands along the dim it sums over. What quantises and multiplies is a `Kernels`; what is here is
which of it is called when: no gradient of a weight that is frozen, and such a weight quantised once.

Shape suffixes: T tokens, R rows (sorted by expert), E experts, N output features, K input features; `...` any leading
shape.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from titanmoe.ops.grouped_mm import Kernel, PlainGroupedProduct, rows_times_rows
from titanmoe.ops.partial_backward import wants_gradient

Along = Literal["in", "out"]
"""The features that a product sums over: K, as y does, or N, as the gradient of x does."""
Operand = tuple[Tensor, ...]
"""Something quantised, as the kernels that made it want it."""


class Kernels(Protocol):
    """A format on some hardware. Without offsets there is one weight (N, K), and all rows are its own.

    Attributes:
        name: for people.
        feature_multiple: what K and N must be multiples of.
    """

    name: str
    feature_multiple: int

    def row_multiple(self, trains: bool) -> int:
        """What every expert's number of rows must be a multiple of; `trains` if there will be weight gradients."""

    def quantize_rows(self, x_RC: Tensor, offsets_E: Tensor | None) -> Operand:
        """Rows to be multiplied with weights, quantised along C."""

    def quantize_weights(self, w_ENK: Tensor, along: Along) -> Operand:
        """Weights (E, N, K) or (N, K), quantised along K or N."""

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        """Rows (R, C) times weights, in bfloat16 or in the operands' dtype. See `grouped_mm` for `num_rows`."""

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        """dw (E, N, K) or (N, K), with both operands quantised along R; zero for an expert without rows."""


class LowPrecisionProduct:
    """What products of linear layers and of experts share.

    Args:
        kernels: the format.
        rounds_weight_gradient: whether operands of the gradient of the weight are quantised, too.
        keeps_frozen: whether a frozen weight stays where it is, so that it need be quantised only once. Not if it is
            gathered from other ranks for each use: what is kept of it would be whole on each of them.
    """

    def __init__(self, kernels: Kernels, rounds_weight_gradient: bool = True, keeps_frozen: bool = True) -> None:
        self.kernels = kernels
        self.rounds_weight_gradient = rounds_weight_gradient
        self.keeps_frozen = keeps_frozen
        self._kept: dict[Along, tuple[weakref.ref[torch.UntypedStorage], tuple, Operand]] = {}

    def weights(self, w: Tensor, along: Along, is_frozen: bool) -> Operand:
        """The weight quantised. What is made of a frozen one is kept until it changes or its memory is freed.

        Changes are those that autograd counts: not those through `.data`, nor through a DTensor of which `w` is a part.
        """
        if not self.keeps_frozen or torch.compiler.is_compiling() or w.is_inference():
            return self.kernels.quantize_weights(w, along)
        if not is_frozen:
            self._kept.clear()
            return self.kernels.quantize_weights(w, along)
        storage = w.untyped_storage()
        state = (w._version, w.storage_offset(), w.shape, w.stride())
        kept = self._kept.get(along)
        if kept is not None and kept[0]() is storage and kept[1] == state:
            return kept[2]
        operand = self.kernels.quantize_weights(w, along)
        self._kept[along] = (weakref.ref(storage, lambda _: self._kept.pop(along, None)), state, operand)
        return operand


class ScaledLinearProduct(LowPrecisionProduct):
    """In the place of `F.linear`. The bias is added in the dtype of the input."""

    def __call__(self, x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        y_TN = _ScaledProduct.apply(x_TK, w_NK.view_as(w_NK), None, self, 0, "auto")
        y = y_TN.view(*x.shape[:-1], w_NK.shape[0])
        return y if bias_N is None else y + bias_N.to(y.dtype)


class ScaledGroupedProduct(LowPrecisionProduct):
    """In the place of a `PlainGroupedProduct`, whose kernel is still that of a weight gradient that is not rounded."""

    def __init__(
        self,
        kernels: Kernels,
        rounds_weight_gradient: bool = True,
        keeps_frozen: bool = True,
        plain_kernel: Kernel = "auto",
    ) -> None:
        super().__init__(kernels, rounds_weight_gradient, keeps_frozen)
        self.plain = PlainGroupedProduct(plain_kernel)

    def __call__(self, x_RK: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int = 0) -> Tensor:
        return _ScaledProduct.apply(x_RK, w_ENK.view_as(w_ENK), offsets_E, self, num_rows, self.plain.kernel)

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        """See `GroupedProduct`."""
        own = self.kernels.row_multiple(trains and self.rounds_weight_gradient)
        return math.lcm(own, self.plain.row_multiple(x, trains))


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        w: Tensor,
        offsets_E: Tensor | None,
        product: LowPrecisionProduct,
        num_rows: int,
        plain_kernel: Kernel,
    ) -> Tensor:
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_RK if needs_dw else None, w if needs_dx else None, offsets_E)
        ctx.product, ctx.is_frozen = product, not needs_dw
        ctx.num_rows, ctx.plain_kernel = num_rows, plain_kernel
        rows = product.kernels.quantize_rows(x_RK.contiguous(), offsets_E)
        weights = product.weights(w, "in", not needs_dw)
        y_RN = product.kernels.multiply(rows, weights, "in", offsets_E, num_rows)
        # Under torch.compile of torch 2.11, gradients through a cast that changes nothing are zero.
        return y_RN if y_RN.dtype == x_RK.dtype else y_RN.to(x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x_RK, w, offsets_E = ctx.saved_tensors
        product, kernels = ctx.product, ctx.product.kernels
        dy_RN = dy_RN.contiguous()
        dx_RK = dw = None
        if w is not None and wants_gradient(ctx, 0):
            weights = product.weights(w, "out", ctx.is_frozen)
            rows = kernels.quantize_rows(dy_RN, offsets_E)
            dx_RK = kernels.multiply(rows, weights, "out", offsets_E, ctx.num_rows).to(dy_RN.dtype)
        if x_RK is not None and wants_gradient(ctx, 1):
            if product.rounds_weight_gradient:
                dw = kernels.weight_gradient(dy_RN, x_RK.contiguous(), offsets_E).to(dy_RN.dtype)
            elif offsets_E is None:
                dw = dy_RN.t() @ x_RK
            else:
                dw = rows_times_rows(dy_RN, x_RK.contiguous(), offsets_E, kernel_name=ctx.plain_kernel)
        return dx_RK, dw, None, None, None, None
