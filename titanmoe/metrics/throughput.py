"""Speed and memory of the steps between two logs.

The timer only reads the host's clock. Where work is queued on a device, the figures are right at the moments when the
host has waited for it: at a log step, where the trainer reads the loss just before `read()`, and around `aside()`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """What one token costs, and what a device could do at best.

    `flops_per_token` and `hardware_flops_per_token` are per token of training (see `flops`); `peak_flops` is one
    device's rate in FLOP/s, None where it is not known: MFU and HFU are then None too.
    """

    flops_per_token: float
    hardware_flops_per_token: float
    peak_flops: float | None = None
    num_devices: int = 1


class StepTimer:
    """Accumulates tokens and seconds over steps; `read()` gives the figures since the last one and starts anew.

    timer = StepTimer(work, device)
    for step in ...:
        with timer.data():
            batch = next(loader)
        ...
        timer.step(global_tokens)
        if metrics.due(step):
            values = scalars.tolist()          # the one synchronisation
            values |= timer.read()
        with timer.aside():                    # not part of any step
            validate()
    """

    def __init__(self, work: Work, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._work, self._device, self._clock = work, device, clock
        self._restart()

    def _restart(self) -> None:
        self._started = self._clock()
        self._num_steps = self._num_tokens = 0
        self._data_seconds = self._aside_seconds = 0.0

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        begin = self._clock()
        try:
            yield
        finally:
            self._data_seconds += self._clock() - begin

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no part of a step: validation, a checkpoint. It waits for the device first and afterwards, so
        that queued work is charged to whom it belongs; both kinds of work wait for the device anyway."""
        self._synchronize()
        begin = self._clock()
        try:
            yield
        finally:
            self._synchronize()
            self._aside_seconds += self._clock() - begin

    def step(self, num_tokens: int) -> None:
        """One optimizer step on `num_tokens` tokens, counted over all ranks, is queued."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    def read(self) -> dict[str, float | None]:
        """Figures of the steps since the last call, to be called right after the step's scalars were read.

        `tokens_per_second` is that of all devices, `tokens_per_second_per_device` and `tflops` (useful ones, 1e12
        FLOP/s) of one; `mfu` and `hfu` are fractions; `step_seconds` and `data_seconds` (the part of it spent waiting
        for data, on this rank) are means per step; `peak_memory_gib` see `peak_memory_gib()`.
        """
        assert self._num_steps > 0, "read() wants at least one step since the last call"
        seconds = max(self._clock() - self._started - self._aside_seconds, 1e-9)
        per_device = self._num_tokens / seconds / self._work.num_devices
        peak = self._work.peak_flops
        values = {
            "tokens_per_second": self._num_tokens / seconds,
            "tflops": per_device * self._work.flops_per_token / 1e12,
            "mfu": per_device * self._work.flops_per_token / peak if peak else None,
            "hfu": per_device * self._work.hardware_flops_per_token / peak if peak else None,
            "peak_memory_gib": peak_memory_gib(self._device),
            "data_seconds": self._data_seconds / self._num_steps,
            "step_seconds": seconds / self._num_steps,
            "tokens_per_second_per_device": per_device,
        }
        self._restart()
        return values

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held since the process began, in GiB: what the caching allocator reserved on CUDA and ROCm devices,
    the resident set of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    # Linux gives KiB, macOS bytes (getrusage(2) of each).
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
