"""Saving a run so that it can be killed at any moment, and resuming it exactly."""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titanmoe import __version__
from titanmoe.checkpoint import step_folders
from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.base_model import BaseModel
from titanmoe.checkpoint.dcp_storage import Metadata, Shard, load_shards, read_metadata, save_shards, stored_tensors
from titanmoe.checkpoint.files import retrying, write_whole
from titanmoe.checkpoint.find import find_start, find_step
from titanmoe.checkpoint.manifest import FileRecord, Manifest, write_manifest
from titanmoe.checkpoint.matching import check_match
from titanmoe.checkpoint.rng import rng_state, set_rng_state
from titanmoe.checkpoint.run_state import (
    JsonState,
    RunState,
    check_json,
    materialize_optimizers,
    named_model_tensors,
    optimizer_tensors,
)
from titanmoe.checkpoint.staging import Staging
from titanmoe.config.errors import ConfigError
from titanmoe.parallel.ranks import Ranks
from titanmoe.training.determinism import set_seed

logger = logging.getLogger("titanmoe")

ASYNC_MODES = ("disabled", "async", "async_with_pinned_mem")
# Parts that `load` can leave out; `dataloader` is torchtitan's name for `data`.
PARTS = ("model", "optimizer", "lr_scheduler", "data", "train_state")
STATE_NAME = "state.json"


class Checkpointer:
    """Saves to and resumes from `folder/step-{N}/`. Every rank makes one and calls its methods in the same order.

    Args:
        folder: shared by all ranks.
        keep_latest_k: how many steps to keep; 0 keeps all.
        async_mode: "disabled" writes before `save` returns; "async" copies to CPU memory and writes in the background;
            "async_with_pinned_mem" also keeps page-locked buffers, for faster copies from an accelerator.
        mesh: sizes of the mesh axes by name, recorded in the manifest.
        config_hash: hash of the resolved config, recorded; resuming under another one is logged.
        timeout: how long a rank waits for the others while they write.
        adapters: settings of the model's adapters, recorded; None if it has none.
        base: where the frozen parameters of the model are from, which are then not saved: steps refer to it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_latest_k: int = 0,
        async_mode: str = "disabled",
        mesh: Mapping[str, int] | None = None,
        config_hash: str = "",
        timeout: timedelta = timedelta(hours=1),
        adapters: AdapterSettings | None = None,
        base: BaseModel | None = None,
    ) -> None:
        assert async_mode in ASYNC_MODES, async_mode
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"{folder} is a file", where="checkpoint.folder", mend="name a folder")
        self._keep_latest_k = keep_latest_k
        self._mesh = dict(mesh or {})
        self._config_hash = config_hash
        self._adapters = adapters
        self.base = base
        self._ranks = Ranks.create(timeout)
        self._staging = None if async_mode == "disabled" else Staging(_can_pin(async_mode))
        self._executor = ThreadPoolExecutor(1, "checkpoint") if self._staging else None
        self._in_flight: Future[None] | None = None
        self._kept: tuple[int, bool] | None = None  # step and model_only of what this run saved or loaded last

    def save(self, step: int, run: RunState, *, model_only: bool = False, dtype: torch.dtype | None = None) -> None:
        """Save a step; returns when it is published or, in an asynchronous mode, when its snapshot is taken.

        A step that this run saved or loaded already is not saved again. One of the same number from another run is
        replaced once the new one is complete. With `model_only`, parameters are saved in `dtype` if it is given.

        Raises:
            OSError: a file could not be written; for the save before this one in an asynchronous mode. Checkpoints
                that existed stay as they were.
        """
        self.wait()
        if self._kept in ((step, False), (step, model_only)):
            self._ranks.log(logging.INFO, "checkpoint step %d is saved already", step)
            return
        tensors = named_model_tensors(run.model, trained_only=self.base is not None)
        if model_only and dtype is not None:
            tensors = {
                name: tensor.detach().to(dtype) if isinstance(tensor, nn.Parameter) else tensor
                for name, tensor in tensors.items()
            }
        if not model_only:
            tensors.update(optimizer_tensors(run.model, run.optimizers))
        state_json = self._state_json(step, run, model_only)
        shards = {name: Shard.of(tensor) for name, tensor in tensors.items()}
        self._kept = (step, model_only)
        if self._executor is None:
            self._write(step, shards, state_json, model_only)
        else:
            assert self._staging is not None
            snapshot = self._staging.copy(shards)
            self._in_flight = self._executor.submit(self._write, step, snapshot, state_json, model_only)

    def wait(self) -> None:
        """Wait for a save in the background; raises its error."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def close(self) -> None:
        """Finish the save in the background and give up the process group. Raises the error of that save."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            self._ranks.close()

    def load(self, run: RunState, step: int = -1, *, exclude: Collection[str] = ()) -> int | None:
        """Put a saved step into the run: the newest valid one (-1), or exactly `step`.

        Returns the step loaded, or None if there is none to resume from. Parts named in `exclude` stay as they are.
        On the same number of ranks the run goes on bit for bit; on another one, random numbers are seeded anew.

        Raises:
            ConfigError: `step` is not valid, or the checkpoint is of another model; nothing was changed then.
        """
        self.wait()
        excluded = _parts_named(exclude)
        self._ranks.on_first(partial(step_folders.recover, self._folder))
        found = find_step(self._folder, self._ranks, step)
        if found is None:
            return None
        self._kept = None if excluded else (found[1].step, False)
        return self._restore(*found, run, excluded)

    def load_from(self, path: str | Path, run: RunState, *, exclude: Collection[str] = ()) -> int:
        """As `load`, from another run: a step folder, or the newest step of a checkpoint folder that can be resumed.

        Raises ConfigError if there is none or it is of another model.
        """
        self.wait()
        found, manifest = find_start(Path(path), self._ranks, resumable=True)
        return self._restore(found, manifest, run, _parts_named(exclude))

    def _restore(self, path: Path, manifest: Manifest, run: RunState, excluded: Collection[str]) -> int:
        started = time.monotonic()
        parts = _json_parts(run, excluded)
        state = self._ranks.on_each(partial(_read_state, path, parts))
        self._load_tensors(path, manifest, run, excluded)
        self._ranks.on_each(partial(_restore_parts, parts, state))
        if "train_state" not in excluded:
            self._restore_rng(state["rng"], run.seed, manifest)
        if manifest.config_hash != self._config_hash:
            text = "the config differs from the one that step %d was saved under"
            self._ranks.log(logging.INFO, text, manifest.step)
        self._ranks.log(logging.INFO, "resumed from %s in %.1f s", path, time.monotonic() - started)
        return manifest.step

    def load_model(self, path: str | Path, model: nn.Module) -> int:
        """Load only the model, from a step folder or the newest valid step of a checkpoint folder; returns its step.

        Raises ConfigError if there is no valid checkpoint there or it is of another model.
        """
        self.wait()
        found, manifest = find_start(Path(path), self._ranks, resumable=False)
        metadata = self._ranks.on_each(partial(read_metadata, found))
        self._fill(found, metadata, self._stored_of(model, found, manifest), ["model"])
        self._ranks.log(logging.INFO, "loaded the model from %s", found)
        return manifest.step

    def _state_json(self, step: int, run: RunState, model_only: bool) -> bytes:
        """Everything but tensors, as rank 0 will write it."""

        def of_this_rank() -> dict[str, Any]:
            state = {"rng": rng_state(), **{name: part.state_dict() for name, part in _json_parts(run, ()).items()}}
            check_json(state, "state")
            return state

        if model_only:
            return json.dumps({"step": step}).encode()
        states = self._ranks.on_all(of_this_rank)

        def merged() -> bytes:
            whole = {"step": step, **states[0], "rng": [state["rng"] for state in states]}
            if run.data is not None:
                whole["data"] = run.merge_data([state["data"] for state in states])
                check_json(whole["data"], "merged data state")
            return json.dumps(whole).encode()

        return self._ranks.on_first(merged)

    def _write(self, step: int, shards: Mapping[str, Shard], state_json: bytes, model_only: bool) -> None:
        started = time.monotonic()
        # Errors are the same on every rank, so all of them try again together.
        attempt = partial(self._write_once, step, shards, state_json, model_only)
        try:
            num_bytes = retrying(attempt, f"saving checkpoint step {step}")
        except Exception as error:
            self._kept = None
            if self._ranks.rank == 0:
                _clear_failed(self._folder, step)
            if isinstance(error, OSError) and error.errno is not None:
                text = f"checkpoint step {step} was not saved, earlier ones are untouched: {error.strerror}"
                raise OSError(error.errno, text, error.filename or str(self._folder)) from error
            raise
        seconds = time.monotonic() - started
        self._ranks.log(logging.INFO, "saved checkpoint step %d: %.1f MB in %.1f s", step, num_bytes / 1e6, seconds)
        if self._ranks.rank == 0:
            step_folders.purge(self._folder, self._keep_latest_k, step)

    def _write_once(self, step: int, shards: Mapping[str, Shard], state_json: bytes, model_only: bool) -> int:
        writing = self._ranks.on_first(partial(step_folders.begin, self._folder, step))
        written = save_shards(writing, shards, self._ranks)
        records = self._ranks.gather(written)

        def publish() -> int:
            write_whole(writing / STATE_NAME, state_json)
            files = {name: record for part in records for name, record in part.items()}
            files[STATE_NAME] = FileRecord.of(state_json)
            manifest = Manifest(
                step=step,
                world_size=self._ranks.size,
                mesh=self._mesh,
                config_hash=self._config_hash,
                model_only=model_only,
                versions={"titanmoe": __version__, "torch": str(torch.__version__)},
                files=files,
                base=self.base,
                adapters=self._adapters,
            )
            write_manifest(writing, manifest)
            step_folders.publish(self._folder, step)
            return manifest.num_bytes

        return self._ranks.on_first(publish)

    def _stored_of(self, model: nn.Module, path: Path, manifest: Manifest) -> dict[str, Tensor]:
        """What a step should have of the model.

        Raises:
            ConfigError: it has adapters only, and not for the base that this run has; or it has the whole model, and
                this run's steps would refer to a base that may be another.
        """
        if manifest.base is None and self.base is not None:
            raise ConfigError(
                f"holds the whole model, not adapters for {self.base.path}",
                where=str(path),
                mend="Set checkpoint.initial_load_in_hf = false, as when it was saved.",
            )
        if manifest.base is not None and self.base is None:
            raise ConfigError(
                f"has nothing but adapters for {manifest.base.path}",
                where=str(path),
                mend="Set checkpoint.initial_load_in_hf = true, and checkpoint.initial_load_path to that folder.",
            )
        if manifest.base and self.base:
            manifest.base.check(self.base)
        return named_model_tensors(model, trained_only=manifest.base is not None)

    def _load_tensors(self, path: Path, manifest: Manifest, run: RunState, excluded: Collection[str]) -> None:
        parts = [part for part in ("model", "optimizer") if part not in excluded]
        if not parts:
            return
        metadata = self._ranks.on_each(partial(read_metadata, path))
        wanted: dict[str, Tensor] = {}
        if "model" in parts:
            wanted.update(self._stored_of(run.model, path, manifest))
        if "optimizer" in parts:
            materialize = partial(materialize_optimizers, run.model, run.optimizers, stored_tensors(metadata))
            fresh = list(dict.fromkeys(chain(*self._ranks.on_all(materialize))))  # ranks may have the same ones
            if fresh:
                text = "%d parameters have no optimizer state in %s and begin anew: %s ..."
                self._ranks.log(logging.INFO, text, len(fresh), path, fresh[0])
            wanted.update(optimizer_tensors(run.model, run.optimizers))
        self._fill(path, metadata, wanted, parts)

    def _fill(self, path: Path, metadata: Metadata, wanted: Mapping[str, Tensor], parts: Collection[str]) -> None:
        """Load `wanted`, which over all ranks must be all that the checkpoint has of these parts."""
        check_match(path, stored_tensors(metadata), wanted, parts, self._ranks)
        shards = {name: Shard.of(tensor) for name, tensor in wanted.items()}
        load_shards(path, shards, metadata, self._ranks)

    def _restore_rng(self, states: list[dict[str, Any]], seed: int, manifest: Manifest) -> None:
        if len(states) == self._ranks.size:
            set_rng_state(states[self._ranks.rank])
            return
        text = "saved on %d ranks, resumed on %d: random numbers are seeded anew from seed, step and rank"
        self._ranks.log(logging.INFO, text, len(states), self._ranks.size)
        set_seed(seed + manifest.step + self._ranks.rank)


def _parts_named(names: Collection[str]) -> set[str]:
    parts = {"data" if name == "dataloader" else name for name in names}
    if unknown := parts - set(PARTS):
        raise ConfigError(
            f"unknown part {', '.join(sorted(unknown))}",
            where="checkpoint.exclude_from_loading",
            mend=f"parts are {', '.join(PARTS)}",
        )
    return parts


def _json_parts(run: RunState, excluded: Collection[str]) -> dict[str, JsonState]:
    parts = {"train_state": run.train_state, "lr_scheduler": run.lr_scheduler, "data": run.data}
    return {name: part for name, part in parts.items() if part is not None and name not in excluded}


def _read_state(path: Path, parts: Collection[str]) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(retrying((path / STATE_NAME).read_bytes, f"reading {path / STATE_NAME}"))
    if missing := [name for name in parts if name not in state]:
        raise ConfigError(
            f"the checkpoint has no {' and no '.join(missing)}",
            where=str(path),
            mend=f'to begin them anew, set checkpoint.exclude_from_loading = "{",".join(missing)}"',
        )
    return state


def _restore_parts(parts: Mapping[str, JsonState], state: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        part.load_state_dict(state[name])


def _can_pin(async_mode: str) -> bool:
    if async_mode != "async_with_pinned_mem":
        return False
    if not torch.accelerator.is_available():
        logger.info("checkpoint.async_mode: without an accelerator there is nothing to pin; using ordinary memory")
        return False
    return True


def _clear_failed(folder: Path, step: int) -> None:
    """Give back the disk space of a save that failed; it may be what the next one lacks."""
    try:
        step_folders.remove_our_files(folder / f"step-{step}{step_folders.WRITING}")
    except OSError as error:
        if error.errno != errno.ENOENT:
            logger.warning("could not clear the failed save of step %d: %s", step, error)
