"""Profiler traces of a few steps, again and again through a run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

logger = logging.getLogger("titanmoe")


class Profiler:
    """Records `active` steps out of every `every`, after `warmup` steps, into `folder/step-{N}/rank{r}.json.gz`."""

    def __init__(self, folder: Path, rank: int, first_step: int, *, every: int, warmup: int, active: int) -> None:
        self._folder, self._rank, self._step = folder, rank, first_step - 1
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=every - warmup - active, warmup=warmup, active=active),
            on_trace_ready=self._export,
            record_shapes=True,
        )
        self._profiler.start()

    def _export(self, profiler: torch.profiler.profile) -> None:
        folder = self._folder / f"step-{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{self._rank}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info("profile of the steps up to %d written to %s", self._step, path)

    def step(self, step: int) -> None:
        self._step = step
        self._profiler.step()

    def close(self) -> None:
        self._profiler.stop()
