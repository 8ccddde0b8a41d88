"""Products with a frozen weight and a low-rank addition that is trained: LoRA (Hu et al., arXiv 2106.09685), and DoRA
(Liu et al., arXiv 2402.09353).

y = base(x) + scale * (x A^T) B^T. The sum of the weights never exists: x and the narrow x A^T are what a backward
pass needs beside the weights. With DoRA every output is then multiplied with magnitude / |W + scale B A|, the norm of
its row of weights, through which no gradient flows (section 4.3 of the paper). The norm is found without that sum, too:
|W|^2 + 2 scale sum(B * (W A^T)) + scale^2 sum((B (A A^T)) * B), with W A^T from the base's own product.

Shape suffixes: T tokens, R rows (sorted by expert), E experts, N output features, K input features, L the rank; `...`
any leading shape. FLOPs of the addition: 2 T L (K + N) forward, twice that backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.expert_bias import experts_of_rows
from titanmoe.ops.grouped_mm import (
    GroupedProduct,
    Kernel,
    PlainGroupedProduct,
    expert_rows,
    rows_times_rows,
    rows_times_weights,
)
from titanmoe.ops.partial_backward import wants_gradient
from titanmoe.ops.rows import works_in_blocks

_ALIGNMENT_BYTES = 16  # of the row strides of what `F.grouped_mm` multiplies
_NUM_UNIT_ROWS = 32

Base = TypeVar("Base", bound=Callable[..., Tensor])


class Adapted(NamedTuple):
    """A weight and what is added to it; as this process has them.

    Attributes:
        weight: what the base product multiplies.
        a: (L, K), or (E, L, K).
        b: (N, L), or (E, N, L).
        magnitude: (N,), or (E, N); None without DoRA.
        dropout: part of the inputs that the addition does not see.
        sum_addends: sums over processes that have other input features; None if there are none.
    """

    weight: Any
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    dropout: float = 0.0
    sum_addends: Callable[[Tensor], Tensor] | None = None


class _LowRankProduct(Generic[Base]):
    """What products of linear layers and of experts share.

    Attributes:
        base: the product that is added to.
        scale: of the addition.
        norms: |W| of every output, found at its first use and kept, for DoRA. Set it to None if the weight changes.
    """

    def __init__(self, base: Base, scale: float) -> None:
        self.base = base
        self.scale = scale
        self.norms: Tensor | None = None

    def base_norms(self, x: Tensor, adapted: Adapted) -> Tensor:
        """|W| of every output, (N,) or (E, N), for inputs like `x`; float32 or float64."""
        if self.norms is None:
            with torch.inference_mode(False), torch.no_grad():
                if isinstance(adapted.weight, Tensor):
                    dtype = torch.promote_types(adapted.weight.dtype, torch.float32)
                    square = torch.linalg.vector_norm(adapted.weight, dim=-1, dtype=dtype).square()
                else:
                    square = self._square_of_product(x.dtype, adapted)
                self.norms = _over_processes(square, adapted).sqrt()
        return self.norms

    def _square_of_product(self, dtype: torch.dtype, adapted: Adapted) -> Tensor:
        """|W|^2 of what the base product makes of rows with a single one in them."""
        num_inputs = adapted.a.shape[-1]
        square = torch.zeros(adapted.b.shape[:-1], dtype=torch.float32, device=adapted.b.device)
        for start in range(0, num_inputs, _NUM_UNIT_ROWS):
            ones = torch.arange(start, min(start + _NUM_UNIT_ROWS, num_inputs), device=square.device)
            units = F.one_hot(ones, num_inputs).to(dtype)
            square += (
                self.times_weight(units.expand(*adapted.a.shape[:-2], -1, -1), adapted.weight).float().square().sum(-1)
            )
        return square

    def gain(self, x: Tensor, adapted: Adapted) -> Tensor:
        """magnitude / |W + scale B A|, (N,) or (E, N). Only the magnitude gets a gradient."""
        assert adapted.magnitude is not None
        norms = self.base_norms(x, adapted)
        with torch.no_grad():
            a, b = adapted.a.to(norms.dtype), adapted.b.to(norms.dtype)
            products = self.times_weight(adapted.a.to(x.dtype), adapted.weight).to(norms.dtype)
            both = (b * (2 * self.scale * products + self.scale**2 * (b @ (a @ a.mT)))).sum(-1)
            least = torch.finfo(norms.dtype).tiny
            ratio = norms / (norms.square() + _over_processes(both, adapted)).clamp_min(least).sqrt()
            # A magnitude may come rounded to few bits. It is |W| at first, and the gain is then to be one.
            rounded = norms.to(adapted.magnitude.dtype).to(norms.dtype).clamp_min(least)
        return adapted.magnitude.to(norms.dtype) / rounded * ratio

    def times_weight(self, rows: Tensor, weight: Any) -> Tensor:
        """w @ row of a few rows, (L, K) -> (N, L); of some for each expert, (E, L, K) -> (E, N, L)."""
        raise AssertionError("abstract")


class LowRankLinearProduct(_LowRankProduct[Callable[..., Tensor]]):
    """In the place of `F.linear`, with `Adapted` in that of the weight."""

    def __call__(self, x: Tensor, adapted: Adapted, bias_N: Tensor | None = None) -> Tensor:
        has_gain = adapted.magnitude is not None
        y = self.base(x, adapted.weight, None if has_gain else bias_N)
        y_TN = _add(y.flatten(0, -2), _drop(x, adapted).flatten(0, -2), adapted, self.scale)
        y = y_TN.view(y.shape)
        if has_gain:
            y = (y * self.gain(x, adapted)).to(y.dtype)
            y = y if bias_N is None else y + bias_N.to(y.dtype)
        return y

    def times_weight(self, rows: Tensor, weight: Any) -> Tensor:
        """See `_LowRankProduct`."""
        return self.base(rows, weight, None).mT


class LowRankGroupedProduct(_LowRankProduct[GroupedProduct]):
    """In the place of another `GroupedProduct`, with `Adapted` in that of the weights.

    Args:
        kernel: what multiplies with the factors.
    """

    def __init__(self, base: GroupedProduct, scale: float, kernel: Kernel = "auto") -> None:
        super().__init__(base, scale)
        self.plain = PlainGroupedProduct(kernel)

    def __call__(self, x_RK: Tensor, adapted: Adapted, offsets_E: Tensor, num_rows: int = 0) -> Tensor:
        y_RN = self.base(x_RK, adapted.weight, offsets_E, num_rows)
        y_RN = _add(y_RN, _drop(x_RK, adapted), adapted, self.scale, offsets_E, num_rows, self.plain.kernel)
        if adapted.magnitude is None:
            return y_RN
        return scale_outputs(y_RN, self.gain(x_RK, adapted), offsets_E)

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        """See `GroupedProduct`. The factors are trained in any case."""
        return math.lcm(self.base.row_multiple(x, trains), self.plain.row_multiple(x, True))

    def times_weight(self, rows: Tensor, weight: Any) -> Tensor:
        """See `_LowRankProduct`."""
        num_experts, num_rows, num_inputs = rows.shape
        multiple = 1 if isinstance(self.base, PlainGroupedProduct) else self.base.row_multiple(rows, False)
        x_RK = F.pad(rows, (0, 0, 0, -num_rows % multiple)).reshape(-1, num_inputs)
        each = x_RK.shape[0] // num_experts
        offsets_E = torch.arange(each, x_RK.shape[0] + 1, each, dtype=torch.int32, device=rows.device)
        y_RN = self.base(x_RK, weight, offsets_E, x_RK.shape[0])
        return y_RN.view(num_experts, each, -1)[:, :num_rows].mT


def _drop(x: Tensor, adapted: Adapted) -> Tensor:
    return F.dropout(x, adapted.dropout) if adapted.dropout else x


def _over_processes(addend: Tensor, adapted: Adapted) -> Tensor:
    return addend if adapted.sum_addends is None else adapted.sum_addends(addend)


def _add(
    y_RN: Tensor,
    x_RK: Tensor,
    adapted: Adapted,
    scale: float,
    offsets_E: Tensor | None = None,
    num_rows: int = 0,
    kernel: Kernel = "auto",
) -> Tensor:
    """y + scale * (x A^T) B^T; without offsets there is one A and one B, and all rows are theirs."""
    a, b = adapted.a, adapted.b
    return _AddLowRank.apply(y_RN, x_RK, a.view_as(a), b.view_as(b), scale, offsets_E, num_rows, kernel)


class _AddLowRank(torch.autograd.Function):
    """What it saves is x, x A^T, and the factors as they are stored, of which no other copy lives on."""

    @staticmethod
    def forward(
        ctx: Any,
        y_RN: Tensor,
        x_RK: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        offsets_E: Tensor | None,
        num_rows: int,
        kernel: Kernel,
    ) -> Tensor:
        ctx.scale, ctx.num_rows, ctx.kernel = scale, num_rows, kernel
        a_ELK, b_ELN = _factors(a, b, x_RK, kernel)
        if offsets_E is None:
            h_RL = (x_RK @ a_ELK.t()) * scale
            out_RN = torch.addmm(y_RN, h_RL, b_ELN)
        else:
            h_RL = rows_times_weights(x_RK, a_ELK, offsets_E, num_rows, transpose=True, kernel=kernel) * scale
            out_RN = add_rows_times_weights(y_RN, h_RL, b_ELN, offsets_E, num_rows, kernel=kernel)
        ctx.save_for_backward(x_RK, h_RL, a, b, offsets_E)
        return out_RN

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, h_RL, a, b, offsets_E = ctx.saved_tensors
        num_rows, kernel, rank = ctx.num_rows, ctx.kernel, a.shape[-2]
        dy_RN = dy_RN.contiguous()
        a_ELK, b_ELN = _factors(a, b, x_RK, kernel)
        dx_RK = da = db = None
        wants_x, wants_a = wants_gradient(ctx, 1), wants_gradient(ctx, 2)
        if wants_x or wants_a:
            if offsets_E is None:
                dh_RL = dy_RN @ b_ELN.t()
            else:
                dh_RL = rows_times_weights(dy_RN, b_ELN, offsets_E, num_rows, transpose=True, kernel=kernel)
            dh_RL = dh_RL.mul_(ctx.scale)
            if wants_x and offsets_E is None:
                dx_RK = dh_RL @ a_ELK
            elif wants_x:
                dx_RK = rows_times_weights(dh_RL, a_ELK, offsets_E, num_rows, transpose=False, kernel=kernel)
            if wants_a:
                da = _rows_times_rows(dh_RL, x_RK, offsets_E, kernel)[..., :rank, :].to(a.dtype)
        if wants_gradient(ctx, 3):
            db = _rows_times_rows(h_RL, dy_RN, offsets_E, kernel)[..., :rank, :].mT.to(b.dtype)
        return dy_RN, dx_RK, da, db, None, None, None, None


def _factors(a: Tensor, b: Tensor, x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """A, and B transposed, in the dtype of x: with a narrow last dim, products of the backward pass take BLAS three
    times as long. Where `F.grouped_mm` multiplies, with zeros up to a rank that it takes.
    """
    a_ELK, b_ELN = a.to(x.dtype), b.to(x.dtype).mT.contiguous()
    missing = -a.shape[-2] % (_ALIGNMENT_BYTES // x.element_size())
    if not missing or a.dim() == 2 or (x.device.type == "cpu" and kernel != "torch"):
        return a_ELK, b_ELN
    return F.pad(a_ELK, (0, 0, 0, missing)), F.pad(b_ELN, (0, 0, 0, missing))


def _rows_times_rows(dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None, kernel: Kernel) -> Tensor:
    return dy_RN.t() @ x_RK if offsets_E is None else rows_times_rows(dy_RN, x_RK, offsets_E, kernel=kernel)


@torch.library.custom_op("titanmoe::add_rows_times_weights", mutates_args=())
def add_rows_times_weights(
    y_RN: Tensor, h_RL: Tensor, b_ELN: Tensor, offsets_E: Tensor, num_rows: int, *, kernel: str
) -> Tensor:
    """y[r] + h[r] @ b[e(r)]; beyond the last offset what y is."""
    if h_RL.device.type != "cpu" or kernel == "torch":
        return y_RN + rows_times_weights(h_RL, b_ELN, offsets_E, num_rows, transpose=False, kernel=kernel)
    out_RN, end = torch.empty_like(y_RN), 0
    for expert, rows in expert_rows(offsets_E):
        torch.addmm(y_RN[rows], h_RL[rows], b_ELN[expert], out=out_RN[rows])
        end = rows.stop
    out_RN[end:] = y_RN[end:]
    return out_RN


@add_rows_times_weights.register_fake
def _(y_RN: Tensor, h_RL: Tensor, b_ELN: Tensor, offsets_E: Tensor, num_rows: int, *, kernel: str) -> Tensor:
    return torch.empty_like(y_RN)


def scale_outputs(y_RN: Tensor, gain_EN: Tensor, offsets_E: Tensor) -> Tensor:
    """y[r] * gain[e(r)], in the dtype of y; the gradient of the gain is summed in its own.

    Bytes: 2 R N forward and 3 R N backward. Rows beyond the last offset must be zero, and stay so.

    Args:
        offsets_E: int32, the end of each expert's rows; see `grouped_mm`.
    """
    if torch.compiler.is_compiling():
        return (y_RN * gain_EN[experts_of_rows(y_RN, offsets_E)]).to(y_RN.dtype)
    return _ScaleOutputs.apply(y_RN, gain_EN, offsets_E)


class _ScaleOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RN: Tensor, gain_EN: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(y_RN, gain_EN, offsets_E)
        return _times_gain(y_RN, gain_EN, offsets_E)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RN, gain_EN, offsets_E = ctx.saved_tensors
        dgain_EN = torch.zeros_like(gain_EN)
        if works_in_blocks(dy_RN):
            for expert, rows in expert_rows(offsets_E):
                dgain_EN[expert] = (dy_RN[rows].to(gain_EN.dtype) * y_RN[rows]).sum(0)
        else:
            experts_R = experts_of_rows(dy_RN, offsets_E)
            dgain_EN.index_add_(0, experts_R, dy_RN.to(gain_EN.dtype) * y_RN)
        return _times_gain(dy_RN, gain_EN, offsets_E), dgain_EN, None


def _times_gain(y_RN: Tensor, gain_EN: Tensor, offsets_E: Tensor) -> Tensor:
    out_RN = torch.empty_like(y_RN)
    if not works_in_blocks(y_RN):
        return torch.mul(y_RN, gain_EN[experts_of_rows(y_RN, offsets_E)], out=out_RN)
    end = 0
    for expert, rows in expert_rows(offsets_E):
        torch.mul(y_RN[rows], gain_EN[expert], out=out_RN[rows])
        end = rows.stop
    out_RN[end:].zero_()
    return out_RN
