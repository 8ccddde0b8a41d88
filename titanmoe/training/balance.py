"""Load balancing of experts without an auxiliary loss (Wang et al., arXiv 2408.15664).

A router that chooses by score + bias is steered by its bias: after each update, experts that got fewer tokens than
the mean are raised by a fixed rate and the others lowered.

Shapes: L layers with experts, of the whole model; E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import MoE


class ExpertBalance:
    """The tokens of every expert, step by step: moves the selection biases and remembers what the metrics want.

    Args:
        model: may be a part of one, as in a pipeline, even without experts where other parts have some.
        rate: see `update_selection_bias`; 0 leaves the biases alone.
        device: where the model runs.
    """

    def __init__(self, model: Decoder, rate: float, device: torch.device | str = "cpu") -> None:
        self._model, self._rate, self._device = model, rate, device
        self._window_LE: Tensor | None = None  # since the last logged step, on this rank

    def step(self, is_logged: bool) -> tuple[Tensor, Tensor] | None:
        """To be called once after each update, on all ranks.

        Costs one all-reduce if the step is logged or biases move, else nothing; no device is waited for.

        Returns:
            For a logged step, (L, E) counts over all ranks: of this step, and of all steps since the last logged one.
            None otherwise, and for a model without experts.
        """
        counts_LE = collect_expert_counts(self._model, self._device)
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
def collect_expert_counts(model: Decoder, device: torch.device | str = "cpu") -> Tensor | None:
    """Tokens that each expert got on this rank since the last call; the routers' counters are zeroed.

    Returns:
        (L, E) int64 on `device`: one tensor, so that one all-reduce sums all layers over all ranks. Rows of layers that
        are not in this part of the model are zero. None for a model without experts.
    """
    rows = _rows(model)
    if not rows:
        return None
    sizes = {layer.feed_forward.num_experts for layer in model.spec.layers if isinstance(layer.feed_forward, MoE)}
    assert len(sizes) == 1, "all MoE layers must have the same number of experts"
    counts_LE = torch.zeros(len(rows), *sizes, dtype=torch.int64, device=device)
    for index, layer in model.moe_layers():
        counts_LE[rows[index]] = layer.router.num_tokens_per_expert_E
        layer.router.num_tokens_per_expert_E.zero_()
    return counts_LE


def _rows(model: Decoder) -> dict[str, int]:
    """The row of every layer with experts."""
    layers = [str(index) for index, layer in enumerate(model.spec.layers) if isinstance(layer.feed_forward, MoE)]
    return {index: row for row, index in enumerate(layers)}


@torch.no_grad()
def update_selection_bias(model: Decoder, counts_LE: Tensor, rate: float) -> None:
    """Move each router's selection bias: `delta = rate * sign(mean - count)`, then `bias += delta - mean(delta)`.

    The delta is centred, so that the biases of a layer cannot drift together. Routers without a selection bias are
    left alone, and so are layers that saw no token. A rate of 0 changes nothing.

    Args:
        counts_LE: `collect_expert_counts` summed over all ranks; equal on all of them, so the biases stay equal.
        rate: step of the bias, in units of the router's score; the paper uses 0.001.
    """
    if rate == 0:
        return
    counts_LE = counts_LE.double()
    delta_LE = rate * torch.sign(counts_LE.mean(1, keepdim=True) - counts_LE)
    delta_LE = (delta_LE - delta_LE.mean(1, keepdim=True)).float()
    rows = _rows(model)
    for index, layer in model.moe_layers():
        if layer.router.expert_bias is not None:
            layer.router.expert_bias += delta_LE[rows[index]]
