"""Low-rank additions to products of experts: rows with the factors of their experts.

out[r] = y[r] + h[r] @ b[e(r)], with h[r] = x[r] @ a[e(r)].T and y[r] = x[r] @ w[e(r)].T. Either half may be made
elsewhere: where h is given there is no A, and without B there is no addition, and h is a result.

Shape suffixes: R rows (sorted by expert), E experts, N output features, K input features, L the rank. FLOPs of each
half: 2 R L N, or 2 R L K, forward; twice that backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.grouped_mm import Kernel, expert_rows, rows_times_rows, rows_times_weights
from titanmoe.ops.partial_backward import wants_gradient

_ALIGNMENT_BYTES = 16  # of the row strides of what `F.grouped_mm` multiplies

_BLOCK_ROWS, _NARROW, _BLOCKS_AT_ONCE = 32, 16, 128
"""On the CPU in bfloat16, products with factors of at most this rank take longer to begin than to compute. They go by
blocks of rows, many at once, where every expert's rows are whole blocks."""

_FEW_COLUMNS = 8
"""On the CPU in float32, BLAS is slower for a result of few columns than for one of so few rows: with MKL, 512 rows and
416 inputs, 34 microseconds beside 8 for rank 2, 42 beside 26 for rank 8; but 31 beside 45 for rank 16."""


class LowRankRows(torch.autograd.Function):
    """y + scale * h b, or y without B, None without y; and h where there is no B. See the module.

    Beyond the last offset the first is what y is, and the second is not defined. Saved for the backward pass are the
    narrow h, factors and weights as they are stored, of which no other copy lives on, and x if there is an A.

    Arguments of `apply`:
        h_RL, a, b: a is (E, L, K), or None if h is given; b is (E, N, L), or None if h is wanted. Give factors as
            views, see `wants_gradient`.
        y_RN, w: what is added to, or the frozen weight (E, N, K) that makes it.
        offsets_E: int32, the end of each expert's rows; this, num_rows and kernel as in `grouped_mm`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        h_RL: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        y_RN: Tensor | None,
        w: Tensor | None,
        scale: float,
        offsets_E: Tensor,
        num_rows: int,
        kernel: Kernel,
    ) -> tuple[Tensor | None, Tensor | None]:
        are_given = [each is not None for each in (x_RK, h_RL, a, b)]
        # Autograd numbers only what is given.
        places = [sum(are_given[:index]) if is_given else None for index, is_given in enumerate(are_given)]
        ctx.settings = scale, num_rows, kernel, places
        a_ELK, b_ELN = _factors(a, b, scale, x_RK, kernel)
        h_RL = None if h_RL is None else _fill(h_RL, x_RK, kernel, dim=-1)
        out_RN, made_RL = add_low_rank(x_RK, h_RL, a_ELK, b_ELN, y_RN, w, offsets_E, num_rows, kernel_name=kernel)
        if h_RL is None:
            h_RL = made_RL
        x, h = None if a is None else x_RK, None if b is None else h_RL
        ctx.save_for_backward(x, h, a, b, w if ctx.needs_input_grad[0] else None, offsets_E)
        has_base = y_RN is not None or w is not None
        return out_RN if has_base else None, h_RL[:, : a.shape[-2]] if b is None and a is not None else None

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor | None, dh_RL: Tensor | None) -> tuple[Tensor | None, ...]:
        x_RK, h_RL, a, b, w, offsets_E = ctx.saved_tensors
        scale, num_rows, kernel, places = ctx.settings
        rows = dh_RL if dy_RN is None else dy_RN
        assert rows is not None
        dy_RN = None if dy_RN is None else dy_RN.contiguous()
        dh_RL = None if dh_RL is None else _fill(dh_RL, rows, kernel, dim=-1).contiguous()
        a_ELK, b_ELN = _factors(a, b, scale, rows, kernel)
        wants_x, wants_h, wants_a, wants_b = wants = [
            place is not None and wants_gradient(ctx, place) for place in places
        ]
        wants[0] = wants_x = wants_x and (a is not None or w is not None)
        dx, dh, da, db = low_rank_gradients(
            dy_RN, dh_RL, x_RK, h_RL, a_ELK, b_ELN, w, offsets_E, num_rows, wants, kernel_name=kernel
        )
        rank = b.shape[-1] if a is None else a.shape[-2]
        return (
            dx if wants_x else None,
            dh[:, :rank] if wants_h else None,
            da[:, :rank].to(a.dtype) if wants_a else None,
            (db[:, :rank].mT * scale).to(b.dtype) if wants_b else None,
            dy_RN if ctx.needs_input_grad[4] else None,
            *[None] * 5,
        )


def _factors(
    a: Tensor | None, b: Tensor | None, scale: float, rows: Tensor, kernel: Kernel
) -> tuple[Tensor | None, Tensor | None]:
    """A, and B transposed and times `scale`, in the dtype of the rows: with a narrow last dim, products of the backward
    pass take BLAS three times as long.
    """
    a_ELK = None if a is None else _fill(a.to(rows.dtype), rows, kernel, dim=-2)
    b_ELN = None if b is None else _fill((b * scale).to(rows.dtype).mT.contiguous(), rows, kernel, dim=-2)
    return a_ELK, b_ELN


def _fill(narrow: Tensor, rows: Tensor, kernel: Kernel, dim: int) -> Tensor:
    """With zeros up to a rank that `F.grouped_mm` takes, where that multiplies."""
    missing = -narrow.shape[dim] % (_ALIGNMENT_BYTES // rows.element_size())
    if not missing or not _goes_to_kernel(rows, kernel):
        return narrow
    return F.pad(narrow, (0, missing) if dim == -1 else (0, 0, 0, missing))


def _goes_to_kernel(rows: Tensor, kernel: str) -> bool:
    return rows.device.type != "cpu" or kernel == "torch"


# On the CPU


def _experts_of_blocks(rows: Tensor, offsets_E: Tensor, rank: int) -> Tensor | None:
    """Whose each block of rows is, if products with factors are to go by blocks; see `_NARROW`."""
    if rows.dtype == torch.float32 or rank > _NARROW or (offsets_E % _BLOCK_ROWS).any() or not offsets_E[-1]:
        return None
    ends_E = offsets_E // _BLOCK_ROWS
    return torch.searchsorted(ends_E, torch.arange(int(ends_E[-1]), dtype=ends_E.dtype), right=True)


class _Pieces:
    """What is multiplied together at a time: the rows of an expert, and its factors; or blocks of rows, and for each
    those of its expert.

    Attributes:
        mm, addmm: `torch.mm` and `torch.addmm`, or what does the same for many blocks.
    """

    def __init__(self, rows: Tensor, offsets_E: Tensor, rank: int) -> None:
        self.offsets_E = offsets_E
        self.num_rows = int(offsets_E[-1])
        self.experts_b = _experts_of_blocks(rows, offsets_E, rank)
        self.mm: Callable[..., Tensor] = torch.mm if self.experts_b is None else torch.bmm
        self.addmm: Callable[..., Tensor] = torch.addmm if self.experts_b is None else torch.baddbmm

    def of_factors(self, factors_E: Tensor | None) -> Tensor | None:
        """The factors of every piece."""
        return factors_E if factors_E is None or self.experts_b is None else factors_E[self.experts_b]

    def sums(self, addends: Tensor, num_experts: int) -> Tensor:
        """Of every expert, from those of every piece."""
        if self.experts_b is None:
            return addends
        of_expert_Eb = (self.experts_b == torch.arange(num_experts)[:, None]).to(addends.dtype)
        return (of_expert_Eb @ addends.flatten(1)).view(num_experts, *addends.shape[1:])

    def after(
        self,
        x_RA: Tensor | None,
        w_EAB: Tensor | None,
        y_RB: Tensor | None,
        rows: Sequence[Tensor | None],
        factors: Sequence[Tensor | None],
    ) -> Iterator[tuple[Any, ...]]:
        """Write x[r] @ w[e(r)] to y, expert by expert, if there is a w; and yield the piece of each of `rows`, and of
        each of `factors`, as soon as its rows were gone over, so that they are in the cache. None stays None.
        """
        of_expert = list(expert_rows(self.offsets_E))
        if self.experts_b is None:
            sizes = [part.stop - part.start for _, part in of_expert]
            pieces = [None if each is None else each[: self.num_rows].split(sizes) for each in rows]
            pieces += [None if each is None else each.unbind(0) for each in factors]
        else:
            rows = [None if each is None else each[: self.num_rows].unflatten(0, (-1, _BLOCK_ROWS)) for each in rows]
        begin, num_blocks = 0, self.num_rows // _BLOCK_ROWS
        for expert, part in of_expert:
            if w_EAB is not None and x_RA is not None and y_RB is not None and part.start < part.stop:
                torch.mm(x_RA[part], w_EAB[expert], out=y_RB[part])
            if self.experts_b is None:
                yield tuple(None if each is None else each[expert] for each in pieces)
                continue
            # All but the last are of one size, for which a kernel is built once.
            while begin < num_blocks and part.stop // _BLOCK_ROWS >= min(begin + _BLOCKS_AT_ONCE, num_blocks):
                blocks = slice(begin, min(begin + _BLOCKS_AT_ONCE, num_blocks))
                yield tuple(None if each is None else each[blocks] for each in (*rows, *factors))
                begin += _BLOCKS_AT_ONCE


# Operators, so that torch.compile sees shapes and not loops. No argument may be `kernel`, see `grouped_mm`.


@torch.library.custom_op("titanmoe::add_low_rank", mutates_args=())
def add_low_rank(
    x_RK: Tensor,
    h_RL: Tensor | None,
    a_ELK: Tensor | None,
    b_ELN: Tensor | None,
    y_RN: Tensor | None,
    w_ENK: Tensor | None,
    offsets_E: Tensor,
    num_rows: int,
    *,
    kernel_name: str,
) -> tuple[Tensor, Tensor]:
    """y + h b and h, as in the module; empty what is not made here. B is (E, L, N), and y is not given without it."""
    out_RN, made_RL = _unfilled_outputs(x_RK, h_RL, a_ELK, b_ELN, y_RN, w_ENK)
    if _goes_to_kernel(x_RK, kernel_name):
        where = offsets_E, num_rows
        if w_ENK is not None:
            out_RN = rows_times_weights(x_RK, w_ENK, *where, transpose=True, kernel_name=kernel_name)
        if a_ELK is not None:
            made_RL = rows_times_weights(x_RK, a_ELK, *where, transpose=True, kernel_name=kernel_name)
        if b_ELN is not None:
            narrow_RL = made_RL if h_RL is None else h_RL
            addend_RN = rows_times_weights(narrow_RL, b_ELN, *where, transpose=False, kernel_name=kernel_name)
            out_RN = addend_RN.add_(out_RN if y_RN is None else y_RN)
        return out_RN, made_RL
    narrow_RL = made_RL if h_RL is None else h_RL
    pieces = _Pieces(x_RK, offsets_E, narrow_RL.shape[1])
    w_EKN = None if w_ENK is None else w_ENK.mT
    of_factors = [pieces.of_factors(each) for each in (a_ELK, b_ELN)]
    for x, h, y, out, a, b in pieces.after(x_RK, w_EKN, out_RN, (x_RK, narrow_RL, y_RN, out_RN), of_factors):
        if a is not None:
            pieces.mm(x, a.mT, out=h)
        if b is not None:
            pieces.addmm(out if y is None else y, h, b, out=out)
    end = pieces.num_rows
    out_RN[end:] = 0.0 if y_RN is None else y_RN[end:]
    return out_RN, made_RL


@add_low_rank.register_fake
def _unfilled_outputs(
    x_RK: Any, h_RL: Any, a_ELK: Any, b_ELN: Any, y_RN: Any, w_ENK: Any, *settings: Any, **names: Any
) -> tuple[Tensor, Tensor]:
    num_outputs = b_ELN.shape[-1] if b_ELN is not None else 0 if w_ENK is None else w_ENK.shape[1]
    out_RN = x_RK.new_empty(x_RK.shape[0], num_outputs)
    return out_RN, x_RK.new_empty(0) if a_ELK is None else _unfilled_narrow(x_RK, a_ELK.shape[1])


def _unfilled_narrow(rows: Any, rank: int) -> Any:
    """(R, L), column by column in memory where that is faster; see `_FEW_COLUMNS`."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and rank <= _FEW_COLUMNS:
        return rows.new_empty(rank, rows.shape[0]).t()
    return rows.new_empty(rows.shape[0], rank)


@torch.library.custom_op("titanmoe::low_rank_gradients", mutates_args=())
def low_rank_gradients(
    dy_RN: Tensor | None,
    dh_RL: Tensor | None,
    x_RK: Tensor | None,
    h_RL: Tensor | None,
    a_ELK: Tensor | None,
    b_ELN: Tensor | None,
    w_ENK: Tensor | None,
    offsets_E: Tensor,
    num_rows: int,
    wants: Sequence[bool],
    *,
    kernel_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, h, a and b of `add_low_rank`; empty where they are not wanted. That of x is also of `w_ENK`, if given."""
    wants_x, wants_h, wants_a, wants_b = wants
    rows = dh_RL if dy_RN is None else dy_RN
    assert rows is not None
    dx_RK, made_RL, da_ELK, db_ELN = _unfilled_gradients(
        dy_RN, dh_RL, x_RK, h_RL, a_ELK, b_ELN, w_ENK, offsets_E, num_rows, wants
    )
    if _goes_to_kernel(rows, kernel_name):
        where, straight = (offsets_E, num_rows), {"transpose": False, "kernel_name": kernel_name}
        if b_ELN is not None:
            dh_RL = rows_times_weights(dy_RN, b_ELN, *where, transpose=True, kernel_name=kernel_name)
        if wants_x:
            addends = ((dh_RL, a_ELK), (dy_RN, w_ENK))
            first, *second = (rows_times_weights(d, w, *where, **straight) for d, w in addends if w is not None)
            dx_RK = first.add_(*second) if second else first
        if wants_a:
            da_ELK = rows_times_rows(dh_RL, x_RK, offsets_E, kernel_name=kernel_name)
        if wants_b:
            db_ELN = rows_times_rows(h_RL, dy_RN, offsets_E, kernel_name=kernel_name)
        return dx_RK, dh_RL if wants_h and dh_RL is not None else made_RL, da_ELK, db_ELN
    pieces = _Pieces(rows, offsets_E, next(each.shape[1] for each in (a_ELK, b_ELN) if each is not None))
    a_p, b_p = pieces.of_factors(a_ELK), pieces.of_factors(b_ELN)
    da_p = torch.empty_like(a_p) if wants_a and a_p is not None else None
    db_p = torch.empty_like(b_p) if wants_b and b_p is not None else None
    found_RL = made_RL if wants_h or b_ELN is None else _unfilled_narrow(rows, b_ELN.shape[1])
    of_rows = (x_RK, h_RL, dy_RN, dx_RK if wants_x else None, dh_RL, None if b_ELN is None else found_RL)
    w_ENK = w_ENK if wants_x else None
    for x, h, dy, dx, dh, made, a, b, da, db in pieces.after(dy_RN, w_ENK, dx_RK, of_rows, (a_p, b_p, da_p, db_p)):
        if db is not None:
            pieces.mm(h.mT, dy, out=db)
        if b is not None:
            dh = pieces.mm(dy, b.mT, out=made)
        if dx is not None and a is not None:
            pieces.addmm(dx, dh, a, beta=0 if w_ENK is None else 1, out=dx)
        if da is not None:
            pieces.mm(dh.mT, x, out=da)
    if wants_x:
        dx_RK[pieces.num_rows :] = 0.0
    if da_p is not None:
        da_ELK = pieces.sums(da_p, offsets_E.shape[0])
    if db_p is not None:
        db_ELN = pieces.sums(db_p, offsets_E.shape[0])
    return dx_RK, made_RL, da_ELK, db_ELN


@low_rank_gradients.register_fake
def _unfilled_gradients(*args: Any, **names: Any) -> tuple[Tensor, ...]:
    dy_RN, dh_RL, _, _, a_ELK, b_ELN, w_ENK, _, _, wants = args
    rows, wide = dh_RL if dy_RN is None else dy_RN, w_ENK if a_ELK is None else a_ELK
    shapes = (
        (rows.shape[0], wide.shape[-1]) if wants[0] else (0,),
        a_ELK.shape if wants[2] else (0,),
        b_ELN.shape if wants[3] else (0,),
    )
    dx, da, db = (rows.new_empty(shape) for shape in shapes)
    return dx, _unfilled_narrow(rows, b_ELN.shape[1]) if wants[1] else rows.new_empty(0), da, db
