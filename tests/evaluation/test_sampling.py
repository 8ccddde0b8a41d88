"""The next token: its distribution against the definition, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titanmoe.config import ConfigError
from titanmoe.evaluation.sampling import Sampling

PROBABILITIES = [0.08, 0.4, 0.02, 0.3, 0.2]
NUM_DRAWS = 10_000


def frequencies(sampling: Sampling, probabilities: list[float] = PROBABILITIES) -> Tensor:
    """How often each token is chosen when the numbers drawn are spread evenly."""
    uniform_B = (torch.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    logits_BV = torch.tensor(probabilities).log().expand(NUM_DRAWS, -1)
    return sampling.choose(logits_BV, uniform_B).bincount(minlength=len(probabilities)) / NUM_DRAWS


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """By the definition: the smallest set of the most likely tokens with at least `top_p`, made to add up to 1."""
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -float(probabilities[token])):
        if total >= top_p:
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.75, 0.65, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_tokens_are_as_frequent_as_they_should_be(temperature: float, top_p: float) -> None:
    heated = (torch.tensor(PROBABILITIES).log() / temperature).softmax(dim=0)
    found = frequencies(Sampling(temperature, top_p))
    torch.testing.assert_close(found, nucleus(heated, top_p), rtol=0, atol=2e-4)
    assert torch.equal(found == 0, nucleus(heated, top_p) == 0)


def test_temperature_0_takes_the_likeliest() -> None:
    assert frequencies(Sampling(0.0)).tolist() == [0, 1, 0, 0, 0]
    assert frequencies(Sampling(0.0, top_p=0.1)).tolist() == [0, 1, 0, 0, 0]


def test_a_temperature_of_next_to_nothing_is_none() -> None:
    for temperature in (1e-30, 1e-40, 1e-300):
        assert frequencies(Sampling(temperature)).tolist() == [0, 1, 0, 0, 0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert Sampling(1.0).choose(logits_BV, torch.tensor([uniform])).tolist() == [1]


def test_draws_depend_on_seed_and_place_alone() -> None:
    device = torch.device("cpu")
    all_BT = Sampling(seed=1).draws(range(4), 6, device)
    assert torch.equal(Sampling(seed=1).draws([2, 3], 6, device), all_BT[2:])
    assert len({tuple(row.tolist()) for row in all_BT}) == 4
    assert not torch.equal(Sampling(seed=2).draws(range(4), 6, device), all_BT)
    assert ((all_BT >= 0) & (all_BT < 1)).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, float("nan"), float("inf"))),
        ("top_p", (0.0, 1.01, float("nan"))),
        ("seed", (-1, 1 << 32)),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match="was given"):
            Sampling(**{name: value})  # type: ignore[arg-type]
