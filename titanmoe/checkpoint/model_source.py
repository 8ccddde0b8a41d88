"""What model a folder holds: of a run, in Hugging Face layout, or an adapter. Known before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.adapter_files import CONFIG_NAME as ADAPTER_CONFIG_NAME
from titanmoe.checkpoint.adapter_files import base_of_adapter, lora_section
from titanmoe.checkpoint.adapters import adapter_tensors, load_adapter
from titanmoe.checkpoint.base_model import BaseModel
from titanmoe.checkpoint.dcp_storage import Shard, load_shards, read_metadata, stored_tensors
from titanmoe.checkpoint.find import find_start
from titanmoe.checkpoint.hf_folder import CONFIG_NAME as HF_CONFIG_NAME
from titanmoe.checkpoint.hf_folder import (
    GENERATION_CONFIG_NAME,
    TOKENIZER_NAMES,
    list_tensors,
    read_hf_config,
    require_folder,
)
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.matching import check_match
from titanmoe.checkpoint.pretrained import choose_model, spec_of_hf_folder, tokenizer_folder
from titanmoe.checkpoint.progress import Progress
from titanmoe.checkpoint.run_config import CONFIG_NAME
from titanmoe.checkpoint.run_state import named_model_tensors
from titanmoe.config.changes import config_fingerprint
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.resolve import resolve
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model, init_adapters
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.scaled_casts import FP8
from titanmoe.parallel.ranks import Ranks

logger = logging.getLogger("titanmoe.checkpoint")

_ALONE = Ranks(0, 1, None)
_LORA = "lora"


@dataclass(frozen=True)
class ModelSource:
    """A model in files, known by its small files only.

    Attributes:
        dtype: what the parameters have in memory.
        tokenizer_dir: where its tokenizer is; None if it has none.
        generation_config_dir: where its generation_config.json is, if not with the tokenizer.
        fill: gives what `build` made its values, once it is in memory.
        converters: what adds to the model or changes how it is stored, with `config` for their settings.
        adapters: None if it has none.
    """

    family: Family
    spec: DecoderSpec
    dtype: torch.dtype
    tokenizer_dir: Path | None
    generation_config_dir: Path | None
    fill: Callable[[Decoder], object]
    converters: tuple[str, ...] = ()
    config: JobConfig | None = None
    adapters: AdapterSource | None = None

    def build(self) -> Decoder:
        """The model on the meta device, as it was trained: its adapters on it, and what is quantised below them."""
        model = build_model(self.spec, dtype=self.dtype)
        if self.config is not None and self.converters:
            from titanmoe.converters.apply import convert  # imports torchao, which takes its time

            convert(model, self.converters, self.config, "cpu")
        return model


@dataclass(frozen=True)
class AdapterSource:
    """Adapters of a model.

    Attributes:
        base: the folder of the model that they are for; None if that is in the checkpoint.
        fill: gives a model's adapters their values, and leaves the rest of it.
        seed: what their first values follow from; None if they began as other adapters.
    """

    settings: AdapterSettings
    base: str | None
    fill: Callable[[Decoder], object]
    seed: int | None = None


def find_model(
    checkpoint: str | Path,
    dtype: torch.dtype,
    tokenizer: str | None = None,
    config_file: str | Path | None = None,
    on_progress: Progress | None = None,
    base: str | Path | None = None,
) -> ModelSource:
    """The model of a checkpoint, before any of its weights is read.

    Args:
        checkpoint: a run's step-N folder; its checkpoint folder, or the run's own, whose newest step is taken; a
            folder in Hugging Face layout, quantised or not; or one with an adapter in PEFT's.
        dtype: that the parameters of a folder in Hugging Face layout get; FP8 is that of its files. Those of a run are
            as exact as they were saved, or as their base's files are.
        tokenizer: "builtin", or a folder with the tokenizer, where it should not be the checkpoint's own.
        config_file: the run's config.toml, where it is not in the run's folder.
        on_progress: by default, a line is logged every ten seconds.
        base: the folder of the model that adapters are for, where it is not where the run had it.

    Raises:
        ConfigError: no usable checkpoint, config or tokenizer there.
    """
    folder = require_folder(checkpoint)
    is_adapter_folder = (folder / ADAPTER_CONFIG_NAME).is_file()
    if not (is_adapter_folder or (folder / HF_CONFIG_NAME).is_file() or any(folder.glob("*.safetensors"))):
        return _run_checkpoint(folder, dtype, tokenizer, config_file, on_progress, base)
    if config_file is not None:
        raise ConfigError(
            f"has its own {ADAPTER_CONFIG_NAME if is_adapter_folder else HF_CONFIG_NAME}",
            where=str(checkpoint),
            mend="Leave the config out.",
        )
    if not is_adapter_folder:
        if base is not None:
            what = "is a whole model, and a base is named for it"
            raise ConfigError(what, where=str(checkpoint), mend=f"Name a folder with an {ADAPTER_CONFIG_NAME}.")
        return _hf_folder(folder, dtype, tokenizer, on_progress)
    base_folder = require_folder(base or base_of_adapter(folder))
    return _with_adapter(_hf_folder(base_folder, dtype, tokenizer, on_progress), folder, base_folder)


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


def _with_adapter(source: ModelSource, folder: Path, base: Path) -> ModelSource:
    section = lora_section(folder, source.family, source.spec)
    settings = AdapterSettings.of(section)

    def fill(model: Decoder) -> None:
        source.fill(model)
        fill_adapters(model)

    def fill_adapters(model: Decoder) -> None:
        init_adapters(model, 0)  # the files may have a smaller rank in some modules
        load_adapter(model, folder, source.family, settings)

    adapters = AdapterSource(settings, str(base), fill_adapters)
    return replace(source, fill=fill, converters=(_LORA,), config=JobConfig(lora=section), adapters=adapters)


def _dtype_of_base(folder: Path, wanted: torch.dtype) -> torch.dtype:
    """What holds the values of its files as they are, so that a sum with them is rounded where it is written, and only
    there. What is in few bits is rounded to bfloat16 unless float32 is wanted, which takes twice the memory.
    """
    dtypes = {info.dtype for info in list_tensors(folder).values() if len(info.shape) > 1}
    if dtypes == {"BF16"} or (dtypes & {"F8_E4M3", "U8"} and wanted != torch.float32):
        return torch.bfloat16
    return torch.float32


def _dtype_in(folder: Path) -> torch.dtype:
    config = read_hf_config(folder)
    is_float32 = config.get("dtype", config.get("torch_dtype")) == "float32"
    return torch.float32 if is_float32 else torch.bfloat16


def _run_checkpoint(
    folder: Path,
    wanted: torch.dtype,
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
    if manifest.adapters is not None:
        config = _with_scale_of(manifest.adapters, config, config_path)
    config = _with_base(config, base_folder)
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
    base = None if manifest.base is None else str(base_folder or manifest.base.path)

    def fill(model: Decoder) -> None:
        wanted = named_model_tensors(model, trained_only=base is not None)
        check_match(step_folder, stored, wanted, ["model"], _ALONE)
        if manifest.base is not None and base is not None:
            manifest.base.check(BaseModel.of(base))
            load_hf_weights(model, base, family, on_progress=partial(on_progress, "read") if on_progress else None)
        read(wanted)

    def fill_adapters(model: Decoder) -> None:
        wanted = {f"model.{name}": tensor for name, tensor in adapter_tensors(model).items()}
        there = {name: tensor for name, tensor in stored.items() if is_adapter(name)}
        check_match(step_folder, there, wanted, ["model"], _ALONE)
        read(wanted)

    def read(wanted: Mapping[str, Tensor]) -> None:
        logger.info("Reading step %d from %s", manifest.step, step_folder)
        try:
            load_shards(step_folder, {name: Shard.of(tensor) for name, tensor in wanted.items()}, metadata, _ALONE)
        except OSError as error:
            raise ConfigError(f"reading failed: {error.strerror}", where=str(error.filename or step_folder)) from error

    embedding = stored.get("model.tok_embeddings.weight")
    # Without an embedding it is of another model, as `fill` will say.
    dtype = embedding.dtype if embedding else torch.float32
    if base is not None and Path(base).is_dir():
        dtype = _dtype_of_base(Path(base), wanted)
    adapters = None
    if _LORA in config.model.converters:
        begins = config.checkpoint
        is_fresh = begins.initial_adapter_path is None and (begins.initial_load_in_hf or not begins.initial_load_path)
        seed = config.debug.seed or 0
        settings = AdapterSettings.of(config.lora)
        adapters = AdapterSource(
            settings, base or config.model.hf_assets_path, fill_adapters, seed if is_fresh else None
        )
    kept = tuple(name for name in config.model.converters if name == _LORA or name.startswith("quantize.frozen."))
    if left := [name for name in config.model.converters if name not in kept]:
        logger.info("%s: not used here, since no values of the model depend on it", ", ".join(left))
    return ModelSource(family, spec, dtype, tokenizer_dir, None, fill, kept, config, adapters)


def _with_scale_of(saved: AdapterSettings, config: JobConfig, path: Path) -> JobConfig:
    """With the scale that a step's adapters were trained with. The newest config may have another."""
    lora = replace(config.lora, rank=saved.rank, alpha=saved.alpha, use_rslora=saved.use_rslora)
    if lora != config.lora:
        text = "adapters are scaled as when they were saved, not as %s says: rank %d, alpha %g, use_rslora %s"
        logger.info(text, path, saved.rank, saved.alpha, str(saved.use_rslora).lower())
    return replace(config, lora=lora)


def _with_base(config: JobConfig, base_folder: str | Path | None) -> JobConfig:
    """With the folder of the base where it is now."""
    model = config.model
    if base_folder is None or model.hf_assets_path is None or not Path(base_folder).is_dir():
        return config  # where it is needed, that it is no folder is told
    return replace(config, model=replace(model, hf_assets_path=str(base_folder)))


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
            mend=f"{_RELATIVE} --base DIR names another one.",
        )
    return choose_model(model.name, model.flavor, model.hf_assets_path, selection_bias=config.moe.bias_update_rate > 0)
