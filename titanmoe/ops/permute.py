"""Moving tokens to their experts and back.

Shape suffixes: T tokens, D model dim, K experts per token, S = T * K slots, R routed rows (S and padding), E experts.

Each token has exactly K rows, so both directions are gathers and none needs atomics: results do not depend on the
order in which threads run. `combine` sums in float32 whatever the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Which routed row comes from which slot, sorted by expert; ties keep the order of tokens.

    Slot t * K + k is the k-th choice of token t. With an alignment, each expert's rows are followed by padding up to a
    multiple of it: rows of no slot, which hold some token's values and have weight zero. With that they are zero after
    the activation, and so is the gradient before it: weight gradients, which sum over rows, do not see them.

    There may be more rows than experts have: a tail of padding, so that their number need not be asked of the device.
    """

    slot_R: Tensor
    """int64: the slot in each row; 0 in padding."""
    token_R: Tensor
    """int64: the token in each row."""
    row_TK: Tensor
    """int64, the inverse: the row in which slot (t, k) lies."""
    offsets_E: Tensor
    """int32: the end of each expert's rows, padding included."""
    is_padding_R: Tensor | None = None
    """bool: the rows of no slot, if there may be any."""
    is_identity: bool = False
    """Every slot is where it was, so that nothing need be moved. With K = 1 and no padding."""


class Copies(NamedTuple):
    """Tokens of which all routed rows of experts are copies, and where these are: see `Permutation`.

    Attributes:
        experts_TK: int64, the experts of each token.
    """

    x_TD: Tensor
    experts_TK: Tensor
    slot_R: Tensor
    row_TK: Tensor


def sort_by_expert(experts_TK: Tensor, num_experts: int, align: int = 1, waits: bool | None = None) -> Permutation:
    """Order the slots of `experts_TK` (int64) by expert.

    Args:
        num_experts: fewer than 2 ** 15.
        align: pad each expert's rows to a multiple of this.
        waits: whether to ask the device for the number of rows, if there is padding; else there is a tail. By default
            only on the CPU, where it is known, and not where it would end what is compiled at once.
    """
    device, top_k = experts_TK.device, experts_TK.shape[1]
    # Narrow keys: a radix sort takes a pass, or less, for each of their bytes.
    sorted_S, slot_S = torch.sort(experts_TK.reshape(-1).to(torch.int16), stable=True)
    row_S = torch.arange(slot_S.shape[0], device=device)
    experts_E = torch.arange(num_experts, dtype=torch.int16, device=device)
    ends_E = torch.searchsorted(sorted_S, experts_E, right=True, out_int32=True)
    slot_R, is_padding_R = slot_S, None
    if align > 1:
        shift_E, ends_E = _padded(ends_E, align)
        row_S = row_S + shift_E.index_select(0, sorted_S.int())
        slot_R, is_padding_R = _slots(row_S, slot_S, ends_E, align, waits)
    row_TK = torch.empty_like(slot_S).scatter_(0, slot_S, row_S).view_as(experts_TK)
    return Permutation(slot_R, slot_R if top_k == 1 else slot_R // top_k, row_TK, ends_E, is_padding_R)


def regroup_by_expert(num_rows_GE: Tensor, num_rows: int, align: int = 1, waits: bool | None = None) -> Permutation:
    """Order the rows of several groups, each of which is sorted by expert, by expert. Each row is a token of its own.

    The same as `sort_by_expert`, from the numbers of rows alone.

    Args:
        num_rows_GE: int64, how many rows of each group are for each expert.
        num_rows: their sum, known on the host.
        align, waits: as in `sort_by_expert`.
    """
    num_groups, num_experts = num_rows_GE.shape
    is_identity = num_experts == 1 and align == 1
    ends_EG = num_rows_GE.t().reshape(-1).cumsum(0).view(num_experts, num_groups)
    # A block moves from where it ends among the groups to where it ends among the experts.
    shift_GE = ends_EG.t() - num_rows_GE.view(-1).cumsum(0).view_as(num_rows_GE)
    ends_E = ends_EG[:, -1].int()
    if align > 1:
        shift_E, ends_E = _padded(ends_E, align)
        shift_GE = shift_GE + shift_E
    slot_S = torch.arange(num_rows, device=num_rows_GE.device)
    row_S = slot_S + shift_GE.reshape(-1).repeat_interleave(num_rows_GE.view(-1), output_size=num_rows)
    if align > 1:
        slot_R, is_padding_R = _slots(row_S, slot_S, ends_E, align, waits)
    else:
        slot_R, is_padding_R = torch.empty_like(row_S).scatter_(0, row_S, slot_S), None
    return Permutation(slot_R, slot_R, row_S[:, None], ends_E, is_padding_R, is_identity)


def _padded(ends_E: Tensor, align: int) -> tuple[Tensor, Tensor]:
    """How far padding moves each expert's rows, and where it ends."""
    padding_E = -torch.diff(ends_E, prepend=ends_E.new_zeros(1)) % align
    shift_E = padding_E.cumsum(0, dtype=torch.int32)
    return shift_E - padding_E, ends_E + shift_E


def _slots(row_S: Tensor, slot_S: Tensor, ends_E: Tensor, align: int, waits: bool | None) -> tuple[Tensor, Tensor]:
    """`slot_R` and `is_padding_R`, where slot `slot_S[s]` lies in row `row_S[s]`."""
    if waits or (waits is None and ends_E.device.type == "cpu" and not torch.compiler.is_compiling()):
        num_rows = int(ends_E[-1])
    else:
        num_slots = slot_S.shape[0]
        most = num_slots + min(num_slots, ends_E.shape[0]) * (align - 1)  # an expert without rows has no padding
        num_rows = most - most % align
    slot_R = slot_S.new_zeros(num_rows).scatter_(0, row_S, slot_S)
    is_padding_R = torch.ones(num_rows, dtype=torch.bool, device=slot_S.device)
    return slot_R, is_padding_R.index_fill_(0, row_S, False)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """x_RD: a copy of its token for every routed row. Bytes: T D read, R D written."""
    if permutation.is_identity:
        return x_TD
    return _Permute.apply(x_TD, permutation.token_R, permutation.row_TK)


def combine(y_RD: Tensor, permutation: Permutation) -> Tensor:
    """y_TD: the sum of every token's K rows. Bytes: R D read, T D written."""
    if permutation.is_identity:
        return y_RD
    return _Combine.apply(y_RD, permutation.token_R, permutation.row_TK)


def permute_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """weights_R: each slot's weight beside its row; zero in padding."""
    if permutation.is_identity:
        return weights_TK[:, 0]
    return _PermuteWeights.apply(weights_TK, permutation.slot_R, permutation.row_TK, permutation.is_padding_R)


def rows_of_experts(h_TX: Tensor, num_experts: int, copies: Copies) -> Tensor:
    """h_RL: of the features that a token has for each expert, X = E L, those for the expert of the row."""
    h_TEL = h_TX.unflatten(1, (num_experts, -1))
    h_TKL = h_TEL.gather(1, _own_features(copies.experts_TK, h_TEL.shape[2]))
    h_RL: Tensor = _Permute.apply(h_TKL.flatten(0, 1), copies.slot_R, copies.row_TK.reshape(-1, 1))
    return h_RL


def tokens_of_experts(h_RL: Tensor, num_experts: int, copies: Copies) -> Tensor:
    """h_TX, the inverse: zero for experts that are not the token's. Rows that are padding do not count."""
    h_SL: Tensor = _Combine.apply(h_RL, copies.slot_R, copies.row_TK.reshape(-1, 1))
    h_TKL = h_SL.view(*copies.row_TK.shape, -1)
    zeros_TEL = h_RL.new_zeros(h_TKL.shape[0], num_experts, h_TKL.shape[2])
    return zeros_TEL.scatter(1, _own_features(copies.experts_TK, h_TKL.shape[2]), h_TKL).flatten(1)


def _own_features(experts_TK: Tensor, num_features: int) -> Tensor:
    return experts_TK.unsqueeze(2).expand(-1, -1, num_features)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, dx_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(dx_RD, row_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum_rows(y_RD, row_TK)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, token_R), None, None


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, slot_R: Tensor, row_TK: Tensor, is_padding_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_TK)
        weights_R = weights_TK.reshape(-1).index_select(0, slot_R)
        # Not in place: torch 2.11 loses the gradient then if it compiles this.
        return weights_R if is_padding_R is None else weights_R.masked_fill(is_padding_R, 0.0)

    @staticmethod
    def backward(ctx: Any, dweights_R: Tensor) -> tuple[Tensor, None, None, None]:
        (row_TK,) = ctx.saved_tensors
        return dweights_R[row_TK], None, None, None


def _sum_rows(y_RD: Tensor, row_TK: Tensor) -> Tensor:
    """out[t] = sum over k of y[row[t, k]]: the embedding-bag kernel, which accumulates in float32."""
    if row_TK.shape[1] == 1:
        return y_RD.index_select(0, row_TK[:, 0])
    # Detached, or the kernel also notes what only its own backward wants.
    return F.embedding_bag(row_TK, y_RD.detach().contiguous(), mode="sum")
