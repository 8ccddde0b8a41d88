"""Adapters out of a model into a folder that PEFT loads, and from such a folder into a model."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.adapter_config import PER_EXPERT, AdapterSettings, adapter_config
from titanmoe.checkpoint.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder
from titanmoe.checkpoint.adapter_names import pieces_by_name, rules_of
from titanmoe.checkpoint.files import sync_folder
from titanmoe.checkpoint.gather import gather_each
from titanmoe.checkpoint.hf_entries import Entry
from titanmoe.checkpoint.hf_target import check_target, write_folder, write_json
from titanmoe.checkpoint.model_tensors import model_tensors, ranks_sharing, tensors_of_all
from titanmoe.checkpoint.row_source import Files
from titanmoe.checkpoint.safetensors_io import TensorWriter
from titanmoe.config.errors import ConfigError
from titanmoe.models.adapters import is_adapter
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family
from titanmoe.ops.sharding import local_box, local_tensor

logger = logging.getLogger("titanmoe.checkpoint")


@dataclass(frozen=True)
class AdapterSummary:
    """What was written: tensors, their bytes, and how long it took, with comparing."""

    num_tensors: int
    num_bytes: int
    seconds: float


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model's adapters, by name."""
    return {name: tensor for name, tensor in model_tensors(model).items() if is_adapter(name)}


def save_adapter(
    model: Decoder,
    folder: str | Path,
    family: Family,
    settings: AdapterSettings,
    *,
    layout: str = "peft",
    base: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    compare: Callable[[Path], str] | None = None,
) -> AdapterSummary:
    """Write a model's adapters so that PEFT ("peft") or a server that takes a pair for every expert loads them.

    If the model is sharded, every rank must call this; parameters are gathered one by one. The folder is there whole,
    or not at all. In the layout "peft-per-expert" all adapters have one scale, which readers expect who know no
    patterns: B of experts is multiplied with what theirs differs by.

    Args:
        layout: "peft" or "peft-per-expert"; see `adapter_names`.
        base: the base model's folder or name, which readers may look up.
        verify: read everything back and compare it with the model before the folder is in its place.
        compare: also says what is wrong with the folder, "" if nothing; it may change the model. One process only.

    Raises:
        ConfigError: the model has no adapters; no such layout for the family; DoRA, which PEFT does not have for
            stacked experts; the target is in use; or the disk is full.
        NotExportedError: what was written is not the model's.
    """
    started = time.perf_counter()
    tensors = adapter_tensors(model)
    ranks = ranks_sharing(model_tensors(model).values())
    of_all = tensors_of_all(tensors, ranks)
    target = Path(os.path.expanduser(folder)).resolve()
    shapes = {name: tuple(tensor.shape) for name, tensor in of_all.items()}
    entries: list[Entry] = []

    def prepare(folder: Path | None) -> None:
        if not shapes:
            raise ConfigError("the model has no adapters", mend="Export it with --format hf.")
        entries.extend(_entries(of_all, family, layout))
        config = adapter_config(family, model.spec, shapes, settings, layout, base)
        if folder is not None:
            check_target(target, overwrite, sum(entry.num_bytes for entry in entries))
            folder.mkdir(parents=True)
            write_json(folder / CONFIG_NAME, config)

    def write(folder: Path | None) -> None:
        _write(tensors, entries, None if folder is None else folder / WEIGHTS_NAME, settings, layout)

    def difference(folder: Path | None) -> str:
        found = _difference(tensors, shapes, folder, family, settings)
        return found or ("" if compare is None or folder is None else compare(folder))

    wrote = write_folder(target, "adapter", ranks, prepare, write, difference if verify else None)
    summary = AdapterSummary(len(entries), sum(entry.num_bytes for entry in entries), time.perf_counter() - started)
    if wrote:
        text = "Wrote an adapter of %.1f MB (%d tensors, %s) to %s in %.1f s, %s"
        state = "verified" if verify else "not verified"
        logger.info(text, summary.num_bytes / 1e6, len(entries), layout, target, summary.seconds, state)
    return summary


def load_adapter(
    model: Decoder, folder: str | Path, family: Family, settings: AdapterSettings, *, tells: bool = True
) -> None:
    """Fill the adapters of a model from a folder that PEFT or `save_adapter` wrote, in either layout.

    The model then computes what the folder's adapter does on its base. Where the files have a smaller rank than the
    model (gate and up apart: together), B is zero and A stays as it is. If the model is sharded, every rank must call
    this; each reads all files, a parameter at a time.

    Raises:
        ConfigError: see `AdapterFolder`. Nothing was changed then, unless a file turns out to be damaged.
    """
    tensors = adapter_tensors(model)
    ranks = ranks_sharing(model_tensors(model).values())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of_all(tensors, ranks).items()}
    if not shapes:
        raise ConfigError("the model has no adapters to fill", where=str(folder), mend='Add the converter "lora".')

    def load() -> None:
        found = AdapterFolder(folder, family, shapes, settings)
        if tells and ranks.rank == 0:
            found.log_changes()
        with Files() as files:
            for name, tensor in tensors.items():
                box, local = local_box(tensor), local_tensor(tensor.detach())
                region = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))
                values = found.value(name, files)[region].to(local.device)
                local.copy_(torch.where(values.isnan(), local, values))

    ranks.on_each(load)
    if tells:
        ranks.log(logging.INFO, "loaded the adapter of %s: %d parameters", folder, len(shapes))


def _entries(tensors: Mapping[str, Tensor], family: Family, layout: str) -> list[Entry]:
    """Everything to write. What gate and up share is written for both.

    Raises:
        ConfigError: there is no place for a tensor.
    """
    by_name = pieces_by_name(rules_of(family, layout), {name: tensor.shape for name, tensor in tensors.items()})
    entries, has_magnitudes = [], any(name.endswith("magnitude") for name in tensors)
    for name, pieces in by_name.items():
        tensor = tensors[name]
        if not pieces and name.endswith("magnitude") and layout == "peft":
            raise ConfigError(
                "PEFT has no DoRA for stacked experts",
                where=name,
                mend=f"Merge it into the weights (--merge), or choose --format {PER_EXPERT}.",
            )
        if layout == PER_EXPERT and _other_weight(name) not in tensors:
            raise ConfigError(
                "other weights of the same experts have no adapter, and those who read this layout want them to",
                where=name,
                mend="Merge it into the weights (--merge)" + ("." if has_magnitudes else ", or choose --format peft."),
            )
        if not pieces:
            raise ConfigError(f"files of family {family.name!r} have no place for it", where=name)
        entries += [Entry(piece.file_key, name, piece, tensor.dtype, piece.shape(tensor.shape)) for piece in pieces]
    return entries


def _other_weight(name: str) -> str:
    """The name that an adapter's parameter has for the other weight of experts; its own if there is none."""
    swapped = {"gate_up_lora_": "down_lora_", "down_lora_": "gate_up_lora_"}
    return next((name.replace(*pair) for pair in swapped.items() if f".{pair[0]}" in name), name)


def _write(
    tensors: Mapping[str, Tensor], entries: list[Entry], path: Path | None, settings: AdapterSettings, layout: str
) -> None:
    """Gather each parameter in turn and write its pieces, on the rank that has a path."""
    announced = sorted((tensor for entry in entries for tensor in entry.tensors), key=lambda item: -item[1].itemsize)
    writer = None if path is None else TensorWriter(path, announced)
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    failure: OSError | None = None
    for name, whole in gather_each(tensors, ranks_sharing(tensors.values())):
        if writer is None or failure is not None:
            continue
        factor = _factor(name, whole.shape, settings, layout)
        try:
            for entry in by_name[name]:
                for row, block in entry.row_blocks(whole):
                    writer.write(entry.key, block if factor == 1.0 else block.float() * factor, row)
        except OSError as error:
            writer.abandon()
            failure = error
    if failure is not None:
        raise failure
    if writer is not None and path is not None:
        writer.close()
        sync_folder(path.parent)


def _factor(name: str, shape: tuple[int, ...], settings: AdapterSettings, layout: str) -> float:
    """What B is multiplied with, so that all scales in a file without patterns are one."""
    if layout != PER_EXPERT or not name.endswith("lora_b"):
        return 1.0
    return settings.scale_of(shape[-1]) / settings.scale_of(settings.rank)


def _difference(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path | None,
    family: Family,
    settings: AdapterSettings,
) -> str:
    """Where what a reader makes of the folder first differs from the model; "" if nowhere."""
    problem = ""
    found = None
    with Files() as files:
        try:
            found = None if folder is None else AdapterFolder(folder, family, shapes, settings)
        except ConfigError as error:
            problem = str(error)
        for name, whole in gather_each(tensors, ranks_sharing(tensors.values())):
            if found is None or problem:
                continue
            values, expected = found.value(name, files), whole.cpu().float()
            # Equal to the bit, but where scales were made one.
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[whole.dtype]
            is_scaled = name.endswith("lora_b") and settings.use_rslora
            wrong = ((values - expected).abs() <= expected.abs() * tolerance * is_scaled).logical_not()
            if wrong.any():
                index = tuple(wrong.nonzero()[0].tolist())
                problem = f"{name} {list(index)}: {values[index].item()} in the file, {expected[index].item()} here"
    return problem
