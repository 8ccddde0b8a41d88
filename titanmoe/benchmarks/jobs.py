"""Running whole jobs, each in processes of its own, for what they print."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from titanmoe.config import ConfigError, JobConfig, to_toml
from titanmoe.metrics.records import JSONL_NAME, read_records

_MISTAKE = 2


def run_job(config: JobConfig, folder: Path | None = None) -> list[dict[str, Any]]:
    """Train with the launcher, on as many processes as NGPU says, and leave nothing behind: no checkpoint is saved or
    resumed from, no trace is taken.

    Args:
        folder: where it leaves its checkpoints, after all.

    Returns:
        The records of its metrics.jsonl.

    Raises:
        ConfigError: the job ended with exit code 2.
        RuntimeError: it failed.
    """
    given = config.checkpoint
    loads = given.initial_load_in_hf
    weights = given.initial_load_path if loads else None
    checkpoint = type(given)(enable=loads, initial_load_in_hf=loads, initial_load_path=weights, load_only=loads)
    with tempfile.TemporaryDirectory() as temporary:
        config = replace(
            config,
            job=replace(config.job, dump_folder=str(folder or temporary), print_config=False),
            checkpoint=given if folder else checkpoint,
            profiling=type(config.profiling)(),
        )
        path = Path(temporary) / "job.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "titanmoe.launch", f"--job.config_file={path}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode == _MISTAKE:
            raise ConfigError(done.stdout.rpartition("error: ")[2].strip())
        if done.returncode != 0:
            raise RuntimeError(f"a job ended with exit code {done.returncode}:\n{done.stdout}")
        return read_records(Path(folder or temporary) / JSONL_NAME)[0]
