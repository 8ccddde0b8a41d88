"""Writing a model as a folder in Hugging Face layout: safetensors, their index, config.json, and the tokenizer's files.

One parameter at a time is gathered, cut into the family's file tensors, and streamed to disk. All is written into a
temporary folder beside the target, which takes the target's place when every byte is on disk: the target is whole or
is not there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanmoe.checkpoint.files import sync_folder, write_whole
from titanmoe.checkpoint.hf_folder import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    TOKENIZER_NAMES,
    describe_keys,
    require_folder,
)
from titanmoe.checkpoint.model_tensors import full_tensor, model_tensors, ranks_sharing
from titanmoe.checkpoint.safetensors_io import TensorWriter
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import Family
from titanmoe.models.keys import Piece, Rule, map_keys
from titanmoe.models.spec import DecoderSpec

logger = logging.getLogger("titanmoe.checkpoint")

DEFAULT_SHARD_BYTES = 5_000_000_000
_SAVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Entry:
    """One file tensor to write."""

    key: str
    name: str
    piece: Piece
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def save_hf(
    model: nn.Module,
    folder: str | Path,
    family: Family,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_dir: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model so that transformers loads it.

    If the model is sharded, every rank must call this: each parameter is gathered on all ranks in turn, and rank 0
    writes. Beyond the model, one whole parameter is in memory. Of ranks with a whole model each, rank 0 writes.

    Args:
        folder: is created. If it exists and holds anything, that is an error unless `overwrite` is set; and then it
            may hold files of a model export only (they are replaced), since nothing else is ever deleted.
        dtype: float32, bfloat16 or float16; by default each parameter is written in its own.
        max_shard_bytes: a file holds at most this many bytes of tensors, but at least one tensor.
        tokenizer_dir: a folder whose tokenizer files, and generation_config.json if there is one, are copied along.

    Raises:
        ConfigError: before a tensor is written: the target is in use, the family's format has no place for a
            parameter or its config.json none for the spec, no tokenizer in `tokenizer_dir`, too little space; later:
            the disk is full or fails. In either case nothing is left behind.
    """
    target = Path(folder).expanduser().resolve()
    tensors = model_tensors(model)
    ranks = ranks_sharing(tensors.values())
    writes = not dist.is_initialized() or dist.get_rank() == 0
    temporary = target.parent / f".{target.name}.{uuid4().hex[:8]}.tmp"
    shards: list[list[_Entry]] = []

    def prepare() -> None:
        check_exportable(model, family, spec)
        shards.extend(_split_into_shards(_entries(tensors, family.rules, dtype), max_shard_bytes))
        if writes:
            _check_target(target, overwrite, _num_bytes(shards))
            temporary.mkdir(parents=True)
            _write_json(temporary / CONFIG_NAME, family.to_hf_config(spec, _main_dtype_name(shards)))
            if tokenizer_dir is not None:
                _copy_tokenizer(require_folder(tokenizer_dir), temporary)

    def finish() -> None:
        _stream(tensors, shards, temporary if writes else None)
        if writes:
            sync_folder(temporary)
            _take_place(temporary, target)
            logger.info("Wrote %.2f GB of weights in %d files to %s", _num_bytes(shards) / 1e9, len(shards), target)

    try:
        ranks.on_all(prepare)
        ranks.on_all(finish)
    except OSError as error:
        raise ConfigError(
            f"writing the model failed: {error.strerror}",
            where=str(error.filename or target),
            mend="Nothing was left behind. Free some space, or choose another folder.",
        ) from error
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def check_exportable(model: nn.Module, family: Family, spec: DecoderSpec) -> None:
    """Whether the family's files have a place for all of the model, which may be on the meta device.

    Raises:
        ConfigError: they have none for a tensor, or config.json none for the spec.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    if without_rule := map_keys([family.rules], shapes)[1]:
        raise ConfigError(
            f"the files of family {family.name!r} have no place for {describe_keys(without_rule)}",
            mend="A model with them cannot be exported to this family's format; a training checkpoint holds them.",
        )
    if not can_express(family, spec):
        raise ConfigError(f"a config.json of family {family.name!r} cannot describe this model: {spec}")


def can_express(family: Family, spec: DecoderSpec) -> bool:
    """Whether the spec survives the way into the family's config.json and back."""
    return family.from_hf_config(family.to_hf_config(spec, "float32")) == spec


def _entries(tensors: Mapping[str, Tensor], rules: Sequence[Rule], dtype: torch.dtype | None) -> list[_Entry]:
    """What to write, in order: the model's, with larger dtypes first (see TensorWriter)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    by_file_key, _ = map_keys([rules], shapes)
    for name, tensor in tensors.items():
        if (dtype or tensor.dtype) not in _SAVED_DTYPES:
            raise ConfigError(
                f"cannot be written as {dtype or tensor.dtype}", where=name, mend="Choose float32, bfloat16 or float16."
            )
    entries = [
        _Entry(key, name, piece, dtype or tensors[name].dtype, piece.shape(shapes[name]))
        for key, (name, piece) in by_file_key.items()
    ]
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _split_into_shards(entries: Iterable[_Entry], max_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    num_bytes = 0
    for entry in entries:
        if shards[-1] and num_bytes + entry.num_bytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(entry)
        num_bytes += entry.num_bytes
    return shards


def _check_target(target: Path, overwrite: bool, num_bytes: int) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError("is a file, not a folder", where=str(target))
    present = sorted(file.name for file in target.iterdir()) if target.is_dir() else []
    if present and not overwrite:
        raise ConfigError(
            f"the folder is not empty ({present[0]})", where=str(target), mend="Name a new one, or ask to overwrite it."
        )
    if foreign := [name for name in present if not _is_of_an_export(name)]:
        raise ConfigError(
            f"the folder holds files that are not of a model export ({foreign[0]}), which are never deleted",
            where=str(target),
            mend="Name a new folder, or move them away.",
        )
    free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
    if free < num_bytes:
        sizes = f"the weights take {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise ConfigError(f"too little space: {sizes}", where=str(target))


def _is_of_an_export(name: str) -> bool:
    known = {CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, SINGLE_NAME, *TOKENIZER_NAMES}
    return name in known or (name.startswith("model-") and name.endswith(".safetensors"))


def _copy_tokenizer(source: Path, folder: Path) -> None:
    names = [name for name in TOKENIZER_NAMES if (source / name).is_file()]
    if not names:
        raise ConfigError("the folder has no tokenizer (tokenizer.json)", where=str(source))
    if (source / GENERATION_CONFIG_NAME).is_file():
        names.append(GENERATION_CONFIG_NAME)
    for name in names:
        write_whole(folder / name, (source / name).read_bytes())


def _stream(tensors: Mapping[str, Tensor], shards: Sequence[Sequence[_Entry]], folder: Path | None) -> None:
    """Gather each parameter in turn, and write its pieces into `folder` on the rank that has one.

    A rank whose disk fails goes on taking part in the gathers, or the others would wait for it; it raises at the end.
    """
    files = None if folder is None else _ShardFiles(folder, shards)
    failure: OSError | None = None
    name, whole = "", torch.empty(0)
    for entry in chain.from_iterable(shards):
        if entry.name != name:
            # The last one goes before the next comes.
            whole = torch.empty(0)
            name, whole = entry.name, full_tensor(tensors[entry.name])
        if files is not None and failure is None:
            try:
                files.write(entry, entry.piece.in_file_order(whole[entry.piece.at]).reshape(entry.shape))
            except OSError as error:
                files.abandon()
                failure = error
    if failure is not None:
        raise failure


class _ShardFiles:
    """The safetensors files of a folder, written one after the other; the index is written last."""

    def __init__(self, folder: Path, shards: Sequence[Sequence[_Entry]]) -> None:
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._names = names if count > 1 else [SINGLE_NAME]
        self._folder = folder
        self._shards = shards
        self._next = 0
        self._writer: TensorWriter | None = None

    def write(self, entry: _Entry, tensor: Tensor) -> None:
        """Append the next tensor; opens and closes files as their turns come."""
        if self._writer is None:
            announced = [(entry.key, entry.dtype, entry.shape) for entry in self._shards[self._next]]
            self._writer = TensorWriter(self._folder / self._names[self._next], announced)
        self._writer.write(entry.key, tensor)
        if self._writer.complete:
            self._writer.close()
            self._writer = None
            self._next += 1
            if self._next == len(self._shards) > 1:
                self._write_index()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()

    def _write_index(self) -> None:
        weight_map = {entry.key: name for name, shard in zip(self._names, self._shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": _num_bytes(self._shards)}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self._folder / INDEX_NAME, index)


def _num_bytes(shards: Iterable[Iterable[_Entry]]) -> int:
    return sum(entry.num_bytes for shard in shards for entry in shard)


def _main_dtype_name(shards: Iterable[Iterable[_Entry]]) -> str:
    """The dtype of most of the bytes, as config.json names it."""
    num_bytes: Counter[str] = Counter()
    for entry in chain.from_iterable(shards):
        num_bytes[str(entry.dtype).removeprefix("torch.")] += entry.num_bytes
    return num_bytes.most_common(1)[0][0]


def _take_place(temporary: Path, target: Path) -> None:
    """Put the finished folder where the target is to be. Between two renames, an old target is beside it, whole."""
    if not target.exists() or not any(target.iterdir()):
        temporary.replace(target)
    else:
        old = target.with_name(f"{temporary.name}.old")
        target.replace(old)
        try:
            temporary.replace(target)
        except OSError:
            old.replace(target)
            raise
        shutil.rmtree(old)
    sync_folder(target.parent)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
