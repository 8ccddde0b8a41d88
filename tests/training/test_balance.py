"""The auxiliary-loss-free update of arXiv 2408.15664."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router
from titanmoe.training.balance import ExpertBalance, collect_expert_counts, update_selection_bias

NUM_EXPERTS = 5


def tiny(*kinds: str, part: Part | None = None) -> Decoder:
    """Layers by kind: "dense", "plain" (experts without a selection bias), "bias"."""
    attention = GroupedQuery(2, 1, 8, Rope(8, 1e4))
    parts = {
        "dense": Dense(8),
        "plain": MoE(NUM_EXPERTS, 2, 8),
        "bias": MoE(NUM_EXPERTS, 2, 8, Router(score="sigmoid", selection_bias=True)),
    }
    layers = tuple(LayerSpec(attention, parts[kind]) for kind in kinds)
    model = materialize(build_model(DecoderSpec(dim=16, vocab_size=31, layers=layers), part=part), "cpu")
    init_weights(model, seed=0)
    return model


def test_counts_are_those_of_all_forwards_since_the_last_call() -> None:
    model = tiny("dense", "plain", "bias")
    tokens = torch.arange(12).view(2, 6)
    model(tokens)
    model(tokens)
    counts = collect_expert_counts(model)
    assert counts.shape == (2, NUM_EXPERTS) and counts.dtype == torch.int64
    assert counts.sum(1).tolist() == [2 * 12 * 2] * 2
    assert collect_expert_counts(model).sum() == 0
    model(tokens)
    assert torch.equal(collect_expert_counts(model) * 2, counts)


def test_a_dense_model_has_no_counts() -> None:
    assert collect_expert_counts(tiny("dense")) is None


def test_update_is_a_centred_sign_step() -> None:
    model = tiny("bias", "plain", "bias")
    first, plain, second = (layer.router for _, layer in model.moe_layers())
    second.expert_bias += 1.0
    counts = torch.tensor([[0, 10, 20, 30, 40], [1, 2, 3, 4, 5], [100, 1, 1, 1, 2]])
    update_selection_bias(model, counts, 0.01)
    assert first.expert_bias.tolist() == pytest.approx([0.01, 0.01, 0, -0.01, -0.01], abs=1e-9)
    # signs -1 +1 +1 +1 +1 have mean 3/5
    assert second.expert_bias.tolist() == pytest.approx([1 - 0.016] + [1 + 0.004] * 4)
    assert plain.expert_bias is None


def test_no_rate_or_no_token_changes_nothing() -> None:
    model = tiny("bias")
    update_selection_bias(model, torch.tensor([[1, 2, 3, 4, 5]]), 0.0)
    update_selection_bias(model, torch.zeros(1, NUM_EXPERTS, dtype=torch.int64), 0.1)
    assert not model.moe_layers()[0][1].router.expert_bias.any()


def test_it_evens_out_a_skewed_router() -> None:
    model = tiny("bias")
    router = model.moe_layers()[0][1].router
    with torch.no_grad():
        router.expert_bias += torch.tensor([0.5, 0.2, 0, -0.2, -0.5])
    tokens = torch.arange(30).view(1, 30)
    spread = []
    for _ in range(200):
        with torch.no_grad():
            model(tokens)
        counts = collect_expert_counts(model)
        spread.append(int(counts.max() - counts.min()))
        update_selection_bias(model, counts, 0.004)
    assert spread[0] == 30 and max(spread[-5:]) <= 12
    assert abs(float(router.expert_bias.sum())) < 1e-5


def _two_windows(rate: float) -> list[list[list[int]]]:
    """Steps 1 to 3, of which 2 and 3 are logged; rank r sends 1 + r tokens to expert (step) and none elsewhere."""
    model = tiny("bias")
    router = model.moe_layers()[0][1].router
    balance = ExpertBalance(model, rate)
    logged = []
    for step in (1, 2, 3):
        router.num_tokens_per_expert_E[step] += 1 + dist.get_rank()
        counts = balance.step(is_logged=step > 1)
        logged.append([count[0].tolist() for count in counts] if counts else [])
    return [*logged, [(router.expert_bias / max(rate, 1e-9)).round().int().tolist()]]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_window_is_all_that_came_since_the_last_log_over_all_ranks(rate: float) -> None:
    first, second, third, bias = run_ranks(_two_windows, 2, rate)[0]
    assert first == []
    assert second == [[0, 0, 3, 0, 0], [0, 3, 3, 0, 0]]  # this step, and with the one before
    assert third == [[0, 0, 0, 3, 0], [0, 0, 0, 3, 0]]
    # Each step lowers one expert by 1.6 and raises the others by 0.4, after centring.
    assert bias == [[0] * 5 if rate == 0 else [1, -1, -1, -1, 1]]


def test_a_dense_model_has_no_balance() -> None:
    assert ExpertBalance(tiny("dense"), 0.1).step(is_logged=True) is None


def _in_a_pipeline(rate: float) -> tuple[list[list[int]], list[float]]:
    """Rank 0 has a dense layer only, rank 1 the second layer with experts, rank 2 the first one and the last."""
    layers = [(0,), (2,), (1, 3)][dist.get_rank()]
    model = tiny("dense", "bias", "bias", "plain", part=Part(layers, embeds=False, projects=False))
    for index, layer in model.moe_layers():
        layer.router.num_tokens_per_expert_E[int(index)] += 10
    balance = ExpertBalance(model, rate)
    assert balance.step(is_logged=False) is None
    counts = balance.step(is_logged=True)
    assert counts is not None
    biases = [layer.router.expert_bias for _, layer in model.moe_layers() if layer.router.expert_bias is not None]
    return counts[1].tolist(), [float(bias_E.argmin()) for bias_E in biases]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_ranks_with_other_layers_or_without_experts_take_part(rate: float) -> None:
    results = run_ranks(_in_a_pipeline, 3, rate)
    for counts, lowered in results:
        assert counts == [[10 if expert == row + 1 else 0 for expert in range(NUM_EXPERTS)] for row in range(3)]
        assert rate == 0 or lowered in ([], [2.0], [1.0])
    if rate:
        assert [lowered for _, lowered in results] == [[], [2.0], [1.0]]
