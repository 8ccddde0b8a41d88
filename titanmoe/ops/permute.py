"""Moving tokens to their experts and back.

Shape suffixes: T tokens, D model dim, K experts per token, R = T * K routed rows, E experts.

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
    """Which routed row comes from which (token, k), sorted by expert; ties keep the order of tokens."""

    slot_R: Tensor
    """int64: row r holds slot t * K + k."""
    row_TK: Tensor
    """int64, the inverse: slot (t, k) lies in this row."""
    offsets_E: Tensor
    """int32: the end of each expert's rows."""

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.row_TK.shape[1]

    def num_tokens_per_expert_E(self) -> Tensor:
        return torch.diff(self.offsets_E, prepend=self.offsets_E.new_zeros(1)).long()


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> Permutation:
    """Order the slots of `experts_TK` (int64) by expert. No host synchronisation."""
    sorted_R, slot_R = torch.sort(experts_TK.reshape(-1), stable=True)
    row_R = torch.empty_like(slot_R)
    row_R[slot_R] = torch.arange(slot_R.shape[0], device=slot_R.device)
    experts_E = torch.arange(num_experts, device=sorted_R.device)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    return Permutation(slot_R, row_R.view_as(experts_TK), offsets_E)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """x_RD: a copy of its token for every routed row. Bytes: T D read, R D written."""
    return _Permute.apply(x_TD, permutation.token_R, permutation.row_TK)


def combine(y_RD: Tensor, permutation: Permutation) -> Tensor:
    """y_TD: the sum of every token's K rows. Bytes: R D read, T D written."""
    return _Combine.apply(y_RD, permutation.token_R, permutation.row_TK)


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
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum_rows(y_RD, row_TK)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, token_R), None, None


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
