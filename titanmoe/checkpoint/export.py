"""A checkpoint of a run, or a folder in Hugging Face layout, written anew as a folder that other programs load."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from titanmoe.checkpoint.dcp_storage import Shard, load_shards, read_metadata, stored_tensors
from titanmoe.checkpoint.find import find_start
from titanmoe.checkpoint.hf_entries import entries_of
from titanmoe.checkpoint.hf_folder import CONFIG_NAME as HF_CONFIG_NAME
from titanmoe.checkpoint.hf_folder import GENERATION_CONFIG_NAME, TOKENIZER_NAMES, read_hf_config, require_folder
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import SaveSummary, check_exportable, save_hf
from titanmoe.checkpoint.hf_target import check_target
from titanmoe.checkpoint.matching import check_match
from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.checkpoint.pretrained import choose_model, spec_of_hf_folder, tokenizer_folder
from titanmoe.checkpoint.progress import Progress
from titanmoe.checkpoint.run_config import CONFIG_NAME
from titanmoe.checkpoint.run_state import named_model_tensors
from titanmoe.config.changes import config_fingerprint
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.resolve import resolve
from titanmoe.models.build import build_model, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.scaled_casts import FP8
from titanmoe.parallel.ranks import Ranks

logger = logging.getLogger("titanmoe.checkpoint")

_ALONE = Ranks(0, 1, None)


@dataclass(frozen=True)
class _Source:
    """A model in files, known by its small files only.

    Attributes:
        dtype: what the parameters have in memory.
        tokenizer_dir: where its tokenizer is; None if it has none.
        generation_config_dir: where its generation_config.json is, if not with the tokenizer.
        fill: gives a model in memory its values.
    """

    family: Family
    spec: DecoderSpec
    dtype: torch.dtype
    tokenizer_dir: Path | None
    generation_config_dir: Path | None
    fill: Callable[[Decoder], object]


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    verify: bool = True,
    overwrite: bool = False,
    tokenizer: str | None = None,
    config_file: str | Path | None = None,
    on_progress: Progress | None = None,
) -> SaveSummary:
    """Write a model as a folder that transformers loads. Everything that can be known in advance is checked first.

    Args:
        checkpoint: a run's step-N folder; its checkpoint folder, or the run's own, whose newest step is taken; or a
            folder in Hugging Face layout, quantised or not.
        output: the folder to write.
        dtype: see `save_hf`.
        tokenizer: "builtin", or a folder with the tokenizer, where it should not be the checkpoint's own.
        config_file: the run's config.toml, where it is not in the run's folder.
        on_progress: by default, a line is logged every ten seconds.

    Raises:
        ConfigError: no usable checkpoint, config or tokenizer there; or see `save_hf`.
        NotExportedError: see `save_hf`.
    """
    folder = require_folder(checkpoint)
    if folder.resolve() == Path(output).expanduser().resolve():
        raise ConfigError("is the checkpoint itself", where=str(output), mend="Name another folder to write.")
    if (folder / HF_CONFIG_NAME).is_file() or any(folder.glob("*.safetensors")):
        if config_file is not None:
            raise ConfigError(
                "a folder in Hugging Face layout has its own config.json",
                where=str(checkpoint),
                mend="Leave the config out.",
            )
        source = _hf_folder(folder, dtype, tokenizer, on_progress)
    else:
        source = _run_checkpoint(folder, tokenizer, config_file)
    model = build_model(source.spec, dtype=source.dtype)
    check_exportable(model, source.family, source.spec, dtype)
    num_bytes = sum(entry.num_bytes for entry in entries_of(model_tensors(model), source.family, dtype))
    check_target(Path(output).expanduser().resolve(), overwrite, num_bytes)
    source.fill(materialize(model, "cpu"))
    return save_hf(
        model,
        output,
        source.family,
        source.spec,
        dtype=dtype,
        tokenizer_dir=source.tokenizer_dir,
        generation_config_dir=source.generation_config_dir,
        overwrite=overwrite,
        verify=verify,
        on_progress=on_progress,
    )


def _hf_folder(folder: Path, dtype: torch.dtype, tokenizer: str | None, on_progress: Progress | None) -> _Source:
    family, spec = spec_of_hf_folder(folder)
    if dtype == FP8:
        # As they are in the files: quantising rounded values would round them twice.
        config = read_hf_config(folder)
        is_float32 = config.get("dtype", config.get("torch_dtype")) == "float32"
        dtype = torch.float32 if is_float32 else torch.bfloat16
    tokenizer_dir: Path | None = folder
    if tokenizer is not None:
        tokenizer_dir = require_folder(tokenizer_folder(tokenizer))
    elif not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        logger.info("%s has no tokenizer: none is written", folder)
        tokenizer_dir = None
    has_generation_config = tokenizer is None and (folder / GENERATION_CONFIG_NAME).is_file()
    report = None if on_progress is None else partial(on_progress, "read")
    return _Source(
        family,
        spec,
        dtype,
        tokenizer_dir,
        folder if has_generation_config else None,
        lambda model: load_hf_weights(model, folder, family, on_progress=report),
    )


def _run_checkpoint(folder: Path, tokenizer: str | None, config_file: str | Path | None) -> _Source:
    if (folder / CONFIG_NAME).is_file():
        # The run's own folder.
        config_file = config_file or folder / CONFIG_NAME
        folder = folder / resolve(file=str(config_file)).config.checkpoint.folder
    try:
        step_folder, manifest = find_start(folder, _ALONE, resumable=False)
    except ConfigError as error:
        mend = "Name a step-N folder, the folder that contains them, a run's folder, or one in Hugging Face layout."
        raise ConfigError(error.what, where=error.where, mend=mend) from error
    config_path = _config_of(step_folder) if config_file is None else Path(config_file)
    config = resolve(file=str(config_path)).config
    if config_fingerprint(config) != manifest.config_hash:
        logger.info("%s differs from the config that step %d was saved under", config_path, manifest.step)
    family, spec = _model_of(config, config_path)
    tokenizer_dir = tokenizer_folder(tokenizer or config.model.tokenizer_path or config.model.hf_assets_path)
    if not tokenizer_dir.is_dir():
        raise ConfigError(
            "the folder of the run's tokenizer is gone",
            where=str(tokenizer_dir),
            mend=f"{_RELATIVE} --tokenizer DIR names another one.",
        )
    metadata = read_metadata(step_folder)
    stored = stored_tensors(metadata)

    def fill(model: Decoder) -> None:
        wanted = named_model_tensors(model)
        check_match(step_folder, stored, wanted, ["model"], _ALONE)
        logger.info("Reading step %d from %s", manifest.step, step_folder)
        try:
            load_shards(step_folder, {name: Shard.of(tensor) for name, tensor in wanted.items()}, metadata, _ALONE)
        except OSError as error:
            raise ConfigError(f"reading failed: {error.strerror}", where=str(error.filename or step_folder)) from error

    embedding = stored.get("model.tok_embeddings.weight")
    # Without an embedding it is of another model, as `fill` will say.
    return _Source(family, spec, embedding.dtype if embedding else torch.float32, tokenizer_dir, None, fill)


_RELATIVE = "Names in the config that do not begin with / are relative to the folder the job was started in."


def _config_of(step_folder: Path) -> Path:
    """The config.toml of the run whose checkpoint it is, by the place that the config says it has."""
    folder = step_folder.resolve().parent
    mend = "--config FILE names the config.toml of the run."
    for run_folder in folder.parents:
        path = run_folder / CONFIG_NAME
        if not path.is_file():
            continue
        try:
            config = resolve(file=str(path)).config
        except ConfigError as error:
            raise ConfigError(error.what, where=error.where, mend=f"{error.mend}\n  {mend}".lstrip()) from error
        if (run_folder / config.checkpoint.folder).resolve() == folder:
            return path
        break
    raise ConfigError(
        f"the run's {CONFIG_NAME}, which says what model this is, is not in a folder above",
        where=str(step_folder),
        mend=mend,
    )


def _model_of(config: JobConfig, path: Path) -> tuple[Family, DecoderSpec]:
    model = config.model
    if model.name == "auto" and (model.hf_assets_path is None or not Path(model.hf_assets_path).is_dir()):
        raise ConfigError(
            f'model.name is "auto", and model.hf_assets_path, whose config.json says what model it is, is no folder: '
            f"{model.hf_assets_path}",
            where=str(path),
            mend=f"{_RELATIVE} Or change a copy of the config, and name it with --config.",
        )
    return choose_model(model.name, model.flavor, model.hf_assets_path, selection_bias=config.moe.bias_update_rate > 0)
