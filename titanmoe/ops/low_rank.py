"""Products with a frozen weight and a low-rank addition that is trained: LoRA (Hu et al., arXiv 2106.09685), and DoRA
(Liu et al., arXiv 2402.09353).

y = base(x) + scale * (x A^T) B^T. The sum of the weights never exists: x and the narrow x A^T are what a backward
pass needs beside the weights. Where the base is a plain product, it is one operation with the addition, which is made
in place in the gradient of x, and for experts; on the CPU while their rows are in the cache.

With DoRA every output is then multiplied with magnitude / |W + scale B A|, the norm of its row of weights, through
which no gradient flows (section 4.3 of the paper). The norm is found without that sum, too:
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
from titanmoe.ops.frozen import FrozenWeight
from titanmoe.ops.grouped_mm import GroupedProduct, Kernel, PlainGroupedProduct, expert_rows
from titanmoe.ops.low_rank_rows import LowRankRows
from titanmoe.ops.partial_backward import wants_gradient
from titanmoe.ops.permute import Copies, rows_of_experts, tokens_of_experts
from titanmoe.ops.rows import works_in_blocks

Base = TypeVar("Base", bound=Callable[..., Tensor])


class Adapted(NamedTuple):
    """A weight and what is added to it; as this process has them.

    Attributes:
        weight: what the base product multiplies, a tensor or a `FrozenWeight`.
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

    def base_norms(self, adapted: Adapted) -> Tensor:
        """|W| of every output, (N,) or (E, N); float32 or float64."""
        if self.norms is None:
            with torch.inference_mode(False), torch.no_grad():
                self.norms = _over_processes(_squares(adapted.weight), adapted).sqrt()
        return self.norms

    def gain(self, x: Tensor, adapted: Adapted) -> Tensor:
        """magnitude / |W + scale B A|, (N,) or (E, N). Only the magnitude gets a gradient."""
        assert adapted.magnitude is not None
        norms = self.base_norms(adapted)
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
        y_TN = None
        if self.base is not F.linear or not _goes_with_base(adapted) or not (has_gain or bias_N is None):
            y_TN = self.base(x, adapted.weight, None if has_gain else bias_N).flatten(0, -2)
        a, b = adapted.a, adapted.b
        w = adapted.weight if y_TN is None else None
        x_TK = _drop(x, adapted).flatten(0, -2)
        y_TN = _AddLowRank.apply(x_TK, a.view_as(a), b.view_as(b), y_TN, w, self.scale)  # views: see `wants_gradient`
        y = y_TN.view(*x.shape[:-1], -1)
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
        y_RN, _ = self._multiply(x_RK, adapted, (offsets_E, num_rows), adapted.a, adapted.b)
        if adapted.magnitude is None:
            return y_RN
        return scale_outputs(y_RN, self.gain(x_RK, adapted), offsets_E)

    def suits_tokens(self, adapted: Adapted, copies: Copies) -> bool:
        """Whether the factor that multiplies whole tokens should see these instead of their copies.

        It is then multiplied with the factors of all experts, of which the token's own are used. That is little work
        where these have few features together, as with many experts there is a small rank.
        """
        num_experts, rank, dim = adapted.a.shape[0], adapted.a.shape[1], copies.x_TD.shape[1]
        return (
            adapted.magnitude is None  # which multiplies what is added, differently for every expert
            and not adapted.dropout
            and copies.experts_TK.shape[1] > 1
            and copies.x_TD.shape[0] >= num_experts
            and 2 * num_experts * rank <= dim
        )

    def from_tokens(self, x_RK: Tensor, adapted: Adapted, offsets_E: Tensor, num_rows: int, copies: Copies) -> Tensor:
        """The same, with x A^T of tokens and not of their copies. FLOPs of it: 2 T E L K."""
        a_XK = adapted.a.to(x_RK.dtype).flatten(0, 1)
        h_RL = rows_of_experts(F.linear(copies.x_TD, a_XK), len(adapted.a), copies)
        return self._multiply(x_RK, adapted, (offsets_E, num_rows), None, adapted.b, h_RL)[0]

    def to_tokens(
        self, x_RK: Tensor, adapted: Adapted, offsets_E: Tensor, num_rows: int, copies: Copies
    ) -> tuple[Tensor, Tensor]:
        """The base's product of the rows; and apart from it, the sum over each token's copies of what is added.

        FLOPs of the latter: 2 T E L N.
        """
        y_RN, h_RL = self._multiply(x_RK, adapted, (offsets_E, num_rows), adapted.a, None)
        assert h_RL is not None
        b_XN = (adapted.b * self.scale).to(x_RK.dtype).mT.flatten(0, 1)
        return y_RN, tokens_of_experts(h_RL, len(adapted.b), copies) @ b_XN

    def _multiply(
        self, x_RK: Tensor, adapted: Adapted, rows: tuple[Tensor, int], a: Any, b: Any, h_RL: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `LowRankRows`."""
        y_RN = w = None
        kernel = self.plain.kernel
        if isinstance(self.base, PlainGroupedProduct) and _goes_with_base(adapted):
            w, kernel = adapted.weight, self.base.kernel
        else:
            y_RN = self.base(x_RK, adapted.weight, *rows)
        a, b = (None if factor is None else factor.view_as(factor) for factor in (a, b))
        added_to = None if b is None else y_RN
        out_RN, h_RL = LowRankRows.apply(_drop(x_RK, adapted), h_RL, a, b, added_to, w, self.scale, *rows, kernel)
        found_RN = y_RN if out_RN is None else out_RN
        assert found_RN is not None
        return found_RN, h_RL

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


def _squares(weight: Tensor | FrozenWeight) -> Tensor:
    """|W|^2 of every output, (N,) or (E, N). What is stored in few bits is gone over once, a tile at a time."""
    if isinstance(weight, Tensor):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).square()
    if weight.is_stack:
        return torch.stack([_squares(weight.experts(expert)) for expert in range(weight.shape[0])])
    return torch.cat([tile.square().sum(-1) for _, tile in weight.row_tiles(torch.float32)])


def _goes_with_base(adapted: Adapted) -> bool:
    """Whether a plain product can be one operation with the addition: of the same inputs, and with a frozen weight."""
    return not adapted.dropout and not adapted.weight.requires_grad


class _AddLowRank(torch.autograd.Function):
    """y + scale * (x A^T) B^T, where y is x W^T if it is not given.

    What it saves is x, x A^T, and the weight and factors as they are stored, of which no other copy lives on.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, a_LK: Tensor, b_NL: Tensor, y_TN: Tensor | None, w_NK: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale = scale
        a, b_LN = _factors(a_LK, b_NL, scale, x_TK.dtype)
        if w_NK is not None:
            y_TN, h_TL = linear_low_rank(x_TK, w_NK.t(), a, b_LN)
        else:
            assert y_TN is not None
            h_TL = x_TK @ a.t()
            y_TN = torch.addmm(y_TN, h_TL, b_LN)  # not in place: recomputation may keep the first product
        ctx.save_for_backward(x_TK, h_TL, a_LK, b_NL, w_NK if ctx.needs_input_grad[0] else None)
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, h_TL, a_LK, b_NL, w_NK = ctx.saved_tensors
        dy_TN = dy_TN.contiguous()
        a, b_LN = _factors(a_LK, b_NL, ctx.scale, x_TK.dtype)
        wants_x, wants_a, wants_b = (wants_gradient(ctx, index) for index in range(3))
        dx = da = db = None
        # The wide product first: what it reads is then in the cache, and what it wrote.
        of_base = dy_TN @ w_NK if wants_x and w_NK is not None else None
        dh_TL = dy_TN @ b_LN.t()
        if wants_x:
            dx = dh_TL @ a if of_base is None else of_base.addmm_(dh_TL, a)
        if wants_a:
            da = (dh_TL.t() @ x_TK).to(a_LK.dtype)
        if wants_b:
            db = ((h_TL.t() @ dy_TN).t() * ctx.scale).to(b_NL.dtype)
        return dx, da, db, dy_TN if ctx.needs_input_grad[3] else None, None, None


# An operator, so that recomputation keeps its result alone.
@torch.library.custom_op("titanmoe::linear_low_rank", mutates_args=())
def linear_low_rank(x_TK: Tensor, w_KN: Tensor, a_LK: Tensor, b_LN: Tensor) -> tuple[Tensor, Tensor]:
    """x W + (x A^T) B, and x A^T."""
    y_TN = x_TK @ w_KN
    h_TL = x_TK @ a_LK.t()
    return y_TN.addmm_(h_TL, b_LN), h_TL


@linear_low_rank.register_fake
def _unfilled_products(x_TK: Any, w_KN: Any, a_LK: Any, b_LN: Any) -> tuple[Tensor, Tensor]:
    return x_TK.new_empty(x_TK.shape[0], w_KN.shape[1]), x_TK.new_empty(x_TK.shape[0], a_LK.shape[0])


def _factors(a_LK: Tensor, b_NL: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A, and B transposed and times `scale`: with a narrow last dim, products of the backward pass take BLAS three
    times as long.
    """
    return a_LK.to(dtype), (b_NL * scale).to(dtype).t().contiguous()


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
