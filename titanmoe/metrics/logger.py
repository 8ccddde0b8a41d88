"""The one object the trainer logs to. Rank 0 writes everything; other ranks nothing, or only their own TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from titanmoe.config.errors import ConfigError
from titanmoe.metrics.console import Console, RunInfo
from titanmoe.metrics.records import JSONL_NAME, Value
from titanmoe.metrics.report import write_report
from titanmoe.metrics.terminal import Terminal, current_terminal
from titanmoe.metrics.writers import JsonlWriter, TensorBoardWriter, WandbWriter

logger = logging.getLogger("titanmoe.metrics")


class Writer(Protocol):
    def log(self, step: int, values: Mapping[str, Value]) -> None: ...
    def log_validation(self, step: int, values: Mapping[str, Value]) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Sends figures to the console and to every writer. Use `build_metrics`; it decides which of them a rank has."""

    def __init__(self, folder: Path, log_freq: int, console: Console | None, writers: list[Writer]) -> None:
        assert log_freq > 0, f"metrics.log_freq must be positive, got {log_freq}"
        self._folder, self._log_freq, self._console, self._writers = folder, log_freq, console, writers

    def start(self, run: RunInfo) -> None:
        """Print the banner."""
        if self._console:
            self._console.start(run)

    def due(self, step: int, num_steps: int) -> bool:
        """Whether `step` (from 1) is logged: the first, every `log_freq`-th and the last. The same on all ranks."""
        return step == 1 or step % self._log_freq == 0 or step == num_steps

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """A training step's figures (the keys of `records.KEYS` and any others)."""
        if self._console:
            self._console.log(step, values)
        for writer in self._writers:
            writer.log(step, values)

    def log_validation(self, step: int, values: Mapping[str, Value]) -> None:
        """A validation's figures: `validation_loss` and any others, after `step` steps of training."""
        if self._console:
            self._console.log_validation(step, values)
        for writer in self._writers:
            writer.log_validation(step, values)

    def progress(self, step: int) -> None:
        """Step `step` is queued; moves the bar. Costs nothing where there is none."""
        if self._console:
            self._console.progress(step)

    def finish(self, step: int, outputs: Mapping[str, str], status: str = "done") -> None:
        """Write report.html and print the summary of a run that ended, in whatever way, after `step` steps.

        `outputs` names what else was left behind, and where: {"checkpoint": "outputs/checkpoint/step-100"}.
        """
        if not self._console:
            return
        try:
            outputs = {**outputs, "report": str(write_report(self._folder))}
        except ConfigError as error:  # it can be made again from metrics.jsonl: no reason to fail a run that is over
            logger.error("report.html was not written: %s", error)
        self._console.finish(step, outputs, status)

    def close(self) -> None:
        """Close every writer; to be called however the run ends."""
        if self._console:
            self._console.close()
        for writer in self._writers:
            writer.close()
        self._writers = []


def build_metrics(
    dump_folder: str | Path,
    *,
    rank: int,
    log_freq: int,
    tensorboard: bool = False,
    tensorboard_folder: str = "tb",
    all_ranks: bool = False,
    wandb: bool = False,
    wandb_config: Mapping[str, Any] | None = None,
    color: bool = True,
    resumed_step: int = 0,
    terminal: Terminal | None = None,
) -> Metrics:
    """The writers of this rank, ready to log step `resumed_step + 1`.

    Args:
        tensorboard_folder: under `dump_folder`; with `all_ranks` each rank has `rank_{rank}` in it.
        all_ranks: TensorBoard files from every rank, not only from rank 0.
        wandb_config: the resolved config, shown beside the run.
        resumed_step: the step of the checkpoint that was loaded, 0 for none. Later records are dropped.
        terminal: where the console goes; the one of `configure_logging` by default.

    Raises:
        ConfigError: a package is missing or a folder cannot be written.
    """
    folder = Path(dump_folder)
    writers: list[Writer] = []
    if rank == 0:
        writers.append(JsonlWriter(folder / JSONL_NAME, resumed_step))
    if tensorboard and (rank == 0 or all_ranks):
        place = folder / tensorboard_folder / (f"rank_{rank}" if all_ranks else "")
        writers.append(TensorBoardWriter(place, resumed_step))
    if wandb and rank == 0:
        writers.append(WandbWriter(folder, wandb_config or {}))
    console = Console(terminal or current_terminal(color)) if rank == 0 else None
    return Metrics(folder, log_freq, console, writers)
