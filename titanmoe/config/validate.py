"""Keys that contradict each other, the number of ranks, or the disk. Runs before any process group exists."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.pipeline import check_pipeline
from titanmoe.config.sections.checkpoint import Checkpoint
from titanmoe.config.sections.learning import EMBEDDED_DATASETS, DataLoader, Training, Validation
from titanmoe.config.sections.machine import ActivationCheckpoint, Compile
from titanmoe.config.sections.model import Model
from titanmoe.config.sections.quantize import CONVERTERS
from titanmoe.config.sections.run import Profiling
from titanmoe.config.sizes import check_sequences_can_be_cut, global_batch_size


def validate(config: JobConfig, world_size: int) -> None:
    """Everything that can be known to be wrong before the job starts.

    Raises:
        ConfigError: the first contradiction found, with the formula and the numbers.
    """
    assert world_size >= 1, world_size
    validate_keys(config)
    global_batch_size(config, world_size)
    check_sequences_can_be_cut(config)
    check_pipeline(config, world_size)
    if config.checkpoint.create_seed_checkpoint and world_size != 1:
        raise ConfigError(
            f"a seed checkpoint is made by one rank, not by {world_size}",
            where="checkpoint.create_seed_checkpoint",
            mend="Start it with NGPU=1; a run with any number of ranks can begin from it.",
        )
    _check_paths(config)


def validate_keys(config: JobConfig) -> None:
    """What can be known from the config alone, on any machine.

    Raises:
        ConfigError: the first contradiction found.
    """
    _check_model(config.model)
    others_may_come = bool(config.experimental.custom_import)
    check_converters(config.model.converters, config, None if others_may_come else CONVERTERS)
    _check_dataset(config.training, "training")
    _check_dataloader(config.training.dataloader, "training.dataloader")
    if config.validation.enable:
        _check_dataset(config.validation, "validation")
        _check_dataloader(config.validation.dataloader, "validation.dataloader")
    _check_activation_checkpoint(config.activation_checkpoint, config.compile)
    _check_compile(config.compile)
    _check_checkpoint(config.checkpoint, config.model)
    _check_profiling(config.profiling)


def _check_model(model: Model) -> None:
    if model.name == "auto" and model.hf_assets_path is None:
        raise ConfigError(
            'model.name = "auto" reads config.json in model.hf_assets_path, which is not set',
            where="model.hf_assets_path",
            mend="Set it to a directory in Hugging Face layout.",
        )


def check_converters(names: Sequence[str], config: JobConfig, known: Collection[str] | None) -> None:
    """
    Args:
        names: converters to apply, with their settings in `config`.
        known: all that there are; None if others may come.

    Raises:
        ConfigError: a name twice, an unknown one, or settings of one of them that contradict each other.
    """
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f'"{name}" is there {names.count(name)} times', where="model.converters", mend="Name it once."
            )
        if known is not None and name not in known:
            nearest = [other for other in known if name in other.split(".")]
            nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            raise ConfigError(
                f'no converter is called "{name}"', where="model.converters", mend=f"{hint}They are {', '.join(known)}."
            )
        if name not in CONVERTERS:
            continue
        if name == "lora":
            _check_lora(config, names[names.index(name) + 1 :])
            continue
        section: Any = reduce(getattr, name.split("."), config)
        if getattr(section, "emulate", False) and section.backend not in ("auto", "emulated"):
            raise ConfigError(
                f'is on, but {name}.backend = "{section.backend}"',
                where=f"{name}.emulate",
                mend="Leave one of them at its default.",
            )
        if getattr(section, "enable_fsdp_float8_all_gather", False):
            raise ConfigError(
                "gathering shards in FP8 is not supported yet",
                where=f"{name}.enable_fsdp_float8_all_gather",
                mend="Set it to false: shards are gathered in training.mixed_precision_param.",
            )


def _check_lora(config: JobConfig, later: Sequence[str]) -> None:
    """
    Args:
        later: names of the converters that come after this one.
    """
    if quantizers := [name for name in later if name.startswith("quantize.")]:
        raise ConfigError(
            f'"{quantizers[0]}" comes after "lora", whose adapters it would meet',
            where="model.converters",
            mend='Name "lora" last: adapters are added to quantised weights.',
        )
    checkpointing = config.activation_checkpoint
    if config.lora.dropout and checkpointing.mode != "none" and not checkpointing.preserve_rng_state:
        raise ConfigError(
            f"is {config.lora.dropout:g}, and layers that are recomputed would drop other inputs the second time",
            where="lora.dropout",
            mend="Set activation_checkpoint.preserve_rng_state = true.",
        )


def _check_dataset(data: Training | Validation, section: str) -> None:
    if data.dataset in EMBEDDED_DATASETS and data.dataset_path is not None:
        raise ConfigError(
            f'"{data.dataset_path}" was given, but the dataset "{data.dataset}" is embedded and has no path',
            where=f"{section}.dataset_path",
            mend=f'Set {section}.dataset to "text", "json", "parquet" or "chat", or {section}.dataset_path to "none".',
        )
    if data.dataset not in EMBEDDED_DATASETS and data.dataset_path is None:
        raise ConfigError(
            f'the dataset "{data.dataset}" needs a path',
            where=f"{section}.dataset_path",
            mend="Set it to a file or a directory.",
        )


def _check_dataloader(dataloader: DataLoader, section: str) -> None:
    if dataloader.prefetch_factor is not None and dataloader.num_workers == 0:
        raise ConfigError(
            f"{dataloader.prefetch_factor} batches per worker cannot be prepared by num_workers = 0",
            where=f"{section}.prefetch_factor",
            mend=f"Set {section}.num_workers to at least 1, or leave prefetch_factor at none.",
        )


def _check_activation_checkpoint(checkpointing: ActivationCheckpoint, compiling: Compile) -> None:
    option = checkpointing.selective_ac_option
    is_count = option.isascii() and option.isdigit() and int(option) >= 1
    if checkpointing.mode == "selective" and option != "op" and not is_count:
        raise ConfigError(
            f'"{option}" was given, but it must be "op" or a whole number of at least 1, in quotes',
            where="activation_checkpoint.selective_ac_option",
            mend='"2" recomputes every second layer.',
        )
    if checkpointing.mode == "memory_budget" and not (compiling.enable and "model" in compiling.components):
        raise ConfigError(
            '"memory_budget" was given, but it is the compiler that keeps to the budget, and the model is not compiled',
            where="activation_checkpoint.mode",
            mend='Set compile.enable = true, with "model" in compile.components, or name another mode.',
        )


def _check_compile(compiling: Compile) -> None:
    if compiling.enable and not compiling.components:
        raise ConfigError(
            "compile.enable is on, but the list of what to compile is empty",
            where="compile.components",
            mend='It is ["model", "loss"] by default.',
        )


def _check_checkpoint(checkpoint: Checkpoint, model: Model) -> None:
    if checkpoint.keep_latest_k == 1:
        raise ConfigError(
            "1 was given: a crash while the next checkpoint is being written would leave none",
            where="checkpoint.keep_latest_k",
            mend="Set it to 2 or more, or to 0 to keep all.",
        )
    wants_weights = checkpoint.initial_load_path is not None or checkpoint.initial_load_in_hf
    if wants_weights and not checkpoint.enable:
        which = "initial_load_path" if checkpoint.initial_load_path is not None else "initial_load_in_hf"
        raise ConfigError(
            "is set, but checkpoint.enable is off: nothing would be loaded",
            where=f"checkpoint.{which}",
            mend="Set checkpoint.enable = true; with checkpoint.load_only = true nothing is saved.",
        )
    if checkpoint.initial_adapter_path is not None and ("lora" not in model.converters or not checkpoint.enable):
        raise ConfigError(
            "needs adapters that it fills, and checkpoint.enable = true",
            where="checkpoint.initial_adapter_path",
            mend='Name the converter "lora" in model.converters.',
        )
    if checkpoint.last_save_in_hf and (not checkpoint.enable or checkpoint.load_only):
        reason = "checkpoint.load_only is on" if checkpoint.enable else "checkpoint.enable is off"
        raise ConfigError(f"is set, but {reason}: nothing would be saved", where="checkpoint.last_save_in_hf")
    if checkpoint.load_step != -1 and not checkpoint.enable:
        raise ConfigError("is set, but checkpoint.enable is off: nothing would be loaded", where="checkpoint.load_step")
    if checkpoint.create_seed_checkpoint and not checkpoint.enable:
        raise ConfigError("needs checkpoint.enable = true", where="checkpoint.create_seed_checkpoint")
    if checkpoint.create_seed_checkpoint and checkpoint.load_only:
        raise ConfigError("contradicts checkpoint.load_only = true", where="checkpoint.create_seed_checkpoint")
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        raise ConfigError(
            "Hugging Face files hold only the model, but checkpoint.initial_load_model_only is off",
            where="checkpoint.initial_load_in_hf",
            mend="Set checkpoint.initial_load_model_only = true.",
        )
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path is None and model.hf_assets_path is None:
        raise ConfigError(
            "neither checkpoint.initial_load_path nor model.hf_assets_path says where the weights are",
            where="checkpoint.initial_load_in_hf",
            mend="Set one of them to a directory in Hugging Face layout.",
        )


def _check_profiling(profiling: Profiling) -> None:
    busy = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < busy:
        raise ConfigError(
            f"profile_freq must be at least profiler_warmup + profiler_active: {profiling.profile_freq} is less than "
            f"{profiling.profiler_warmup} + {profiling.profiler_active} = {busy}",
            where="profiling.profile_freq",
        )


def _check_paths(config: JobConfig) -> None:
    """Directories that are certain to be read or written. Those of data are checked where the data is opened."""
    dump_folder = Path(config.job.dump_folder)
    nearest = next(path for path in (dump_folder.absolute(), *dump_folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        found = "cannot be written to" if nearest.is_dir() else "is a file"
        raise ConfigError(f"{nearest} {found}", where="job.dump_folder", mend="Name a folder that can be written.")
    directories = {"model.hf_assets_path": config.model.hf_assets_path}
    if config.model.tokenizer_path != "builtin":
        directories["model.tokenizer_path"] = config.model.tokenizer_path
    checkpoints = Path(config.job.dump_folder) / config.checkpoint.folder
    if not any(checkpoints.glob("step-*")):  # a run that resumes does not read its first weights again
        directories["checkpoint.initial_load_path"] = config.checkpoint.initial_load_path
        directories["checkpoint.initial_adapter_path"] = config.checkpoint.initial_adapter_path
    for key, path in directories.items():
        if path is not None and not Path(path).is_dir():
            found = "is not a directory" if Path(path).exists() else "does not exist"
            raise ConfigError(f'"{path}" {found}', where=key, mend=f"Paths are relative to {Path.cwd()}.")
