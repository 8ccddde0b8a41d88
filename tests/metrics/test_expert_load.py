from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from titanmoe.metrics.expert_load import load_summary


def values(counts, window=None):
    window = None if window is None else torch.tensor(window)
    return {key: tensor.item() for key, tensor in load_summary(torch.tensor(counts), window).items()}


def test_agrees_with_numpy():
    counts = np.random.default_rng(0).integers(0, 50, (5, 16))
    counts[2, 3:7] = 0
    found = values(counts.tolist())
    cv = counts.std(axis=1) / counts.mean(axis=1)
    most = counts.max(axis=1) / counts.mean(axis=1)
    dead = (counts == 0).sum(axis=1)
    expected = {
        "expert_load_cv": cv.mean(),
        "expert_load_cv_worst": cv.max(),
        "expert_load_max_mean": most.mean(),
        "expert_load_max_mean_worst": most.max(),
        "dead_experts": dead.sum(),
        "dead_experts_worst": dead.max(),
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_even_and_collapsed_routing():
    even = values([[7, 7, 7, 7]])
    assert even["expert_load_cv"] == 0 and even["expert_load_max_mean"] == 1 and even["dead_experts"] == 0
    # All tokens to the same 2 of 8 experts: sqrt(E/K - 1).
    collapsed = values([[9, 9, 0, 0, 0, 0, 0, 0]])
    assert collapsed["expert_load_cv"] == pytest.approx(math.sqrt(3))
    assert collapsed["expert_load_max_mean"] == 4 and collapsed["dead_experts"] == 6


def test_dead_experts_are_those_of_the_window():
    found = values([[5, 0, 0, 5]], window=[[50, 1, 0, 60]])
    assert found["dead_experts"] == 1
    assert found["expert_load_max_mean"] == 2


def test_a_layer_without_tokens_is_finite():
    found = values([[0, 0, 0], [3, 3, 3]])
    assert found["expert_load_cv"] == 0 and found["dead_experts"] == 3 and found["dead_experts_worst"] == 3
    assert all(math.isfinite(value) for value in found.values())


def test_scalars_pack_into_one_tensor():
    summary = load_summary(torch.ones(3, 4, dtype=torch.int64))
    packed = torch.stack(list(summary.values()))
    assert packed.dtype == torch.float32 and packed.shape == (6,)
