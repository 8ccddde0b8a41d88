"""Rates at the corners, worked out by hand from torchtitan's formula."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from titanmoe.training.schedule import LearningRate, lr_factor


def factors(num_steps: int, **schedule) -> list[float]:
    return [lr_factor(step, **schedule) for step in range(1, num_steps + 1)]


def test_default_decays_over_all_that_follows_the_warmup() -> None:
    got = factors(12, warmup_steps=2, total_steps=10)
    assert got == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0])


def test_stable_phase() -> None:
    got = factors(10, warmup_steps=4, total_steps=10, decay_ratio=0.3)
    assert got == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_no_warmup_and_no_decay() -> None:
    assert factors(4, warmup_steps=0, total_steps=3, decay_ratio=0.0) == [1, 1, 1, 1]


def test_only_warmup() -> None:
    assert factors(5, warmup_steps=4, total_steps=4) == [1 / 4, 2 / 4, 3 / 4, 1, 1]
    assert factors(3, warmup_steps=100, total_steps=2) == [1 / 2, 1, 1]


def test_decay_gives_way_to_warmup() -> None:
    assert factors(6, warmup_steps=4, total_steps=6, decay_ratio=0.8) == [1 / 4, 2 / 4, 3 / 4, 1, 1, 1 / 2]


def test_one_step() -> None:
    assert factors(1, warmup_steps=0, total_steps=1) == [1]
    assert factors(1, warmup_steps=200, total_steps=1) == [1]


@pytest.mark.parametrize(
    ("decay_type", "half", "three_quarters"),
    [
        ("linear", 1 / 2, 1 / 4),
        ("sqrt", 1 - math.sqrt(1 / 2), 1 - math.sqrt(3 / 4)),
        ("cosine", 1 / 2, (1 - math.sqrt(1 / 2)) / 2),
    ],
)
def test_shapes_of_decay_and_the_floor(decay_type: str, half: float, three_quarters: float) -> None:
    for floor in (0.0, 0.1):
        got = factors(9, warmup_steps=0, total_steps=8, decay_type=decay_type, min_lr_factor=floor)
        assert got[0] == 1
        assert got[4] == pytest.approx(floor + (1 - floor) * half)
        assert got[6] == pytest.approx(floor + (1 - floor) * three_quarters)
        assert got[8] == pytest.approx(floor)


def test_it_is_torchtitans_formula() -> None:
    """Its lambda counts steps from 0 and its stable phase one step more."""

    def theirs(step: int, warmup: int, decay: int, total: int, floor: float) -> float:
        stable_end = warmup + total + 1 - warmup - decay
        if step < warmup:
            return (step + 1) / warmup
        if step < stable_end:
            return 1.0
        return floor + (1 - floor) * (1 - (step + 1 - stable_end) / decay)

    for warmup, decay_ratio, total in [(3, None, 20), (0, 0.25, 16), (5, 0.5, 10), (1, 1.0, 9)]:
        decay = total - warmup if decay_ratio is None else min(round(total * decay_ratio), total - warmup)
        got = factors(total, warmup_steps=warmup, total_steps=total, decay_ratio=decay_ratio, min_lr_factor=0.2)
        assert got == pytest.approx([theirs(step, warmup, decay, total, 0.2) for step in range(total)])


def two_groups(lr: float | torch.Tensor) -> torch.optim.Optimizer:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": lr / 2}], lr=lr)


def test_sets_every_group_and_depends_on_nothing_but_the_step() -> None:
    optimizer = two_groups(0.1)
    rate = LearningRate(optimizer, warmup_steps=4, total_steps=8)
    assert rate.set(7) == pytest.approx(0.1 * 2 / 4)
    assert rate.set(2) == pytest.approx(0.1 / 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.025])


def test_a_loaded_optimizer_does_not_change_the_peak() -> None:
    optimizer = two_groups(0.1)
    rate = LearningRate(optimizer, warmup_steps=2, total_steps=8)
    rate.set(1)
    saved = optimizer.state_dict()
    resumed = two_groups(0.1)
    rate = LearningRate(resumed, warmup_steps=2, total_steps=8)
    resumed.load_state_dict(saved)
    assert rate.set(2) == 0.1


def test_a_tensor_rate_is_changed_in_place() -> None:
    optimizer = two_groups(torch.tensor(0.1))
    tensors = [group["lr"] for group in optimizer.param_groups]
    LearningRate(optimizer, warmup_steps=4, total_steps=8).set(1)
    assert [float(tensor) for tensor in tensors] == pytest.approx([0.025, 0.0125])
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"warmup_steps": 200, "total_steps": 20}, "warmup_steps 200 cut to the 20 steps"),
        ({"warmup_steps": 8, "total_steps": 10, "decay_ratio": 0.5}, "means 5 steps; cut to the 2 that 8"),
        ({"warmup_steps": 5, "total_steps": 10, "decay_ratio": 0.5}, ""),
    ],
)
def test_what_does_not_fit_is_cut_with_one_line(schedule: dict, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="titanmoe"):
        LearningRate(two_groups(0.1), **schedule)
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
