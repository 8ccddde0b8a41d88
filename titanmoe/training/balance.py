"""Load balancing of experts without an auxiliary loss (Wang et al., arXiv 2408.15664).

A router that chooses by score + bias is steered by its bias: after each update, experts that got fewer tokens than
the mean are raised by a fixed rate and the others lowered.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from titanmoe.models.decoder import Decoder


class ExpertBalance:
    """The tokens of every expert, step by step: moves the selection biases and remembers what the metrics want.

    Args:
        rate: see `update_selection_bias`; 0 leaves the biases alone.
    """

    def __init__(self, model: Decoder, rate: float) -> None:
        self._model, self._rate = model, rate
        self._window_LE: Tensor | None = None  # since the last logged step, on this rank

    def step(self, is_logged: bool) -> tuple[Tensor, Tensor] | None:
        """To be called once after each update, on all ranks.

        Costs one all-reduce if the step is logged or biases move, else nothing; no device is waited for.

        Returns:
            For a logged step, (L, E) counts over all ranks: of this step, and of all steps since the last logged one.
            None otherwise, and for a model without experts.
        """
        counts_LE = collect_expert_counts(self._model)
        if counts_LE is None:
            return None
        self._window_LE = counts_LE if self._window_LE is None else self._window_LE + counts_LE
        if not is_logged and self._rate == 0:
            return None
        both_2LE = torch.stack([counts_LE, self._window_LE])
        dist.all_reduce(both_2LE)
        update_selection_bias(self._model, both_2LE[0], self._rate)
        if not is_logged:
            return None
        self._window_LE = None
        return both_2LE[0], both_2LE[1]


@torch.no_grad()
def collect_expert_counts(model: Decoder) -> Tensor | None:
    """Tokens that each expert got on this rank since the last call; the routers' counters are zeroed.

    Returns:
        (L, E) int64 in the order of `model.moe_layers()`, on the model's device: one tensor, so that one all-reduce
        sums all layers over the data ranks. None for a model without experts.
    """
    counters = [layer.router.num_tokens_per_expert_E for _, layer in model.moe_layers()]
    if not counters:
        return None
    assert len({counter.shape for counter in counters}) == 1, "all MoE layers must have the same number of experts"
    counts_LE = torch.stack(counters)
    for counter in counters:
        counter.zero_()
    return counts_LE


@torch.no_grad()
def update_selection_bias(model: Decoder, counts_LE: Tensor, rate: float) -> None:
    """Move each router's selection bias: `delta = rate * sign(mean - count)`, then `bias += delta - mean(delta)`.

    The delta is centred, so that the biases of a layer cannot drift together. Routers without a selection bias are
    left alone, and so are layers that saw no token. A rate of 0 changes nothing.

    Args:
        counts_LE: `collect_expert_counts` summed over the data ranks; equal on all ranks, so the biases stay equal.
        rate: step of the bias, in units of the router's score; the paper uses 0.001.
    """
    if rate == 0:
        return
    counts_LE = counts_LE.double()
    delta_LE = rate * torch.sign(counts_LE.mean(1, keepdim=True) - counts_LE)
    delta_LE = (delta_LE - delta_LE.mean(1, keepdim=True)).float()
    for (_, layer), delta_E in zip(model.moe_layers(), delta_LE, strict=True):
        if layer.router.expert_bias is not None:
            layer.router.expert_bias += delta_E
