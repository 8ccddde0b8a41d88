"""How evenly the routed experts are used, from the number of tokens each got.

Shape suffixes: L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_summary(counts_LE: Tensor, window_LE: Tensor | None = None) -> dict[str, Tensor]:
    """Scalars on the device of `counts_LE`, to be packed with the step's others and read in one transfer.

    Args:
        counts_LE: tokens that each expert of each layer got in this step, summed over all ranks.
        window_LE: the same summed over all steps since the last log, for dead experts; `counts_LE` if not given.

    Returns:
        Float32 scalars. With mean the average over a layer's experts:
        `expert_load_cv`, `expert_load_cv_worst`: standard deviation / mean, averaged over layers and of the worst
        layer; 0 is even, sqrt(E/K - 1) is all tokens to the same K experts.
        `expert_load_max_mean`, `expert_load_max_mean_worst`: most loaded expert / mean, likewise; 1 is even.
        `dead_experts`, `dead_experts_worst`: experts without a token in the window, of all layers and of the worst.
        A layer that saw no token at all has a cv and max/mean of 0, and only dead experts.
    """
    assert counts_LE.ndim == 2, f"counts are (layers, experts), got {tuple(counts_LE.shape)}"
    load_LE = counts_LE.to(torch.float32)
    # Counts are integers, so a mean below 1/E is a mean of zero.
    mean_L = load_LE.mean(dim=1).clamp_min(1.0 / load_LE.shape[1])
    cv_L = load_LE.std(dim=1, correction=0) / mean_L
    max_mean_L = load_LE.amax(dim=1) / mean_L
    dead_L = ((counts_LE if window_LE is None else window_LE) == 0).sum(dim=1).to(torch.float32)
    return {
        "expert_load_cv": cv_L.mean(),
        "expert_load_cv_worst": cv_L.amax(),
        "expert_load_max_mean": max_mean_L.mean(),
        "expert_load_max_mean_worst": max_mean_L.amax(),
        "dead_experts": dead_L.sum(),
        "dead_experts_worst": dead_L.amax(),
    }
