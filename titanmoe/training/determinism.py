"""Seeds, deterministic algorithms, and garbage collection at chosen moments."""

from __future__ import annotations

import gc
import os
import random

import numpy
import torch


def set_seed(seed: int) -> None:
    """Start every generator of this process, accelerators' too, from one number.

    Weights and data have generators of their own.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(warn_only: bool) -> None:
    """Only algorithms that give the same bits every time; an operation without one fails, or warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


class GarbageCollection:
    """Collects on every rank in the same step, instead of whenever Python feels like it: stragglers cost all ranks."""

    def __init__(self, every: int) -> None:
        self._every, self._was_enabled = every, gc.isenabled()
        gc.disable()
        gc.collect()

    def step(self, step: int) -> None:
        if step % self._every == 0:
            gc.collect(1)

    def close(self) -> None:
        if self._was_enabled:
            gc.enable()
