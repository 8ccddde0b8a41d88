"""The router: which experts a token goes to, and with what weight.

Shape suffixes: B batch, S sequence, T = B * S tokens, D model dim, E experts, K experts per token,
G groups of experts.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.spec import MoE
from titanmoe.ops.sharding import local_tensor


class SequenceParts(Protocol):
    """The processes that each see one of equal parts of every sequence."""

    count: int

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all parts, outside autograd. Collective."""


class Router(nn.Module):
    """Scores in float32, top-k, weights.

    The choice is made by `aten.topk` alone, so that activation checkpointing can save it: a recomputed forward sends
    every token where the first one did.

    Attributes:
        num_tokens_per_expert_E: int64, how many (token, k) pairs chose each expert since it was last zeroed.
            `record()` adds the last forward's counts; the training loop reads and zeroes it once per step.
        aux_loss_weight: what the classic balance loss of one sequence is multiplied with; 0 turns it off.
        sequence_parts: set where each process sees a part of every sequence.
        force_balance: choose experts round-robin whatever the scores (for benchmarks).
    """

    num_tokens_per_expert_E: Tensor
    expert_bias: Tensor | None

    def __init__(self, dim: int, spec: MoE) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(dim, spec.num_experts, bias=spec.router.gate_bias)
        bias_E = torch.zeros(spec.num_experts, dtype=torch.float32) if spec.router.selection_bias else None
        counts_E = torch.zeros(spec.num_experts, dtype=torch.int64)
        self.register_buffer("expert_bias", bias_E)
        self.register_buffer("num_tokens_per_expert_E", counts_E, persistent=False)
        self.aux_loss_weight = 0.0
        self.force_balance = False
        self.sequence_parts: SequenceParts | None = None
        self._last_counts_E: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights_TK (float32) and experts_TK (int64)."""
        num_experts, router = self.spec.num_experts, self.spec.router
        bias_E = None if self.gate.bias is None else local_tensor(self.gate.bias).float()
        logits_TE = F.linear(x_BSD.flatten(0, 1).float(), local_tensor(self.gate.weight).float(), bias_E)
        scores_TE = logits_TE.softmax(dim=-1) if router.score == "softmax" else logits_TE.sigmoid()
        experts_TK = self.choose(scores_TE.detach())
        weights_TK = scores_TE.gather(1, experts_TK)
        if router.normalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * router.scale
        if self.training:
            ones = torch.ones(1, dtype=torch.int64, device=experts_TK.device).expand(experts_TK.numel())
            counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_TK.device)
            self._last_counts_E = counts_E.scatter_add_(0, experts_TK.flatten(), ones)
            if self.aux_loss_weight:
                loss = balance_loss(scores_TE, experts_TK, num_sequences=x_BSD.shape[0], parts=self.sequence_parts)
                weights_TK = _AddLoss.apply(weights_TK, loss * self.aux_loss_weight)
        return weights_TK, experts_TK

    @torch.no_grad()
    def choose(self, scores_TE: Tensor) -> Tensor:
        """experts_TK."""
        num_tokens, num_experts = scores_TE.shape
        if self.force_balance:
            slots = torch.arange(num_tokens * self.spec.top_k, device=scores_TE.device)
            return (slots % num_experts).view(num_tokens, self.spec.top_k)
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        if self.spec.router.top_groups < self.spec.router.num_groups:
            scores_TE = self._within_best_groups(scores_TE)
        return torch.topk(scores_TE, self.spec.top_k, dim=-1, sorted=False).indices

    def _within_best_groups(self, scores_TE: Tensor) -> Tensor:
        """Scores with those of experts outside a token's best groups at -inf (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""
        router = self.spec.router
        scores_TGE = scores_TE.unflatten(1, (router.num_groups, -1))
        of_group_TG = scores_TGE.topk(2 if router.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
        best_TG = of_group_TG.topk(router.top_groups, dim=-1, sorted=False).indices
        is_outside_TG = torch.ones_like(of_group_TG, dtype=torch.bool).scatter_(1, best_TG, False)
        return scores_TGE.masked_fill(is_outside_TG[..., None], float("-inf")).flatten(1)

    def record(self) -> None:
        """Add the last forward's counts. Called outside what is recomputed, so that nothing is counted twice."""
        if self._last_counts_E is not None:
            self.num_tokens_per_expert_E += self._last_counts_E
            self._last_counts_E = None


def balance_loss(
    scores_TE: Tensor, experts_TK: Tensor, num_sequences: int, parts: SequenceParts | None = None
) -> Tensor:
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4), per sequence and summed over sequences.

    For one sequence: E * sum over e of f_e P_e, with f_e the fraction of its choices that fell on e, and P_e the mean
    over its tokens of the (normalised) score of e. It is 1 when perfectly even. Taken per sequence (as in DeepSeek-V3,
    arXiv 2412.19437, eq. 17) it does not depend on how a global batch is cut into microbatches and ranks. Where
    sequences themselves are cut, this is the part's share of the loss: the shares add up to it.
    """
    num_experts = scores_TE.shape[-1]
    shares_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    share_BE = shares_TE.view(num_sequences, -1, num_experts).mean(dim=1)
    choices_BC = experts_TK.view(num_sequences, -1)
    unit = share_BE.new_full((1, 1), 1.0 / choices_BC.shape[1]).expand(choices_BC.shape)
    fraction_BE = torch.zeros_like(share_BE).scatter_add_(1, choices_BC, unit)
    if parts is not None:
        fraction_BE, share_BE = parts.mean(fraction_BE), share_BE / parts.count
    return num_experts * (fraction_BE * share_BE).sum()


class _AddLoss(torch.autograd.Function):
    """Pass a tensor through, and give a loss term gradient 1: it then acts as if it were added to the final loss.

    This keeps the term inside the layer, where recomputation, sharding and pipelining need not know of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        return dx, dx.new_ones(())
