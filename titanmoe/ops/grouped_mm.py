"""The grouped product: every expert's rows times that expert's weight, in one call.

Shape suffixes: R rows (sorted by expert), E experts, N output features, K input features.

Rows of expert e are `x[offsets[e - 1] : offsets[e]]`; offsets stay on the device. FLOPs: 2 R N K forward, the same
again for each gradient that is asked for. Bytes: the three operands once.

On accelerators this is `torch.nn.functional.grouped_mm`. On the CPU it is a loop over experts that writes each product
in place: the offsets are in host memory anyway, and the loop is faster there. Which of the two is a property of the
`GroupedProduct` that a module has; products in low precision, which replace it, are in `scaled_product`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.partial_backward import wants_gradient

Kernel = Literal["auto", "torch", "loop"]
"""What multiplies: `F.grouped_mm`; a loop over experts, which waits for the device; or whichever is right and fast."""

_ALIGNMENT_BYTES = 16
"""What `F.grouped_mm` asks of every row stride (torch 2.11 to 2.13)."""

_FEW_TOKENS = 32


class GroupedProduct(Protocol):
    """Rows times the weights of their experts, in some precision. Differentiable; a frozen weight gets no gradient."""

    def __call__(self, x_RK: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int = 0) -> Tensor:
        """y_RN. See `grouped_mm`."""

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        """What the dispatcher pads every expert's rows to a multiple of, for rows like `x`.

        Args:
            trains: whether the weight has a gradient, which is a sum over rows.
        """


class PlainGroupedProduct:
    """`grouped_mm`, in the dtype of the operands."""

    def __init__(self, kernel: Kernel = "auto") -> None:
        self.kernel: Kernel = kernel

    def __call__(self, x_RK: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int = 0) -> Tensor:
        return grouped_mm(x_RK, w_ENK, offsets_E, num_rows, self.kernel)

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        """Any number of rows is correct; this one is fast.

        On the CPU, oneDNN builds a kernel for every new shape of a bfloat16 product, and the router's counts are all
        different: groups as they came reached 130 GFLOP/s where multiples of 32, whose kernels are soon all built,
        reached 350. float32 goes to BLAS, which has no such cost; nor have the few tokens of a decoding step, whose
        counts are all small.
        """
        is_slow = x.device.type == "cpu" and x.dtype != torch.float32
        is_slow = is_slow and x.shape[:-1].numel() > _FEW_TOKENS
        return 32 if is_slow else 1


def grouped_mm(x_RK: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int = 0, kernel: Kernel = "auto") -> Tensor:
    """Multiply each group of rows with its expert's weight: y[r] = w[e(r)] @ x[r].

    Rows beyond the last offset belong to no expert: they are not read, and are zero in the result and in the gradient.

    Args:
        x_RK: rows sorted by expert, contiguous.
        w_ENK: one weight per expert, contiguous; same dtype as x.
        offsets_E: int32, the end of each expert's rows; non-decreasing, and at most R.
        num_rows: a number of rows of which the host knows that they are before the last offset. Where the offsets
            are on a device, it saves writing zeros over the others without need.

    Returns:
        y_RN. Differentiable; a gradient is computed only for the operands that require one, so a frozen weight costs
        no weight gradient.
    """
    if not torch.is_grad_enabled():  # a decoding step is short enough to feel the cost of a node
        return rows_times_weights(x_RK, w_ENK, offsets_E, num_rows, transpose=True, kernel_name=kernel)
    return _GroupedProduct.apply(x_RK, w_ENK.view_as(w_ENK), offsets_E, num_rows, kernel)  # see `wants_gradient`


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int, kernel: Kernel) -> Tensor:
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_RK if needs_dw else None, w_ENK if needs_dx else None, offsets_E)
        ctx.num_rows, ctx.kernel = num_rows, kernel
        return rows_times_weights(x_RK, w_ENK, offsets_E, num_rows, transpose=True, kernel_name=kernel)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_RK, w_ENK, offsets_E = ctx.saved_tensors
        dy_RN = dy_RN.contiguous()
        dx_RK = dw_ENK = None
        if w_ENK is not None and wants_gradient(ctx, 0):
            dx_RK = rows_times_weights(dy_RN, w_ENK, offsets_E, ctx.num_rows, transpose=False, kernel_name=ctx.kernel)
        if x_RK is not None and wants_gradient(ctx, 1):
            dw_ENK = rows_times_rows(dy_RN, x_RK, offsets_E, kernel_name=ctx.kernel)
        return dx_RK, dw_ENK, None, None, None


# Custom operators, so that torch.compile sees shapes and not loops, and float32 needs no compiled grouped kernel. No
# argument may be `kernel`: Inductor passes arguments on by name beside one of its own that is called so.


@torch.library.custom_op("titanmoe::rows_times_weights", mutates_args=())
def rows_times_weights(
    x_RA: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int, *, transpose: bool, kernel_name: str = "auto"
) -> Tensor:
    """x[r] @ w[e].T if `transpose`, else x[r] @ w[e]. See `grouped_mm`."""
    w_EAB = w_ENK.transpose(-2, -1) if transpose else w_ENK
    if _uses_grouped_kernel(x_RA, w_ENK.shape[1:], kernel_name):
        return zero_tail_(F.grouped_mm(x_RA, w_EAB, offs=offsets_E), offsets_E, num_rows)
    y_RB = x_RA.new_empty(x_RA.shape[0], w_EAB.shape[2])
    weights, end = w_EAB.unbind(0), 0
    for expert, rows in expert_rows(offsets_E):
        if rows.start < rows.stop:  # few have any where a single token is decoded
            torch.mm(x_RA[rows], weights[expert], out=y_RB[rows])
            end = rows.stop
    y_RB[end:].zero_()
    return y_RB


@rows_times_weights.register_fake
def _(
    x_RA: Tensor, w_ENK: Tensor, offsets_E: Tensor, num_rows: int, *, transpose: bool, kernel_name: str = "auto"
) -> Tensor:
    return x_RA.new_empty(x_RA.shape[0], w_ENK.shape[1 if transpose else 2])


@torch.library.custom_op("titanmoe::rows_times_rows", mutates_args=())
def rows_times_rows(dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor, *, kernel_name: str = "auto") -> Tensor:
    """The weight gradient: dy[rows of e].T @ x[rows of e] for every expert; zero for an expert without rows."""
    if _uses_grouped_kernel(x_RK, (dy_RN.shape[1], x_RK.shape[1]), kernel_name):
        return F.grouped_mm(dy_RN.t(), x_RK, offs=offsets_E)
    dw_ENK = x_RK.new_empty(offsets_E.shape[0], dy_RN.shape[1], x_RK.shape[1])
    for expert, rows in expert_rows(offsets_E):
        torch.mm(dy_RN[rows].t(), x_RK[rows], out=dw_ENK[expert])
    return dw_ENK


@rows_times_rows.register_fake
def _(dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor, *, kernel_name: str = "auto") -> Tensor:
    return x_RK.new_empty(offsets_E.shape[0], dy_RN.shape[1], x_RK.shape[1])


def zero_tail_(y_RN: Tensor, offsets_E: Tensor, num_rows: int) -> Tensor:
    """Write zeros over the rows beyond the last offset, which kernels leave undefined. The first `num_rows` are not."""
    tail_RN = y_RN[num_rows:]
    if tail_RN.shape[0]:
        row_R = torch.arange(num_rows, y_RN.shape[0], device=y_RN.device)
        tail_RN.masked_fill_((row_R >= offsets_E[-1])[:, None], 0.0)
    return y_RN


def _uses_grouped_kernel(rows: Tensor, num_features: Sequence[int], kernel: str) -> bool:
    """Whether `F.grouped_mm` takes these rows, with operands of these numbers of features (their row strides)."""
    if kernel == "auto":
        kernel = "torch" if rows.device.type != "cpu" and rows.dtype == torch.bfloat16 else "loop"
    return kernel == "torch" and all(number * rows.element_size() % _ALIGNMENT_BYTES == 0 for number in num_features)


def expert_rows(offsets_E: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert; waits for the device."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        yield expert, slice(start, end)
        start = end
