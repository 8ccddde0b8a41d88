"""A checkpoint of a run, a folder in Hugging Face layout or an adapter, written anew for other programs to load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from titanmoe.checkpoint.adapter_config import adapter_config
from titanmoe.checkpoint.adapter_figures import Figures
from titanmoe.checkpoint.adapters import AdapterSummary, adapter_tensors, save_adapter
from titanmoe.checkpoint.hf_entries import entries_of
from titanmoe.checkpoint.hf_save import SaveSummary, check_exportable, save_hf
from titanmoe.checkpoint.hf_target import check_target
from titanmoe.checkpoint.logits import adapted_logits_differ, merged_logits_differ, some_logits
from titanmoe.checkpoint.model_source import AdapterSource, find_model
from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.checkpoint.progress import Progress
from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model, init_adapters, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.parallel.fsdp import init_magnitudes


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
        checkpoint, tokenizer, config_file, on_progress, base: see `find_model`.
        output: the folder to write.
        dtype: see `save_hf`.
        merge: merge adapters into the weights. With `verify`, logits of what was written are compared, too.

    Raises:
        ConfigError: adapters that are not to be merged, or none to merge; or see `find_model` and `save_hf`.
        NotExportedError: see `save_hf`.
    """
    _check_apart(output, checkpoint, "the checkpoint")
    source = find_model(checkpoint, dtype, tokenizer, config_file, on_progress, base)
    if source.adapters is not None and source.adapters.base is not None:
        _check_apart(output, source.adapters.base, "the model that the adapters are for")
    if merge and source.adapters is None:
        raise ConfigError("there are no adapters to merge", where=str(checkpoint), mend="Leave --merge out.")
    if source.adapters is not None and not merge:
        mend = "Merge them into the weights with --merge, or write them with --format peft."
        raise ConfigError("has adapters beside its weights", where=str(checkpoint), mend=mend)
    plain = build_model(source.spec, dtype=source.dtype)
    check_exportable(plain, source.family, source.spec, dtype)
    num_bytes = sum(entry.num_bytes for entry in entries_of(model_tensors(plain), source.family, dtype))
    check_target(Path(os.path.expanduser(output)).resolve(), overwrite, num_bytes)
    model = source.build()
    source.fill(materialize(model, "cpu"))
    compare = None
    if merge and verify:
        compare = partial(merged_logits_differ, some_logits(model), model, source.family, dtype)
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
        adapters=None if source.adapters is None else source.adapters.settings,
        compare=compare,
    )


@dataclass(frozen=True)
class AdapterFigures:
    """Figures of the values of each adapter's parameter.

    Attributes:
        before: those that training began with; None if these do not follow from the seed. First magnitudes follow from
            the base, too.
    """

    before: dict[str, Figures] | None
    after: dict[str, Figures]


def export_adapter(
    checkpoint: str | Path,
    output: str | Path,
    *,
    layout: str = "peft",
    verify: bool = True,
    overwrite: bool = False,
    config_file: str | Path | None = None,
    on_progress: Progress | None = None,
    base: str | Path | None = None,
    with_figures: bool = False,
) -> tuple[AdapterSummary, AdapterFigures | None]:
    """Write the adapters of a checkpoint as a folder that PEFT loads.

    Args:
        checkpoint, config_file, on_progress, base: see `find_model`.
        layout: see `save_adapter`.
        verify: also read what was written into the model, whose logits must be what they were. Without, the base model
            is not read.
        with_figures: also tell of the values.

    Raises:
        ConfigError: no adapters there; or see `find_model` and `save_adapter`.
        NotExportedError: see `save_adapter`.
    """
    _check_apart(output, checkpoint, "the checkpoint")
    source = find_model(checkpoint, torch.bfloat16, "builtin", config_file, on_progress, base)
    if source.adapters is None:
        raise ConfigError("has no adapters", where=str(checkpoint), mend="Export the model with --format hf.")
    check_target(Path(os.path.expanduser(output)).resolve(), overwrite, 0)
    model, compare = source.build(), None
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    adapter_config(source.family, source.spec, shapes, source.adapters.settings, layout, None)
    if verify:
        source.fill(materialize(model, "cpu"))
        compare = partial(adapted_logits_differ, some_logits(model), model, source.family, source.adapters.settings)
    else:
        _materialize_adapters(model)
        source.adapters.fill(model)
    found = _adapter_figures(model, source.adapters, has_base=verify) if with_figures else None
    summary = save_adapter(
        model,
        output,
        source.family,
        source.adapters.settings,
        layout=layout,
        base=_absolute(source.adapters.base),
        overwrite=overwrite,
        verify=verify,
        compare=compare,
    )
    return summary, found


def _check_apart(output: str | Path, source: str | Path, what: str) -> None:
    if Path(os.path.expanduser(source)).resolve() == Path(os.path.expanduser(output)).resolve():
        raise ConfigError(f"is {what} itself", where=str(output), mend="Name another folder to write.")


def _absolute(base: str | None) -> str | None:
    """For whoever reads it from another folder."""
    return str(Path(base).resolve()) if base is not None and Path(base).is_dir() else base


def _materialize_adapters(model: Decoder) -> None:
    """Give nothing else of a meta model memory."""
    for name, parameter in adapter_tensors(model).items():
        owner, _, own_name = name.rpartition(".")
        empty = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        model.get_submodule(owner).register_parameter(own_name, empty)


def _adapter_figures(model: Decoder, adapters: AdapterSource, has_base: bool) -> AdapterFigures:
    after = {name: Figures.of(tensor) for name, tensor in adapter_tensors(model).items()}
    if adapters.seed is None:
        return AdapterFigures(None, after)
    init_adapters(model, adapters.seed)
    if has_base:
        init_magnitudes(model)
    known = {name: tensor for name, tensor in adapter_tensors(model).items() if has_base or "magnitude" not in name}
    before = {name: Figures.of(tensor) for name, tensor in known.items()}
    adapters.fill(model)
    return AdapterFigures(before, after)
