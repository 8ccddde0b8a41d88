"""Learning rate schedules: warm-up, stable, decay (torchtitan's `lr_scheduler` section).

The rate is a function of the step alone, so there is nothing to save and a resumed run has exactly the rates of one
that was never stopped.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Literal

import torch
from torch.optim import Optimizer

logger = logging.getLogger("titanmoe")

DecayType = Literal["linear", "sqrt", "cosine"]


def phase_lengths(warmup_steps: int, total_steps: int, decay_ratio: float | None) -> tuple[int, int]:
    """Steps of warm-up and of decay that fit into `total_steps`: warm-up goes first, decay gets what is left.

    Args:
        decay_ratio: the decay's share of `total_steps`; None decays over all that follows the warm-up.
    """
    warmup = min(warmup_steps, total_steps)
    left = total_steps - warmup
    return warmup, left if decay_ratio is None else min(round(total_steps * decay_ratio), left)


def lr_factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_ratio: float | None = None,
    decay_type: DecayType = "linear",
    min_lr_factor: float = 0.0,
) -> float:
    """What the learning rate is multiplied with at update number `step`; the first update is step 1.

    With w and d steps of warm-up and decay (see `phase_lengths`) and n = `total_steps`:

    - step <= w: step / w;
    - step <= n - d + 1: 1;
    - then, with x = (step - 1 - (n - d)) / d: 1 - x ("linear"), 1 - sqrt(x) ("sqrt") or (1 + cos(pi x)) / 2
      ("cosine"), scaled to end at `min_lr_factor` instead of 0.

    x would reach 1 only at step n + 1, so that no update is spent on a rate of zero. Later steps keep
    `min_lr_factor`. The formula is that of torchtitan v0.2 (`components/lr_scheduler.py`), which counts from 0.
    """
    assert step >= 1
    warmup, decay = phase_lengths(warmup_steps, total_steps, decay_ratio)
    if step <= warmup:
        return step / warmup
    stable_end = total_steps - decay
    if decay == 0 or step <= stable_end + 1:
        return 1.0
    progress = min(1.0, (step - 1 - stable_end) / decay)
    if decay_type == "linear":
        factor = 1.0 - progress
    elif decay_type == "sqrt":
        factor = 1.0 - math.sqrt(progress)
    else:
        assert decay_type == "cosine", decay_type
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr_factor + (1.0 - min_lr_factor) * factor


class LearningRate:
    """Sets the learning rate of an optimizer's groups from the step.

    The rates at construction are the peaks, so it must be built before a checkpoint overwrites them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        total_steps: int,
        decay_ratio: float | None = None,
        decay_type: DecayType = "linear",
        min_lr_factor: float = 0.0,
    ) -> None:
        assert total_steps >= 1 and warmup_steps >= 0
        self.optimizer = optimizer
        self.peak_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.factor = partial(
            lr_factor,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            decay_ratio=decay_ratio,
            decay_type=decay_type,
            min_lr_factor=min_lr_factor,
        )
        warmup, decay = phase_lengths(warmup_steps, total_steps, decay_ratio)
        if warmup < warmup_steps:
            logger.info("lr_scheduler: warmup_steps %d cut to the %d steps of the run", warmup_steps, warmup)
        if decay_ratio is not None and decay < round(total_steps * decay_ratio):
            logger.info(
                "lr_scheduler: decay_ratio %g means %d steps; cut to the %d that %d steps of warm-up leave of %d",
                decay_ratio, round(total_steps * decay_ratio), decay, warmup, total_steps,
            )  # fmt: skip

    def set(self, step: int) -> float:
        """Set every group's rate for update number `step` (the first is 1); return that of the first group."""
        factor = self.factor(step)
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(peak_lr * factor)  # 8-bit AdamW keeps a tensor, so that its compiled step is reused
            else:
                group["lr"] = peak_lr * factor
        return self.peak_lrs[0] * factor
