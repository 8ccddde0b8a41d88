"""Schedules of pipeline parallelism, and what they ask of the config."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.sections.machine import Parallelism
from titanmoe.config.sizes import accumulation_steps


@dataclass(frozen=True)
class Schedule:
    """
    Attributes:
        stages_per_rank: by default.
        may_have: other numbers of stages per rank are possible, from here on; None if there are none.
        is_v: with two stages per rank, rank r has stages r and last - r; otherwise r, r + ranks, r + 2 ranks, ...
        splits_backward: gradients of weights are computed apart from those of inputs, to fill the wait for others.
        ranks: of all stages, in a file that says so.
    """

    stages_per_rank: int
    may_have: int | None = None
    is_v: bool = False
    splits_backward: bool = False
    ranks: tuple[int, ...] | None = None


SCHEDULES = {
    "GPipe": Schedule(1),
    "1F1B": Schedule(1),
    "LoopedBFS": Schedule(2, may_have=1),
    "Interleaved1F1B": Schedule(2, may_have=1),
    "InterleavedZeroBubble": Schedule(2, may_have=1, splits_backward=True),
    "ZBVZeroBubble": Schedule(2, is_v=True, splits_backward=True),
    "DualPipeV": Schedule(2, is_v=True, splits_backward=True),
}
"""By their names in `torch.distributed.pipelining`."""

_KEY = "parallelism.pipeline_parallel_"


def schedule_of(section: Parallelism) -> Schedule:
    """
    Raises:
        ConfigError: no schedule has this name, or the file has no schedule for this many ranks.
    """
    if section.pipeline_parallel_schedule_csv:
        return _schedule_in_file(section.pipeline_parallel_schedule_csv, section.pipeline_parallel_degree)
    name = section.pipeline_parallel_schedule
    if name not in SCHEDULES:
        folded = {known.lower(): known for known in SCHEDULES}
        close = difflib.get_close_matches(name.lower(), folded, n=1)
        raise ConfigError(
            f'"{name}" is not a schedule; there are {", ".join(SCHEDULES)}',
            where=f"{_KEY}schedule",
            mend=f'Did you mean "{folded[close[0]]}"?' if close else "",
        )
    return SCHEDULES[name]


def microbatch_size(config: JobConfig) -> int:
    """Sequences that a rank computes at a time."""
    section = config.parallelism
    is_pipelined = section.pipeline_parallel_degree > 1
    return section.pipeline_parallel_microbatch_size if is_pipelined else config.training.local_batch_size


def check_pipeline(config: JobConfig, world_size: int) -> None:
    """
    Raises:
        ConfigError: an unknown schedule, numbers of microbatches that it cannot have, or what it does not work with.
    """
    section = config.parallelism
    num_ranks = section.pipeline_parallel_degree
    if num_ranks == 1:
        return
    schedule, name = schedule_of(section), section.pipeline_parallel_schedule
    local, size = config.training.local_batch_size, section.pipeline_parallel_microbatch_size
    if local % size:
        raise ConfigError(
            f"it must divide training.local_batch_size: {local} is not a multiple of {size}",
            where=f"{_KEY}microbatch_size",
        )
    accumulated = accumulation_steps(config, world_size)
    num_microbatches = accumulated * local // size
    numbers = (
        "accumulation steps * training.local_batch_size / pipeline_parallel_microbatch_size = "
        f"{accumulated} * {local} / {size} = {num_microbatches} microbatches"
    )
    if schedule.ranks is None:
        _check_number(name, num_ranks, num_microbatches, numbers)
    if not schedule.splits_backward:
        return
    name = section.pipeline_parallel_schedule_csv or name
    if config.activation_checkpoint.mode != "none":
        raise ConfigError(
            f"the schedule {name} runs the backward pass of a layer in two parts, and would recompute it twice",
            where="activation_checkpoint.mode",
            mend='Set it to "none", or choose 1F1B or Interleaved1F1B.',
        )
    if config.compile.enable and "model" in config.compile.components:
        raise ConfigError(
            f"the schedule {name} runs the backward pass of a layer in two parts, and a compiled one has only one",
            where="compile.enable",
            mend="Set it to false, or choose 1F1B or Interleaved1F1B.",
        )


def _check_number(name: str, num_ranks: int, num_microbatches: int, numbers: str) -> None:
    least = {"1F1B": num_ranks, "DualPipeV": 2 * num_ranks}.get(name, 1)
    if num_microbatches < least:
        times = "2 * " if name == "DualPipeV" else ""
        raise ConfigError(
            f"the schedule {name} needs at least {times}pipeline_parallel_degree = {least} microbatches per step: "
            f"{numbers}",
            where=f"{_KEY}schedule",
            mend="Raise training.global_batch_size or training.local_batch_size, or choose GPipe.",
        )
    num_rounds = max(1, num_microbatches // num_ranks)
    if name.startswith("Interleaved") and num_microbatches % num_rounds:
        raise ConfigError(
            f"the schedule {name} needs a multiple of pipeline_parallel_degree = {num_ranks} microbatches per step: "
            f"{numbers}",
            where=f"{_KEY}schedule",
            mend=f"The nearest is {num_rounds * num_ranks}; or choose 1F1B.",
        )


def _schedule_in_file(path: str, num_ranks: int) -> Schedule:
    """Each row is a rank, and each cell what it does next, such as 3F0: the forward pass of microbatch 0 through
    stage 3. B is a whole backward pass, I and W are its two parts."""
    where = f"{_KEY}schedule_csv"
    if not Path(path).is_file():
        found = "is not a file" if Path(path).exists() else "does not exist"
        raise ConfigError(f'"{path}" {found}', where=where, mend=f"Paths are relative to {Path.cwd()}.")
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [re.findall(r"(\d+)([FBIW])\d+", line) for line in lines]
    stages_of_ranks = [{int(stage) for stage, _ in row} for row in rows]
    stages = sorted(stage for of_rank in stages_of_ranks for stage in of_rank)
    if len(rows) != num_ranks or not stages or stages != list(range(len(stages))):
        raise ConfigError(
            f"{path} has {len(rows)} rows with the stages {', '.join(map(str, stages))}; it must have a row for each "
            f"of pipeline_parallel_degree = {num_ranks} ranks, and every stage in one of them",
            where=where,
        )
    ranks = tuple(next(rank for rank, has in enumerate(stages_of_ranks) if stage in has) for stage in stages)
    return Schedule(1, may_have=1, splits_backward=any(kind in "IW" for row in rows for _, kind in row), ranks=ranks)
