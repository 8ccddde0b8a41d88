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
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.expert_bias import experts_of_rows
from titanmoe.ops.frozen import FrozenWeight
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

_BLOCK_ROWS, _NARROW, _BLOCKS_AT_ONCE = 32, 16, 64
"""On the CPU in bfloat16, products with factors of at most this rank take longer to begin than to compute. They go by
blocks of rows, many at once, where every expert's rows are whole blocks."""

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
        y_TN = _add(y_TN, _drop(x, adapted).flatten(0, -2), adapted, self.scale)
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
        y_RN, kernel = None, self.plain.kernel
        if isinstance(self.base, PlainGroupedProduct) and _goes_with_base(adapted):
            kernel = self.base.kernel
        else:
            y_RN = self.base(x_RK, adapted.weight, offsets_E, num_rows)
        y_RN = _add(y_RN, _drop(x_RK, adapted), adapted, self.scale, offsets_E, num_rows, kernel)
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


def _add(
    y_RN: Tensor | None,
    x_RK: Tensor,
    adapted: Adapted,
    scale: float,
    offsets_E: Tensor | None = None,
    num_rows: int = 0,
    kernel: Kernel = "auto",
) -> Tensor:
    """y + scale * (x A^T) B^T, where y is x W^T if it is not given. Without offsets all rows are of one A, B and W."""
    a, b = adapted.a, adapted.b
    w = adapted.weight if y_RN is None else None
    return _AddLowRank.apply(x_RK, a.view_as(a), b.view_as(b), y_RN, w, scale, offsets_E, num_rows, kernel)


class _AddLowRank(torch.autograd.Function):
    """What it saves is x, x A^T, and the weight and factors as they are stored, of which no other copy lives on."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        a: Tensor,
        b: Tensor,
        y_RN: Tensor | None,
        w: Tensor | None,
        scale: float,
        offsets_E: Tensor | None,
        num_rows: int,
        kernel: Kernel,
    ) -> Tensor:
        ctx.settings = scale, num_rows, kernel
        a_ELK, b_ELN = _factors(a, b, scale, x_RK, kernel)
        if offsets_E is None:
            h_RL = x_RK @ a_ELK.t()
            y_RN = y_RN if w is None else x_RK @ w.t()
            assert y_RN is not None
            out_RN = torch.addmm(y_RN, h_RL, b_ELN)  # not in place: recomputation may keep the first product
        else:
            out_RN, h_RL = add_low_rank(x_RK, a_ELK, b_ELN, y_RN, w, offsets_E, num_rows, kernel=kernel)
        ctx.save_for_backward(x_RK, h_RL, a, b, w if ctx.needs_input_grad[0] else None, offsets_E)
        return out_RN

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, h_RL, a, b, w, offsets_E = ctx.saved_tensors
        scale, num_rows, kernel = ctx.settings
        dy_RN = dy_RN.contiguous()
        a_ELK, b_ELN = _factors(a, b, scale, x_RK, kernel)
        wants_x, wants_a, wants_b = (wants_gradient(ctx, index) for index in range(3))
        dx = da = db = None
        if offsets_E is None:
            # The wide product first: what it reads is then in the cache, and what it wrote.
            of_base = dy_RN @ w if wants_x and w is not None else None
            dh_RL = dy_RN @ b_ELN.t()
            if wants_x:
                dx = dh_RL @ a_ELK if of_base is None else of_base.addmm_(dh_RL, a_ELK)
            if wants_a:
                da = dh_RL.t() @ x_RK
            if wants_b:
                db = h_RL.t() @ dy_RN
        else:
            dx, da, db = low_rank_gradients(
                dy_RN, x_RK, h_RL, a_ELK, b_ELN, w, offsets_E, num_rows, [wants_x, wants_a, wants_b], kernel=kernel
            )
        rank = a.shape[-2]
        return (
            dx if wants_x else None,
            da[..., :rank, :].to(a.dtype) if da is not None and wants_a else None,
            (db[..., :rank, :].mT * scale).to(b.dtype) if db is not None and wants_b else None,
            dy_RN if ctx.needs_input_grad[3] else None,
            *[None] * 5,
        )


def _factors(a: Tensor, b: Tensor, scale: float, x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """A, and B transposed and times `scale`, in the dtype of x: with a narrow last dim, products of the backward pass
    take BLAS three times as long. Where `F.grouped_mm` multiplies, with zeros up to a rank that it takes.
    """
    a_ELK, b_ELN = a.to(x.dtype), (b * scale).to(x.dtype).mT.contiguous()
    missing = -a.shape[-2] % (_ALIGNMENT_BYTES // x.element_size())
    if not missing or a.dim() == 2 or not _goes_to_kernel(x, kernel):
        return a_ELK, b_ELN
    return F.pad(a_ELK, (0, 0, 0, missing)), F.pad(b_ELN, (0, 0, 0, missing))


def _goes_to_kernel(x: Tensor, kernel: str) -> bool:
    return x.device.type != "cpu" or kernel == "torch"


def _experts_of_blocks(x: Tensor, offsets_E: Tensor, rank: int) -> Tensor | None:
    """Whose each block of rows is, if products with factors are to go by blocks; see `_NARROW`."""
    if x.dtype == torch.float32 or rank > _NARROW or (offsets_E % _BLOCK_ROWS).any() or not offsets_E[-1]:
        return None
    ends_E = offsets_E // _BLOCK_ROWS
    return torch.searchsorted(ends_E, torch.arange(int(ends_E[-1]), dtype=ends_E.dtype), right=True)


def _blocks(rows: Tensor, experts_b: Tensor) -> Tensor:
    """(R, C) as (blocks, their rows, C), without a copy; rows beyond the last block are left out."""
    return rows[: _BLOCK_ROWS * experts_b.shape[0]].unflatten(0, (-1, _BLOCK_ROWS))


def _after_products(x_RA: Tensor, w_EAB: Tensor | None, y_RB: Tensor, offsets_E: Tensor) -> Iterator[slice]:
    """Write x[r] @ w[e(r)] to y, expert by expert, if there is a w; and yield slices of blocks whose rows were just
    gone over, so that they are in the cache. All but the last are of one size, for which a kernel is built once.
    """
    begin, num_blocks = 0, int(offsets_E[-1]) // _BLOCK_ROWS
    for expert, rows in expert_rows(offsets_E):
        if w_EAB is not None and rows.start < rows.stop:
            torch.mm(x_RA[rows], w_EAB[expert], out=y_RB[rows])
        while begin < num_blocks and rows.stop // _BLOCK_ROWS >= min(begin + _BLOCKS_AT_ONCE, num_blocks):
            yield slice(begin, min(begin + _BLOCKS_AT_ONCE, num_blocks))
            begin += _BLOCKS_AT_ONCE


def _sums_of_blocks(addends_b: Tensor, experts_b: Tensor, num_experts: int) -> Tensor:
    """(blocks, ...) -> (E, ...)."""
    of_expert_Eb = (experts_b == torch.arange(num_experts)[:, None]).to(addends_b.dtype)
    return (of_expert_Eb @ addends_b.flatten(1)).view(num_experts, *addends_b.shape[1:])


@torch.library.custom_op("titanmoe::add_low_rank", mutates_args=())
def add_low_rank(
    x_RK: Tensor,
    a_ELK: Tensor,
    b_ELN: Tensor,
    y_RN: Tensor | None,
    w_ENK: Tensor | None,
    offsets_E: Tensor,
    num_rows: int,
    *,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """y[r] + h[r] @ b[e(r)] and h[r] = x[r] @ a[e(r)].T; y is that of `w_ENK` if it is not given.

    Beyond the last offset the first is what y is, and the second is not defined.
    """
    rows = offsets_E, num_rows
    if _goes_to_kernel(x_RK, kernel):
        base_RN = y_RN
        if base_RN is None:
            base_RN = rows_times_weights(x_RK, w_ENK, *rows, transpose=True, kernel=kernel)
        h_RL = rows_times_weights(x_RK, a_ELK, *rows, transpose=True, kernel=kernel)
        return rows_times_weights(h_RL, b_ELN, *rows, transpose=False, kernel=kernel).add_(base_RN), h_RL
    h_RL = x_RK.new_empty(x_RK.shape[0], a_ELK.shape[1])
    out_RN = x_RK.new_empty(x_RK.shape[0], b_ELN.shape[-1])
    experts_b = _experts_of_blocks(x_RK, offsets_E, a_ELK.shape[1])
    if experts_b is not None:
        x_b, h_b, out_b, y_b = (
            _blocks(each, experts_b) for each in (x_RK, h_RL, out_RN, out_RN if y_RN is None else y_RN)
        )
        a_b, b_b = a_ELK[experts_b], b_ELN[experts_b]
        for part in _after_products(x_RK, None if w_ENK is None else w_ENK.mT, out_RN, offsets_E):
            torch.bmm(x_b[part], a_b[part].mT, out=h_b[part])
            torch.baddbmm(y_b[part], h_b[part], b_b[part], out=out_b[part])
        end = int(offsets_E[-1])
        out_RN[end:] = 0.0 if y_RN is None else y_RN[end:]
        return out_RN, h_RL
    for x, h, out, y, a, b, w in _by_expert(offsets_E, (x_RK, h_RL, out_RN, y_RN), (a_ELK, b_ELN, w_ENK)):
        torch.mm(x, a.t(), out=h)
        torch.addmm(torch.mm(x, w.t(), out=out) if y is None else y, h, b, out=out)
    end = int(offsets_E[-1])
    out_RN[end:] = 0.0 if y_RN is None else y_RN[end:]
    return out_RN, h_RL


@add_low_rank.register_fake
def _(
    x_RK: Tensor, a_ELK: Tensor, b_ELN: Tensor, y_RN: Any, w_ENK: Any, offsets_E: Tensor, num_rows: int, *, kernel: str
) -> tuple[Tensor, Tensor]:
    num_rows = x_RK.shape[0]
    return x_RK.new_empty(num_rows, b_ELN.shape[-1]), x_RK.new_empty(num_rows, a_ELK.shape[1])


@torch.library.custom_op("titanmoe::low_rank_gradients", mutates_args=())
def low_rank_gradients(
    dy_RN: Tensor,
    x_RK: Tensor,
    h_RL: Tensor,
    a_ELK: Tensor,
    b_ELN: Tensor,
    w_ENK: Tensor | None,
    offsets_E: Tensor,
    num_rows: int,
    wants: Sequence[bool],
    *,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, a and b of `add_low_rank`; empty where they are not wanted. That of x includes `w_ENK`, if it is given."""
    wants_x, wants_a, wants_b = wants
    rows, straight = (offsets_E, num_rows), {"transpose": False, "kernel": kernel}
    if _goes_to_kernel(x_RK, kernel):
        dx_RK, da_ELK, db_ELN = _unfilled_gradients(x_RK, a_ELK, b_ELN, (False, False, False))
        dh_RL = rows_times_weights(dy_RN, b_ELN, *rows, transpose=True, kernel=kernel)
        if wants_x:
            dx_RK = rows_times_weights(dh_RL, a_ELK, *rows, **straight)
            if w_ENK is not None:
                dx_RK += rows_times_weights(dy_RN, w_ENK, *rows, **straight)
        if wants_a:
            da_ELK = rows_times_rows(dh_RL, x_RK, offsets_E, kernel=kernel)
        if wants_b:
            db_ELN = rows_times_rows(h_RL, dy_RN, offsets_E, kernel=kernel)
        return dx_RK, da_ELK, db_ELN
    dx_RK, da_ELK, db_ELN = _unfilled_gradients(x_RK, a_ELK, b_ELN, wants)
    experts_b = _experts_of_blocks(x_RK, offsets_E, a_ELK.shape[1])
    if experts_b is not None:
        x_b, dy_b, h_b = (_blocks(each, experts_b) for each in (x_RK, dy_RN, h_RL))
        a_b, b_b = a_ELK[experts_b], b_ELN[experts_b]
        dx_b = _blocks(dx_RK, experts_b) if wants_x else None
        da_b, db_b = torch.empty_like(a_b), torch.empty_like(b_b)
        for part in _after_products(dy_RN, w_ENK if wants_x else None, dx_RK, offsets_E):
            dh = dy_b[part] @ b_b[part].mT
            if dx_b is not None:
                torch.baddbmm(dx_b[part], dh, a_b[part], beta=0 if w_ENK is None else 1, out=dx_b[part])
            if wants_a:
                torch.bmm(dh.mT, x_b[part], out=da_b[part])
            if wants_b:
                torch.bmm(h_b[part].mT, dy_b[part], out=db_b[part])
        if wants_x:
            dx_RK[int(offsets_E[-1]) :] = 0.0
        if wants_a:
            da_ELK = _sums_of_blocks(da_b, experts_b, len(a_ELK))
        if wants_b:
            db_ELN = _sums_of_blocks(db_b, experts_b, len(b_ELN))
        return dx_RK, da_ELK, db_ELN
    rows_of_each = (dy_RN, x_RK, h_RL, dx_RK if wants_x else None)
    of_each = (a_ELK, b_ELN, w_ENK, da_ELK if wants_a else None, db_ELN if wants_b else None)
    for dy, x, h, dx, a, b, w, da, db in _by_expert(offsets_E, rows_of_each, of_each):
        # The wide product first: what it reads and writes is then in the cache.
        if wants_x and w is not None:
            torch.mm(dy, w, out=dx)
        if wants_b:
            torch.mm(h.t(), dy, out=db)
        dh = dy @ b.t()
        if wants_x and w is not None:
            dx.addmm_(dh, a)
        elif wants_x:
            torch.mm(dh, a, out=dx)
        if wants_a:
            torch.mm(dh.t(), x, out=da)
    if wants_x:
        dx_RK[int(offsets_E[-1]) :] = 0.0
    return dx_RK, da_ELK, db_ELN


@low_rank_gradients.register_fake
def _(
    dy_RN: Tensor,
    x_RK: Tensor,
    h_RL: Tensor,
    a_ELK: Tensor,
    b_ELN: Tensor,
    w_ENK: Tensor | None,
    offsets_E: Tensor,
    num_rows: int,
    wants: Sequence[bool],
    *,
    kernel: str,
) -> tuple[Tensor, ...]:
    return _unfilled_gradients(x_RK, a_ELK, b_ELN, wants)


def _unfilled_gradients(
    x_RK: Tensor, a_ELK: Tensor, b_ELN: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    likes = zip((x_RK, a_ELK, b_ELN), wants, strict=True)
    dx, da, db = (like.new_empty(like.shape if is_wanted else 0) for like, is_wanted in likes)
    return dx, da, db


def _by_expert(
    offsets_E: Tensor, rows: Sequence[Tensor | None], of_each: Sequence[Tensor | None]
) -> Iterator[tuple[Any, ...]]:
    """For every expert: its part of each of `rows`, and its own of each of the others. None stays None."""
    ends = offsets_E.tolist()
    sizes = [end - start for start, end in pairwise([0, *ends])]
    absent = [None] * len(ends)
    parts = [absent if each is None else each[: ends[-1]].split(sizes) for each in rows]
    return zip(*parts, *(absent if each is None else each.unbind(0) for each in of_each), strict=True)


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
