"""Moving tokens to their experts and back.

Shape suffixes: T tokens, D model dim, K experts per token, S = T * K slots, R routed rows (S and padding), E experts,
P rows of padding.

Each token has exactly K rows, so both directions are gathers and none needs atomics: results do not depend on the
order in which threads run. `combine` sums in float32 whatever the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Which routed row comes from which slot, sorted by expert; ties keep the order of tokens.

    Slot t * K + k is the k-th choice of token t. With an alignment, each expert's rows are followed by padding up to a
    multiple of it: rows of no slot, which hold some token's values going in, and zero gradients coming back.
    """

    slot_R: Tensor
    """int64: the slot in each row; 0 in padding."""
    row_TK: Tensor
    """int64, the inverse: the row in which slot (t, k) lies."""
    offsets_E: Tensor
    """int32: the end of each expert's rows, padding included."""
    padding_P: Tensor | None = None
    """int64: the rows that are padding, if there may be any."""

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.row_TK.shape[1]


def sort_by_expert(experts_TK: Tensor, num_experts: int, align: int = 1) -> Permutation:
    """Order the slots of `experts_TK` (int64) by expert.

    Args:
        align: pad each expert's rows to a multiple of this. With 1 nothing waits for the device.
    """
    device = experts_TK.device
    sorted_S, slot_S = torch.sort(experts_TK.reshape(-1), stable=True)
    row_S = torch.arange(slot_S.shape[0], device=device)
    ends_E = torch.searchsorted(sorted_S, torch.arange(num_experts, device=device), right=True)
    slot_R, padding_P = slot_S, None
    if align > 1:
        padding_E = -torch.diff(ends_E, prepend=ends_E.new_zeros(1)) % align
        shift_E = padding_E.cumsum(0)
        row_S, ends_E = row_S + (shift_E - padding_E)[sorted_S], ends_E + shift_E
        num_rows = int(ends_E[-1])
        slot_R = torch.zeros(num_rows, dtype=torch.int64, device=device).index_copy_(0, row_S, slot_S)
        is_padding_R = torch.ones(num_rows, dtype=torch.bool, device=device).index_fill_(0, row_S, False)
        padding_P = is_padding_R.nonzero()[:, 0]
    row_TK = torch.empty_like(slot_S).index_copy_(0, slot_S, row_S).view_as(experts_TK)
    return Permutation(slot_R, row_TK, ends_E.int(), padding_P)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """x_RD: a copy of its token for every routed row. Bytes: T D read, R D written."""
    return _Permute.apply(x_TD, permutation.token_R, permutation.row_TK)


def combine(y_RD: Tensor, permutation: Permutation) -> Tensor:
    """y_TD: the sum of every token's K rows. Bytes: R D read, T D written."""
    return _Combine.apply(y_RD, permutation.token_R, permutation.row_TK, permutation.padding_P)


def permute_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """weights_R: each slot's weight beside its row."""
    return _PermuteWeights.apply(weights_TK, permutation.slot_R, permutation.row_TK)


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
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, row_TK: Tensor, padding_P: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_R, padding_P)
        return _sum_rows(y_RD, row_TK)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None, None]:
        token_R, padding_P = ctx.saved_tensors
        dy_RD = dy_TD.index_select(0, token_R)
        if padding_P is not None:
            dy_RD.index_fill_(0, padding_P, 0.0)  # so that weight gradients, which sum over rows, do not see it
        return dy_RD, None, None, None


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return weights_TK.reshape(-1).index_select(0, slot_R)

    @staticmethod
    def backward(ctx: Any, dweights_R: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return dweights_R[row_TK], None, None


def _sum_rows(y_RD: Tensor, row_TK: Tensor) -> Tensor:
    """out[t] = sum over k of y[row[t, k]]: the embedding-bag kernel, which accumulates in float32."""
    return F.embedding_bag(row_TK, y_RD.contiguous(), mode="sum")
