"""Writing a model as a folder in Hugging Face layout: safetensors, their index, config.json, and the tokenizer's files.

One parameter at a time is gathered, cut into the family's file tensors, and streamed to disk. All is written into a
temporary folder beside the target, read back and compared, and takes the target's place when it is right: the target
is whole or is not there.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.files import sync_folder
from titanmoe.checkpoint.frozen_rows import as_weights, stored_of_all
from titanmoe.checkpoint.hf_entries import Entry, config_entries, entries_of, main_dtype_name, split_into_shards
from titanmoe.checkpoint.hf_folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, describe_keys, require_folder
from titanmoe.checkpoint.hf_target import check_target, copy_generation_config, copy_tokenizer, write_folder, write_json
from titanmoe.checkpoint.hf_verify import find_difference
from titanmoe.checkpoint.merge import check_mergeable, weights_each
from titanmoe.checkpoint.model_tensors import model_tensors, ranks_sharing, tensors_of_all, without_adapters
from titanmoe.checkpoint.progress import Progress, log_progress
from titanmoe.checkpoint.safetensors_io import TensorWriter
from titanmoe.config.errors import ConfigError
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model
from titanmoe.models.family import Family
from titanmoe.models.keys import map_keys
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.scaled_casts import BLOCK_SIZE, FP8, quantize_blocks

logger = logging.getLogger("titanmoe.checkpoint")

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class SaveSummary:
    """What was written: tensors in the files (scales included), their bytes, and how long it took, with comparing."""

    num_tensors: int
    num_bytes: int
    num_files: int
    seconds: float


def save_hf(
    model: nn.Module,
    folder: str | Path,
    family: Family,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_dir: str | Path | None = None,
    generation_config_dir: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    on_progress: Progress | None = None,
    adapters: AdapterSettings | None = None,
    compare: Callable[[Path], str] | None = None,
) -> SaveSummary:
    """Write the model so that transformers loads it.

    If the model is sharded, every rank must call this: each parameter is gathered on rank 0 in turn, which writes.
    Not every rank must have all of them. Beyond the model, one whole parameter is in rank 0's memory, and some rows of
    it as the file has them. Of ranks with a whole model each, rank 0 writes. Weights that are frozen in few bits are
    written as the numbers that they stand for.

    Args:
        folder: is created. If it exists and holds anything, that is an error unless `overwrite` is set; and then it
            may hold files of a model export only (they are replaced), since nothing else is ever deleted.
        dtype: float32, bfloat16, float16 or float8_e4m3fn (see `entries_of`); by default each parameter is written in
            its own. Buffers keep theirs.
        max_shard_bytes: a file holds at most this many bytes of tensors, but at least one tensor.
        tokenizer_dir: a folder whose tokenizer files are copied along.
        generation_config_dir: a folder whose generation_config.json is copied along; it is made from the tokenizer if
            there is none. By default, the tokenizer's.
        verify: read everything back as a loader does and compare it with the model before the folder is in its place.
        on_progress: called on rank 0, after each file tensor; by default, a line is logged every ten seconds.
        adapters: of the model's adapters, which are merged into its weights as these are written; see `merge`.
        compare: also says what is wrong with the folder, "" if nothing; it may change the model. One process only.

    Raises:
        ConfigError: before a tensor is written: adapters that are not to be merged, or none that are, the target is in
            use, the family's format has no place for a parameter or its config.json none for the spec, no rank has a
            tensor of the spec, no tokenizer in `tokenizer_dir`, too little space; later: the disk is full or fails, or
            a parameter is not finite and FP8 was asked for.
        NotExportedError: what was written is not the model.
        In any case nothing is left behind.
    """
    started = time.perf_counter()
    report = on_progress or log_progress()
    target = Path(os.path.expanduser(folder)).resolve()
    tensors = model_tensors(model)
    ranks = ranks_sharing(tensors.values())
    stored = stored_of_all(model, ranks)
    of_all = as_weights(tensors_of_all(tensors, ranks), stored)
    each = partial(weights_each, tensors, stored, adapters, ranks)
    if any(map(is_adapter, of_all)) != (adapters is not None):
        if adapters is not None:
            raise ConfigError("there are no adapters to merge", where=str(target), mend="Write the model as it is.")
        mend = "Merge them (merge=config), or write them alone (save_adapter)."
        raise ConfigError("the model has adapters beside its weights", where=str(target), mend=mend)
    if adapters is not None:
        check_mergeable(of_all)
        of_all = without_adapters(of_all)
    entries: list[Entry] = []
    shards: list[list[Entry]] = []

    def prepare(folder: Path | None) -> None:
        _check_exportable(of_all, family, spec, dtype)
        entries.extend(entries_of(of_all, family, dtype))
        shards.extend(split_into_shards(entries, max_shard_bytes))
        if folder is not None:
            check_target(target, overwrite, sum(entry.num_bytes for entry in entries))
            folder.mkdir(parents=True)
            config = family.to_hf_config(spec, main_dtype_name(entries)) | config_entries(of_all, family, entries)
            if tokenizer_dir is not None:
                copy_tokenizer(require_folder(tokenizer_dir), folder)
            if (assets_dir := generation_config_dir or tokenizer_dir) is not None:
                config |= copy_generation_config(Path(assets_dir), folder)
            write_json(folder / CONFIG_NAME, config)

    def write(folder: Path | None) -> None:
        _stream(each(), shards, folder, report)
        if folder is not None:
            sync_folder(folder)

    def difference(folder: Path | None) -> str:
        found = find_difference(folder, of_all, family, spec, entries, ranks, report, each())
        return found or ("" if compare is None or folder is None else compare(folder))

    wrote = write_folder(target, "model", ranks, prepare, write, difference if verify else None)
    num_bytes, num_tensors = sum(entry.num_bytes for entry in entries), sum(len(entry.tensors) for entry in entries)
    summary = SaveSummary(num_tensors, num_bytes, len(shards), time.perf_counter() - started)
    if wrote:
        logger.info(
            "Wrote %.2f GB of weights (%s) in %d file%s to %s in %.1f s, %s",
            num_bytes / 1e9,
            "float8" if any(entry.dtype == FP8 for entry in entries) else main_dtype_name(entries),
            len(shards),
            "s" if len(shards) > 1 else "",
            target,
            summary.seconds,
            f"verified {num_tensors} tensors" if verify else "not verified",
        )
    return summary


def check_exportable(model: nn.Module, family: Family, spec: DecoderSpec, dtype: torch.dtype | None = None) -> None:
    """Whether the family's files have a place for all of the model, which may be on the meta device, in this dtype.

    Raises:
        ConfigError: they have none for a tensor, or config.json none for the spec, of which the model is but a part;
            or see `entries_of`.
    """
    _check_exportable(model_tensors(model), family, spec, dtype)


def _check_exportable(
    tensors: Mapping[str, Tensor], family: Family, spec: DecoderSpec, dtype: torch.dtype | None
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if without_rule := map_keys([family.rules], shapes)[1]:
        raise ConfigError(
            f"the files of family {family.name!r} have no place for {describe_keys(without_rule)}",
            mend="A model with them cannot be exported to this family's format; a training checkpoint holds them.",
        )
    if missing := [name for name in model_tensors(build_model(spec)) if name not in tensors]:
        raise ConfigError(f"the model is not whole: no rank has {describe_keys(missing)}")
    if not can_express(family, spec):
        raise ConfigError(f"a config.json of family {family.name!r} cannot describe this model: {spec}")
    entries_of(tensors, family, dtype)


def can_express(family: Family, spec: DecoderSpec) -> bool:
    """Whether the spec survives the way into the family's config.json and back."""
    return family.from_hf_config(family.to_hf_config(spec, "float32")) == spec


def _stream(
    each: Iterator[tuple[str, Tensor]], shards: Sequence[Sequence[Entry]], folder: Path | None, on_progress: Progress
) -> None:
    """Take each parameter in turn, as it is gathered, and write its pieces into `folder` on the rank that has one.

    A rank that fails goes on taking part in the gathers, or the others would wait for it; it raises at the end.
    """
    files = None if folder is None else _ShardFiles(folder, shards)
    entries_of_name: dict[str, list[Entry]] = defaultdict(list)
    for shard in shards:
        for entry in shard:
            entries_of_name[entry.name].append(entry)
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    done = 0
    failure: OSError | ConfigError | None = None
    for name, whole in each:
        if files is None or failure is not None:
            continue
        try:
            for entry in entries_of_name[name]:
                files.write(entry, whole)
                done += entry.num_bytes
                on_progress("written", done, total)
        except (OSError, ConfigError) as error:
            files.abandon()
            failure = error
        del whole  # before the next comes
    if failure is not None:
        raise failure


class _ShardFiles:
    """The safetensors files of a folder, written one after the other; the index is written last."""

    def __init__(self, folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._names = names if count > 1 else [SINGLE_NAME]
        self._folder = folder
        self._shards = shards
        self._next = 0
        self._writer: TensorWriter | None = None

    def write(self, entry: Entry, whole: Tensor) -> None:
        """Write the next entry, a piece of the whole parameter; opens and closes files as their turns come.

        Raises:
            OSError: the disk is full or fails.
            ConfigError: values that are not finite cannot be scaled.
        """
        if self._writer is None:
            announced = [tensor for entry in self._shards[self._next] for tensor in entry.tensors]
            announced.sort(key=lambda tensor: -tensor[1].itemsize)  # see TensorWriter
            self._writer = TensorWriter(self._folder / self._names[self._next], announced)
        for row, block in entry.row_blocks(whole):
            if entry.dtype == FP8:
                codes, scales = quantize_blocks(block)
                if not scales.isfinite().all():
                    raise ConfigError(
                        "has values that are not finite, which have no FP8 form",
                        where=entry.name,
                        mend="Look at the model: a float32 export holds them as they are.",
                    )
                self._writer.write(entry.key, codes, row)
                self._writer.write(entry.scale_key, scales, row // BLOCK_SIZE)
            else:
                self._writer.write(entry.key, block, row)
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
        file_of = {
            key: name
            for name, shard in zip(self._names, self._shards, strict=True)
            for entry in shard
            for key, _, _ in entry.tensors
        }
        total = sum(entry.num_bytes for shard in self._shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        write_json(self._folder / INDEX_NAME, index)
