"""Which checkpoint to load: the newest that is whole. Every rank comes to the same answer."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from titanmoe.checkpoint.manifest import Manifest, check_contents
from titanmoe.checkpoint.step_folders import StepFolder, inspect, parse_step, step_folder, survey
from titanmoe.config.errors import ConfigError
from titanmoe.parallel.ranks import Ranks


def find_step(folder: Path, ranks: Ranks, step: int = -1) -> tuple[Path, Manifest] | None:
    """The newest step that a run can resume from (-1), or exactly `step`; None if there is none.

    One line is logged for every newer step that is passed over. Checksums are verified, split over the ranks.
    Raises ConfigError if the step asked for is not valid.
    """
    entries = ranks.on_first(partial(survey, folder))
    if step < 0:
        return _newest([entry for entry in entries if not _is_seed(entry)], ranks, resumable=True)[0]
    wanted = [entry for entry in entries if entry.step == step]
    problem = _problem(wanted[0], ranks, resumable=True) if wanted else "there is no such folder"
    if problem:
        valid = [str(entry.step) for entry in entries if entry.manifest is not None]
        raise ConfigError(
            f"step {step} cannot be loaded: {problem}",
            where=str(step_folder(folder, step)),
            mend=f"valid steps there: {', '.join(valid) or 'none'}; checkpoint.load_step = -1 takes the newest",
        )
    newer = [entry.step for entry in entries if entry.step > step and entry.manifest is not None]
    if newer:
        text = "loading step %d although newer ones exist (%s): the next resume takes the newest, unless they are moved"
        ranks.log(logging.WARNING, text, step, ", ".join(map(str, newer)))
    manifest = wanted[0].manifest
    assert manifest is not None
    return wanted[0].path, manifest


def find_start(path: Path, ranks: Ranks, *, resumable: bool) -> tuple[Path, Manifest]:
    """What to start from: `path` is a step folder, or a checkpoint folder whose newest valid step is taken.

    With `resumable`, a step that holds only the model does not count. Raises ConfigError if there is none.
    """

    def look() -> list[StepFolder]:
        parsed = parse_step(path)
        return [inspect(path, parsed[0])] if parsed else survey(path)

    entries = ranks.on_first(look)
    found, problems = _newest(entries, ranks, resumable)
    if found is None:
        raise ConfigError(
            f"no valid checkpoint there ({'; '.join(problems)})" if problems else "no checkpoint there",
            where=str(path),
            mend="give a step-N folder or the folder that contains them; for Hugging Face weights, "
            "set checkpoint.initial_load_in_hf = true",
        )
    return found


def _is_seed(entry: StepFolder) -> bool:
    """Whether it holds the weights to begin with, which nobody expects to resume from."""
    return entry.step == 0 and entry.manifest is not None and entry.manifest.model_only


def _newest(entries: list[StepFolder], ranks: Ranks, resumable: bool) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """The newest usable step, and what is wrong with the newer ones."""
    problems: list[str] = []
    for entry in entries:
        problem = _problem(entry, ranks, resumable)
        if not problem:
            assert entry.manifest is not None
            return (entry.path, entry.manifest), problems
        ranks.log(logging.WARNING, "skipped checkpoint %s: %s", entry.path.name, problem)
        problems.append(f"{entry.path.name}: {problem}")
    return None, problems


def _problem(entry: StepFolder, ranks: Ranks, resumable: bool) -> str:
    """Why this folder cannot be used, '' if it can; the same on every rank."""
    manifest = entry.manifest
    if manifest is None:
        return entry.problem
    if resumable and manifest.model_only:
        return "it has the model only; to start a run from it, set checkpoint.initial_load_path"
    found = ranks.on_all(lambda: check_contents(entry.path, manifest, ranks.rank, ranks.size))
    return next((problem for problem in found if problem), "")
