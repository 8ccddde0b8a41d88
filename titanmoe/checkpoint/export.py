"""A checkpoint of a run, or a folder in Hugging Face layout, written anew as a folder that other programs load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.adapters import AdapterSummary, adapter_tensors, save_adapter, statistics
from titanmoe.checkpoint.base_model import BaseModel
from titanmoe.checkpoint.dcp_storage import Shard, load_shards, read_metadata, stored_tensors
from titanmoe.checkpoint.find import find_start
from titanmoe.checkpoint.hf_entries import entries_of
from titanmoe.checkpoint.hf_folder import CONFIG_NAME as HF_CONFIG_NAME
from titanmoe.checkpoint.hf_folder import GENERATION_CONFIG_NAME, TOKENIZER_NAMES, read_hf_config, require_folder
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import SaveSummary, check_exportable, save_hf
from titanmoe.checkpoint.hf_target import check_target
from titanmoe.checkpoint.logits import logits_differ, some_logits
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
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.scaled_casts import FP8
from titanmoe.parallel.ranks import Ranks

logger = logging.getLogger("titanmoe.checkpoint")

_ALONE = Ranks(0, 1, None)
_ADAPTERS = "lora"


@dataclass(frozen=True)
class ModelSource:
    """A model in files, known by its small files only.

    Attributes:
        dtype: what the parameters have in memory.
        tokenizer_dir: where its tokenizer is; None if it has none.
        generation_config_dir: where its generation_config.json is, if not with the tokenizer.
        fill: gives a model in memory its values; one that `build` made, or a model of the spec.
        run: what has adapters beside the model, if it has any.
    """

    family: Family
    spec: DecoderSpec
    dtype: torch.dtype
    tokenizer_dir: Path | None
    generation_config_dir: Path | None
    fill: Callable[[Decoder], object]
    run: AdaptedRun | None = None

    def build(self, dtype: torch.dtype | None = None) -> Decoder:
        """The model on the meta device, with its adapters if it has any."""
        model = build_model(self.spec, dtype=dtype or self.dtype)
        if self.run is not None:
            from titanmoe.converters.apply import convert  # imports torchao, which takes its time

            convert(model, [_ADAPTERS], self.run.config, "cpu")
        return model


@dataclass(frozen=True)
class AdaptedRun:
    """A run that trains adapters.

    Attributes:
        base: the folder of the model that they are for; None if that is in the checkpoint.
        read: fills tensors, by their names in the model, from the checkpoint.
    """

    config: JobConfig
    base: str | None
    read: Callable[[Mapping[str, Tensor]], object]

    @property
    def settings(self) -> AdapterSettings:
        return AdapterSettings.of(self.config.lora)


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
    merge: bool = False,
    base: str | Path | None = None,
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
        merge: merge adapters into the weights. With `verify`, logits of what was written are compared, too.
        base: the folder of the model that adapters are for, where it is not where the run had it.

    Raises:
        ConfigError: no usable checkpoint, config or tokenizer there; adapters that are not to be merged, or none to
            merge; or see `save_hf`.
        NotExportedError: see `save_hf`.
    """
    if require_folder(checkpoint).resolve() == Path(output).expanduser().resolve():
        raise ConfigError("is the checkpoint itself", where=str(output), mend="Name another folder to write.")
    source = find_model(checkpoint, dtype, tokenizer, config_file, on_progress, base)
    if merge != (source.run is not None):
        raise ConfigError(
            "there are no adapters to merge" if merge else "a run that trained adapters",
            where=str(checkpoint),
            mend="Leave --merge out."
            if merge
            else "Merge them into the weights with --merge, or write them with --format peft.",
        )
    plain = build_model(source.spec, dtype=source.dtype)
    check_exportable(plain, source.family, source.spec, dtype)
    num_bytes = sum(entry.num_bytes for entry in entries_of(model_tensors(plain), source.family, dtype))
    check_target(Path(output).expanduser().resolve(), overwrite, num_bytes)
    model = source.build()
    source.fill(materialize(model, "cpu"))
    compare = None
    if source.run is not None and verify:
        compare = partial(logits_differ, some_logits(model), model, source.family, dtype)
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
        adapters=None if source.run is None else source.run.settings,
        compare=compare,
    )


def export_adapter(
    checkpoint: str | Path,
    output: str | Path,
    *,
    layout: str = "peft",
    verify: bool = True,
    overwrite: bool = False,
    config_file: str | Path | None = None,
    tell: Callable[[str], object] | None = None,
) -> AdapterSummary:
    """Write the adapters of a run's checkpoint as a folder that PEFT loads; the base model is not read.

    Args:
        checkpoint: of a run; see `export_hf`.
        layout: see `save_adapter`.
        tell: is given the lines of a table of their values.

    Raises:
        ConfigError: no usable checkpoint or config there, or no adapters in it; or see `save_adapter`.
        NotExportedError: see `save_adapter`.
    """
    source = find_model(checkpoint, torch.float32, "builtin", config_file)
    if source.run is None:
        raise ConfigError("has no adapters", where=str(checkpoint), mend="Export the model with --format hf.")
    model = source.build()
    for name, parameter in adapter_tensors(model).items():
        owner, _, own_name = name.rpartition(".")
        empty = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        model.get_submodule(owner).register_parameter(own_name, empty)
    found = adapter_tensors(model)
    source.run.read(found)
    if tell is not None:
        for line in statistics(found):
            tell(line)
    return save_adapter(
        model,
        output,
        source.family,
        source.run.settings,
        layout=layout,
        base=source.run.base,
        overwrite=overwrite,
        verify=verify,
    )


def find_model(
    checkpoint: str | Path,
    dtype: torch.dtype,
    tokenizer: str | None = None,
    config_file: str | Path | None = None,
    on_progress: Progress | None = None,
    base: str | Path | None = None,
) -> ModelSource:
    """The model of a checkpoint, before any of its weights is read. Arguments and errors as for `export_hf`."""
    folder = require_folder(checkpoint)
    if not (folder / HF_CONFIG_NAME).is_file() and not any(folder.glob("*.safetensors")):
        return _run_checkpoint(folder, tokenizer, config_file, on_progress, base)
    if config_file is not None:
        raise ConfigError(
            "a folder in Hugging Face layout has its own config.json",
            where=str(checkpoint),
            mend="Leave the config out.",
        )
    return _hf_folder(folder, dtype, tokenizer, on_progress)


def _hf_folder(folder: Path, dtype: torch.dtype, tokenizer: str | None, on_progress: Progress | None) -> ModelSource:
    family, spec = spec_of_hf_folder(folder)
    if dtype == FP8:
        # As they are in the files: quantising rounded values would round them twice.
        dtype = _dtype_in(folder)
    tokenizer_dir: Path | None = folder
    if tokenizer is not None:
        tokenizer_dir = require_folder(tokenizer_folder(tokenizer))
    elif not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        logger.info("%s has no tokenizer: none is written", folder)
        tokenizer_dir = None
    has_generation_config = tokenizer is None and (folder / GENERATION_CONFIG_NAME).is_file()
    report = None if on_progress is None else partial(on_progress, "read")
    return ModelSource(
        family,
        spec,
        dtype,
        tokenizer_dir,
        folder if has_generation_config else None,
        lambda model: load_hf_weights(model, folder, family, on_progress=report),
    )


def _dtype_in(folder: Path) -> torch.dtype:
    config = read_hf_config(folder)
    is_float32 = config.get("dtype", config.get("torch_dtype")) == "float32"
    return torch.float32 if is_float32 else torch.bfloat16


def _run_checkpoint(
    folder: Path,
    tokenizer: str | None,
    config_file: str | Path | None,
    on_progress: Progress | None,
    base_folder: str | Path | None,
) -> ModelSource:
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
        if manifest.base is not None:
            folder = base_folder or manifest.base.path
            manifest.base.check(BaseModel.of(folder))
            load_hf_weights(model, folder, family, on_progress=partial(on_progress, "read") if on_progress else None)
        wanted = named_model_tensors(model, trained_only=manifest.base is not None)
        check_match(step_folder, stored, wanted, ["model"], _ALONE)
        read(wanted)

    def read(wanted: Mapping[str, Tensor]) -> None:
        logger.info("Reading step %d from %s", manifest.step, step_folder)
        try:
            load_shards(step_folder, {name: Shard.of(tensor) for name, tensor in wanted.items()}, metadata, _ALONE)
        except OSError as error:
            raise ConfigError(f"reading failed: {error.strerror}", where=str(error.filename or step_folder)) from error

    def read_adapters(wanted: Mapping[str, Tensor]) -> None:
        named = {f"model.{name}": tensor for name, tensor in wanted.items()}
        there = {name: tensor for name, tensor in stored.items() if is_adapter(name) and name.startswith("model.")}
        check_match(step_folder, there, named, ["model"], _ALONE)
        read(named)

    run = None
    if _ADAPTERS in config.model.converters:
        base = str(base_folder or (manifest.base.path if manifest.base else config.model.hf_assets_path or "")) or None
        run = AdaptedRun(config, base, read_adapters)
    embedding = stored.get("model.tok_embeddings.weight")
    # Without an embedding it is of another model, as `fill` will say.
    dtype = embedding.dtype if embedding else torch.float32
    if manifest.base is not None and (folder := Path(base_folder or manifest.base.path)).is_dir():
        dtype = _dtype_in(folder)
    return ModelSource(family, spec, dtype, tokenizer_dir, None, fill, run)


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
