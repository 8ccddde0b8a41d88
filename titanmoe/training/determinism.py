"""Seeds, deterministic algorithms, and garbage collection at chosen moments."""

from __future__ import annotations

import gc
import os
import random

import torch


def set_seed(seed: int, rank: int) -> None:
    """Seed every generator of this process; different on every rank. Weights and data have generators of their own."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def set_deterministic(warn_only: bool) -> None:
    """Only algorithms that give the same bits every time; an operation without one fails, or warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


class GarbageCollection:
    """Collects on every rank in the same step, instead of whenever Python feels like it: stragglers cost all ranks."""

    def __init__(self, every: int) -> None:
        self._every = every
        gc.disable()
        gc.collect()

    def step(self, step: int) -> None:
        if step % self._every == 0:
            gc.collect(1)

    def close(self) -> None:
        gc.enable()
