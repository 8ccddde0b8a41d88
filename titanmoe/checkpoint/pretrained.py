"""Models from and to folders in Hugging Face layout, in one call each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from titanmoe.checkpoint import adapters
from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.hf_folder import read_hf_config
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import DEFAULT_SHARD_BYTES, save_hf
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.resolve import load_config
from titanmoe.data.tokenizer import BUILTIN_TOKENIZER
from titanmoe.models.build import build_model, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import FAMILIES, Family, family_of_hf_config, get_family
from titanmoe.models.spec import DecoderSpec, with_selection_bias


def spec_of_hf_folder(folder: str | Path) -> tuple[Family, DecoderSpec]:
    """The family and the sizes that a folder's config.json names.

    Raises:
        ConfigError: no folder (nothing is ever downloaded), no or a bad config.json, an architecture or an option of
            it that is not supported, a quantised checkpoint.
    """
    config = read_hf_config(folder)
    try:
        family = family_of_hf_config(config)
        return family, family.from_hf_config(config)
    except ConfigError as error:
        # A family knows the config's contents but not where they came from.
        raise ConfigError(error.what, where=f"{folder}: {error.where}", mend=error.mend) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"a value of config.json is of the wrong kind ({error})", where=str(folder)) from error


def choose_model(
    name: str, flavor: str, hf_assets_path: str | None, *, selection_bias: bool
) -> tuple[Family, DecoderSpec]:
    """What `model.name` and `model.flavor` mean; with `selection_bias`, every router has one.

    Raises:
        ConfigError: no such family or flavor; with the name "auto", as `spec_of_hf_folder`.
    """
    if name == "auto":
        assert hf_assets_path is not None, "validated"
        family, spec = spec_of_hf_folder(hf_assets_path)
    else:
        family = get_family(name)
        spec = family.flavor(flavor)
    return family, with_selection_bias(spec) if selection_bias else spec


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    converters: Sequence[str] = (),
    config: JobConfig | None = None,
) -> Decoder:
    """Load a model from a folder with config.json and safetensors files.

    The model is in train mode, like any new module (there is no dropout; the mode decides only whether routers count
    their tokens). Every parameter requires a gradient.

    Args:
        path: a local folder; a hub's name is refused with the command that gets a copy.
        dtype: of every parameter, whatever the files hold. Routers compute in float32 in any case.
        converters: applied before there are values, so that `quantize.frozen.*` never has them all in `dtype`; `lora`
            is for `convert` afterwards, since files have no values for it.
        config: the settings of converters.

    Raises:
        ConfigError: see `spec_of_hf_folder`, `convert` and `load_hf_weights`.
    """
    family, spec = spec_of_hf_folder(path)
    model = build_model(spec, device="meta", dtype=dtype)
    if converters:
        from titanmoe.converters.apply import convert  # imports torchao, which takes its time

        convert(model, converters, config or load_config(None), torch.device(device))
    materialize(model, device)
    load_hf_weights(model, path, family)
    return model


def save_pretrained(
    model: Decoder,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = True,
    merge: JobConfig | None = None,
) -> None:
    """Save a model as a folder that transformers loads; if it is sharded, every rank must call this.

    Args:
        dtype: float32, bfloat16, float16 or float8_e4m3fn (blocks of 128 x 128 with scales, for the linears of
            attention, feed-forwards and experts; the rest becomes bfloat16); by default each parameter is written in
            its own. Buffers keep theirs.
        tokenizer: a folder whose tokenizer files (and generation_config.json) are copied along, or "builtin".
        max_shard_bytes: a file holds at most this many bytes of tensors.
        overwrite: replace an earlier export.
        verify: read everything back and compare it with the model before the folder is in its place.
        merge: the config that the model's adapters were made with, which are merged into the weights that are written.
            The model stays as it is.

    Raises:
        ConfigError, NotExportedError: see `save_hf`.
    """
    save_hf(
        model,
        path,
        family_of_spec(model.spec),
        model.spec,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_dir=None if tokenizer is None else tokenizer_folder(tokenizer),
        overwrite=overwrite,
        verify=verify,
        adapters=None if merge is None else AdapterSettings.of(merge.lora),
    )


def save_adapter(
    model: Decoder,
    path: str | Path,
    config: JobConfig,
    *,
    layout: Literal["peft", "peft-per-expert"] = "peft",
    base: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Save a model's adapters as a folder that PEFT loads; if it is sharded, every rank must call this.

    Args:
        config: what the adapters were made with (`convert`).
        layout: see `adapters.save_adapter`.
        base: the folder or name of the model below, for those who read the adapter.
        overwrite: replace an earlier adapter.
        verify: read everything back and compare it with the model before the folder is in its place.

    Raises:
        ConfigError, NotExportedError: see `adapters.save_adapter`.
    """
    family, settings = family_of_spec(model.spec), AdapterSettings.of(config.lora)
    adapters.save_adapter(model, path, family, settings, layout=layout, base=base, overwrite=overwrite, verify=verify)


def load_adapter(model: Decoder, path: str | Path, config: JobConfig) -> None:
    """Fill a model's adapters from a folder that PEFT or `save_adapter` wrote; if sharded, every rank must call this.

    Args:
        config: what the adapters were made with (`convert`).

    Raises:
        ConfigError: see `adapters.load_adapter`.
    """
    adapters.load_adapter(model, path, family_of_spec(model.spec), AdapterSettings.of(config.lora))


def tokenizer_folder(tokenizer: str | Path | None) -> Path:
    """Where the files of a tokenizer are: a folder's name as it is; None and "builtin" mean the embedded one."""
    return BUILTIN_TOKENIZER if tokenizer in (None, "builtin") else Path(str(tokenizer))


def family_of_spec(spec: DecoderSpec) -> Family:
    """The family whose checkpoints the model's are.

    Raises:
        ConfigError: the spec names none.
    """
    if not spec.family:
        raise ConfigError(
            "the model belongs to no family, so there is no config.json that describes it",
            where="save_pretrained",
            mend=f"Set `family` in its spec. Families: {', '.join(FAMILIES)}.",
        )
    return get_family(spec.family)
