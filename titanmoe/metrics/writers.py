"""Where figures are kept: metrics.jsonl, TensorBoard, Weights & Biases.

All have `log(step, values)` for a training step, `log_validation(step, values)` and `close()`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.metrics.records import KEYS, Value, read_records

logger = logging.getLogger("titanmoe.metrics")


class JsonlWriter:
    """metrics.jsonl: one JSON object per line, each written and flushed at once.

    A training record is `{"step": 10, "loss": ..., ...}` with all of `KEYS` and then whatever else was logged. A
    validation record is `{"step": 10, "validation_loss": ..., ...}` and has no `loss`. JSON has no NaN and no infinity:
    they are written as null, and named in a list under "nonfinite".

    Every step appears once, however often a run is killed and resumed: on opening, records after `resumed_step` are
    dropped (those steps are run again), and so is a line that a kill cut off. A run from the beginning
    (`resumed_step=0`) moves an earlier run's file to metrics.previous.jsonl.

    Raises:
        ConfigError: the folder or the file cannot be written.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _keep_until(path, resumed_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write metrics: {error.strerror or error}",
                where=str(path),
                mend="choose another job.dump_folder, or make this one writable",
            ) from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._write(step, {**dict.fromkeys(KEYS), **values})

    def log_validation(self, step: int, values: Mapping[str, Value]) -> None:
        assert "validation_loss" in values and "loss" not in values, f"not a validation record: {sorted(values)}"
        self._write(step, values)

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, values: Mapping[str, Value]) -> None:
        nonfinite = [key for key, value in values.items() if value is not None and not math.isfinite(value)]
        record: dict[str, Any] = {"step": step, **values, **dict.fromkeys(nonfinite)}
        if nonfinite:
            record["nonfinite"] = nonfinite
        # One write of a whole line: a kill can cut it off, but never mix two.
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            text = f"metrics of step {step} were not written: {error.strerror}"
            raise OSError(error.errno, text, self._file.name) from error


def _keep_until(path: Path, resumed_step: int) -> None:
    """Drop what comes after `resumed_step`, atomically; move the whole file aside if that is 0."""
    if resumed_step == 0:
        previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        path.replace(previous)
        logger.info("metrics of an earlier run moved to %s", previous)
        return
    records, damaged = read_records(path)
    kept = [record for record in records if record["step"] <= resumed_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if damaged:
        logger.warning("%s: dropped unreadable lines %s", path, ", ".join(map(str, damaged)))
    if len(kept) < len(records):
        logger.info("%s: dropped %d records after step %d", path, len(records) - len(kept), resumed_step)


class TensorBoardWriter:
    """TensorBoard event files. Steps after `resumed_step` of earlier files are hidden by TensorBoard itself.

    Raises:
        ConfigError: the tensorboard package is missing, or the folder cannot be written.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)
        except ImportError as error:
            raise ConfigError(
                f"TensorBoard cannot be imported: {error}",
                where="metrics.enable_tensorboard",
                mend="pip install tensorboard, or --metrics.no_enable_tensorboard",
            ) from error
        except OSError as error:
            raise ConfigError(
                f"cannot write TensorBoard files: {error.strerror or error}",
                where=str(folder),
                mend="choose another metrics.save_tb_folder or job.dump_folder",
            ) from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for key, value in values.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)

    log_validation = log

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases. Project, entity, run name and mode come from its own environment variables.

    A service that fails while training is logged once and not asked again: it must not end a run.

    Raises:
        ConfigError: the wandb package is missing, or a run cannot be started.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"Weights & Biases cannot be imported: {error}",
                where="metrics.enable_wandb",
                mend="pip install wandb, or --metrics.no_enable_wandb",
            ) from error
        try:
            project = os.environ.get("WANDB_PROJECT", "titanmoe")
            self._run: Any = wandb.init(project=project, dir=str(folder), config=dict(config))
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"Weights & Biases cannot start: {error}",
                where="metrics.enable_wandb",
                mend="run `wandb login`, or set WANDB_MODE=offline, or --metrics.no_enable_wandb",
            ) from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in values.items() if value is not None}, step=step)
        except Exception as error:  # whatever a remote service and its client raise, training goes on
            logger.error("Weights & Biases failed at step %d and is off from here on: %s", step, error)
            self._run = None

    log_validation = log

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # as in log()
            logger.error("Weights & Biases failed to finish: %s", error)
        self._run = None
