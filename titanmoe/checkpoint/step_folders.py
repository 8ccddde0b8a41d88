"""The folders of a run's checkpoints: which exist, which are valid, how one appears and disappears.

A step is written into `step-{N}.writing` and becomes `step-{N}` by a rename when its manifest is in place, so that a
crash at any moment leaves every earlier checkpoint as it was. `step-{N}.replaced` and `step-{N}.deleting` are on their
way out. Other names, and files we did not write, are never touched.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from titanmoe.checkpoint.files import sync_folder
from titanmoe.checkpoint.manifest import Manifest, ManifestError, read_manifest

logger = logging.getLogger("titanmoe")

WRITING, REPLACED, DELETING = ".writing", ".replaced", ".deleting"

_STEP_NAME = re.compile(r"step-(0|[1-9]\d*)(\.writing|\.replaced|\.deleting)?")
_OUR_FILES = re.compile(r"__\d+_\d+\.distcp|(\.metadata|tensors\.json|state\.json|manifest\.json)(\.tmp)?")


@dataclass(frozen=True)
class StepFolder:
    """A folder of one step; `manifest` is None when it is not valid, and `problem` then says why.

    Sizes were compared, contents were not.
    """

    path: Path
    step: int
    manifest: Manifest | None
    problem: str


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step}"


def parse_step(path: Path) -> tuple[int, str] | None:
    """The step of a folder name and its suffix ('' for a published one); None for names that are not ours."""
    match = _STEP_NAME.fullmatch(path.name)
    return (int(match[1]), match[2] or "") if match else None


def inspect(path: Path, step: int) -> StepFolder:
    """Judge one folder by its manifest and file sizes."""
    if not path.is_dir():
        return StepFolder(path, step, None, "it is not a folder")
    try:
        return StepFolder(path, step, read_manifest(path, step), "")
    except ManifestError as error:
        return StepFolder(path, step, None, str(error))


def survey(folder: Path) -> list[StepFolder]:
    """All steps in a checkpoint folder, newest first, unfinished ones among them; [] if the folder does not exist."""
    found = []
    for path, step, suffix in _ours(folder):
        if suffix == WRITING:
            found.append(StepFolder(path, step, None, "its save was interrupted"))
        elif suffix == "":
            found.append(inspect(path, step))
    return sorted(found, key=lambda entry: (entry.step, entry.manifest is not None), reverse=True)


def recover(folder: Path) -> None:
    """Finish what a crash left between a complete manifest and its publication. For the run that owns the folder."""
    for path, step, suffix in _ours(folder):
        if suffix == WRITING and inspect(path, step).manifest is not None:
            logger.info("checkpoint step %d was complete but not yet in its place; it is now", step)
            publish(folder, step)
    for path, step, suffix in _ours(folder):
        if suffix == REPLACED and inspect(path, step).manifest is not None and not step_folder(folder, step).exists():
            logger.info("checkpoint step %d was about to be replaced; it is back in its place", step)
            path.rename(step_folder(folder, step))
            sync_folder(folder)


def begin(folder: Path, step: int) -> Path:
    """Make the empty folder that a step is written into, clearing what an interrupted save of that step left."""
    writing = folder / f"step-{step}{WRITING}"
    remove_our_files(writing)
    writing.mkdir(parents=True, exist_ok=True)
    return writing


def publish(folder: Path, step: int) -> None:
    """Put `step-{N}.writing`, complete, in its place. What was there before is removed only afterwards."""
    final = step_folder(folder, step)
    replaced = folder / f"{final.name}{REPLACED}"
    if final.exists():
        remove_our_files(replaced)
        final.rename(replaced)
    (folder / f"{final.name}{WRITING}").rename(final)
    sync_folder(folder)
    remove_our_files(replaced)


def purge(folder: Path, keep_latest_k: int, published: int) -> None:
    """Delete valid steps beyond the newest `keep_latest_k` (0 keeps all) and what interrupted saves left behind.

    Kept in any case: the step just `published` and the newest one that a run can resume from. A step that is not valid
    any more is left for its owner to look at. What cannot be deleted is logged and left.
    """
    valid = [entry for entry in survey(folder) if entry.manifest is not None]
    resumable = [entry.step for entry in valid if entry.manifest is not None and not entry.manifest.model_only]
    kept = {entry.step for entry in valid[:keep_latest_k]} | {published} | set(resumable[:1])
    doomed = [entry.path for entry in valid if keep_latest_k and entry.step not in kept]
    newest = max((entry.step for entry in valid), default=-1)
    doomed += [path for path, step, suffix in _ours(folder) if suffix and step <= newest]
    for path in doomed:
        try:
            _delete(path)
            logger.info("deleted old checkpoint folder %s", path.name)
        except OSError as error:
            logger.warning("could not delete checkpoint folder %s: %s", path, error)


def remove_our_files(path: Path) -> None:
    """Delete the files of a checkpoint and, if nothing else is in it, their folder. Missing ones are no error."""
    if not path.is_dir():
        return
    for file in sorted(path.iterdir()):
        if _OUR_FILES.fullmatch(file.name):
            file.unlink(missing_ok=True)
    if any(path.iterdir()):
        logger.warning("%s also contains files that titanmoe did not write; they stay", path)
    else:
        path.rmdir()


def _delete(path: Path) -> None:
    """Rename first: a crash in between leaves no folder that looks like a checkpoint and is not."""
    if not path.name.endswith(DELETING):
        deleting = path.with_name(path.name.split(".")[0] + DELETING)
        remove_our_files(deleting)
        path = path.rename(deleting)
        sync_folder(path.parent)
    remove_our_files(path)


def _ours(folder: Path) -> list[tuple[Path, int, str]]:
    """Paths with a name of ours: (path, step, suffix)."""
    if not folder.is_dir():
        return []
    return [(path, *parsed) for path in sorted(folder.iterdir()) if (parsed := parse_step(path)) is not None]
