"""Filling a model from safetensors files in Hugging Face layout, region by region.

Two passes. The first looks at names, shapes and dtypes only (the index and the files' headers) and accounts for every
file tensor and every model tensor, so that a wrong checkpoint is refused before anything is read. The second goes
through the files in the order of their bytes and reads what this rank holds, straight into it where the file has the
same values in the same order.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.fill import Fillable, Region, fill
from titanmoe.checkpoint.frozen_rows import (
    FrozenRegion,
    as_weights,
    describe,
    frozen_regions,
    stored_of_all,
    stored_weights,
)
from titanmoe.checkpoint.hf_folder import describe_keys, list_tensors, require_folder
from titanmoe.checkpoint.model_tensors import model_tensors, ranks_sharing, tensors_of_all, without_adapters
from titanmoe.checkpoint.progress import log_progress
from titanmoe.checkpoint.quantization import read_quantization
from titanmoe.checkpoint.row_source import Files, PlainSource, RowSource
from titanmoe.checkpoint.safetensors_io import DTYPES, TensorInfo
from titanmoe.checkpoint.sources import sources_of
from titanmoe.config.errors import ConfigError
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family
from titanmoe.models.keys import Piece, Rule, map_keys, pieces_of
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.sharding import local_box, local_tensor
from titanmoe.parallel.host_memory import prefer_huge_pages

logger = logging.getLogger("titanmoe.checkpoint")

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


@dataclass(frozen=True)
class LoadSummary:
    """What one rank read: file tensors (or regions of them), and bytes of files, whole rows and scales included."""

    num_tensors: int
    bytes_read: int
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """What this rank reads, and copies of the embedding that it compares with its own."""

    regions: list[Fillable]
    tied_copies: list[tuple[str, RowSource, Piece]]


def load_hf_weights(
    model: Decoder,
    folder: str | Path,
    family: Family,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadSummary:
    """Fill every parameter and persistent buffer of a materialised model from a folder of safetensors files.

    Each rank reads only what it holds, converting dtypes and the order of dims on the way. Beyond the model, some
    tens of MB are in memory. If the model is sharded, every rank must call this; all of them succeed or all raise.
    Its tensors need not be on every rank: the files must hold what all ranks have together.

    Args:
        model: parameters may be plain tensors or DTensors. A buffer that no rule maps keeps its value (one line is
            logged): files of this family have no place for it. Adapters stay as they are. Weights that are stored in
            another form are quantised row by row.
        folder: holds `*.safetensors` and, if there are several, `model.safetensors.index.json`.
        family: whose files these are. If the model ties its output to the embedding, a copy of it in the files is
            dropped, with a warning if it differs from the embedding. Layers for multi-token prediction are dropped.
        on_progress: called every few MB with the bytes that this rank has read and will have read (scales of
            quantised weights not counted). By default a line is logged every ten seconds.

    Raises:
        ConfigError: the folder or a file of it is unusable; or the files' tensors are not the model's: one message
            lists what is missing in the files, unknown in the files, of another shape, and of a dtype not supported.
    """
    tensors, stored = without_adapters(model_tensors(model)), stored_weights(model)
    assert not any(tensor.is_meta for tensor in tensors.values()), "materialise the model before loading it"
    ranks = ranks_sharing(tensors.values())
    of_all = as_weights(tensors_of_all(tensors, ranks), stored_of_all(model, ranks))
    plan = ranks.on_each(lambda: _plan(tensors, stored, of_all, require_folder(folder), family, model.spec))
    report = on_progress or partial(log_progress(), "read")
    # Ranks of one machine may read the same rows, the second time from the cache; one rank reads them once.
    files = Files(fill_cache=ranks.size > 1)
    return ranks.on_each(lambda: _read(plan, tensors, folder, files, report))


def _plan(
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, tuple[nn.Module, Stored]],
    of_all: Mapping[str, Tensor],
    folder: Path,
    family: Family,
    spec: DecoderSpec,
) -> _Plan:
    """Account for every tensor of the files and of the model, which is all that the ranks have together."""
    infos = _without_what_is_not_needed(list_tensors(folder), family, len(spec.layers))
    sources = sources_of(infos, read_quantization(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in of_all.items()}
    by_file_key, without_rule = map_keys(family.layouts, shapes, sources)
    if parameters := [name for name in without_rule if isinstance(of_all[name], nn.Parameter)]:
        raise ConfigError(f"no file tensor of this family can fill these parameters: {describe_keys(parameters)}")
    if without_rule:
        logger.info("Not in checkpoints of this family, left as initialised: %s", describe_keys(without_rule))

    copies = {}
    if spec.tie_embeddings:
        pieces = pieces_of(family.rules, _OUTPUT, shapes[_EMBEDDING])
        copies = {piece.file_key: (_EMBEDDING, piece) for piece in pieces if piece.file_key in sources}
    problems = _differences({**by_file_key, **copies}, shapes, sources, family)
    if problems:
        raise ConfigError(
            "the files do not hold this model\n  " + "\n  ".join(problems),
            where=str(folder),
            mend="Model and files must be of the same family and sizes: compare config.json with the model's config.",
        )
    tied_copies = [(key, sources[key], piece) for key, (name, piece) in copies.items() if name in tensors]
    regions: list[Fillable] = [*_regions(tensors, by_file_key, sources)]
    frozen = _frozen_regions(stored, by_file_key, sources)
    if frozen:
        logger.info("%s", describe(frozen))
    return _Plan([*regions, *frozen], tied_copies)


def _without_what_is_not_needed(
    infos: Mapping[str, TensorInfo], family: Family, num_layers: int
) -> dict[str, TensorInfo]:
    """The files' tensors without those that carry nothing and those of layers for multi-token prediction."""
    ignored = [key for key in infos if any(fnmatchcase(key, pattern) for pattern in family.ignored_keys)]
    if ignored:
        logger.info("Not needed, dropped: %s", describe_keys(ignored))
    dropped = set(ignored)
    if family.extra_layer_key is not None:
        layer_prefix = family.extra_layer_key.partition("{i}")[0]
        of_layer = re.compile(re.escape(layer_prefix) + r"(\d+)\.")
        keys_of_layer = defaultdict(list)
        for key in infos:
            if match := of_layer.match(key):
                keys_of_layer[int(match[1])].append(key)
        extra = [
            layer
            for layer in sorted(keys_of_layer)
            if layer >= num_layers and family.extra_layer_key.format(i=layer) in infos
        ]
        if extra:
            keys = {key for layer in extra for key in keys_of_layer[layer]}
            logger.info(
                "Layers for multi-token prediction, dropped: %s (%d tensors)", str(extra).strip("[]"), len(keys)
            )
            dropped |= keys
    return {key: info for key, info in infos.items() if key not in dropped}


def _differences(
    expected: Mapping[str, tuple[str, Piece]],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, RowSource],
    family: Family,
) -> list[str]:
    """Everything in which the files' tensors are not the model's, a line for each kind."""
    lines = []
    if missing := [key for key in expected if key not in sources]:
        lines.append(f"missing in the files ({len(missing)}): {describe_keys(missing)}")
        lines += _about_other_layouts({expected[key][0] for key in missing}, shapes, sources, family)
    if unknown := [key for key in sources if key not in expected]:
        lines.append(f"unknown in the files ({len(unknown)}): {describe_keys(unknown)}")
    misshapen, unsupported = defaultdict(list), defaultdict(list)
    for key, (name, piece) in expected.items():
        if key not in sources:
            continue
        source, shape = sources[key], piece.shape(shapes[name])
        if source.shape != shape:
            misshapen[f"found {list(source.shape)}, expected {list(shape)}"].append(key)
        dtype = DTYPES.get(source.info.dtype)
        if isinstance(source, PlainSource) and (dtype is None or not dtype.is_floating_point or dtype.itemsize < 2):
            unsupported[source.info.dtype].append(key)
    lines += [f"shape mismatch ({len(keys)}): {describe_keys(keys)}: {sizes}" for sizes, keys in misshapen.items()]
    lines += [f"dtype {name} not supported ({len(keys)}): {describe_keys(keys)}" for name, keys in unsupported.items()]
    return lines


def _about_other_layouts(
    names: set[str], shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, RowSource], family: Family
) -> list[str]:
    """What else than the missing tensors could fill these parameters, and which of them come half in each layout."""
    absent, mixed = [], []
    for name in (name for name in shapes if name in names):
        layouts = [keys for rules in family.layouts if (keys := _keys(rules, name, shapes[name]))]
        found = [keys for keys in layouts if any(key in sources for key in keys)]
        if not found:
            absent += [key for keys in layouts[1:] for key in keys]
        elif len(found) > 1:
            mixed += [key for keys in found for key in keys if key in sources]
    lines = [f"nor, in another layout ({len(absent)}): {describe_keys(absent)}"] if absent else []
    if mixed:
        lines.append(
            f"of the same parameters in several layouts, none of them whole ({len(mixed)}): {describe_keys(mixed)}"
        )
    return lines


def _keys(rules: Sequence[Rule], name: str, shape: tuple[int, ...]) -> list[str]:
    return [piece.file_key for piece in pieces_of(rules, name, shape)]


def _regions(
    tensors: Mapping[str, Tensor], by_file_key: Mapping[str, tuple[str, Piece]], sources: Mapping[str, RowSource]
) -> list[Region]:
    """What this rank reads, and where it goes."""
    shards = {name: (local_tensor(tensor.detach()), local_box(tensor).offsets) for name, tensor in tensors.items()}
    for shard, _ in shards.values():
        prefer_huge_pages(shard)
    regions = []
    for key, (name, piece) in by_file_key.items():
        if name not in shards:
            continue
        into, offsets = shards[name]
        at = [index - begin for index, begin in zip(piece.at, offsets, strict=False)]
        if all(0 <= index < size for index, size in zip(at, into.shape, strict=False)):
            region = _region(sources[key], piece, into[tuple(at)], offsets[len(at) :], tensors[name].shape[len(at) :])
            if region.into.numel():
                regions.append(region)
    return regions


def _frozen_regions(
    stored: Mapping[str, tuple[nn.Module, Stored]],
    by_file_key: Mapping[str, tuple[str, Piece]],
    sources: Mapping[str, RowSource],
) -> list[FrozenRegion]:
    """The same for weights that are stored as parts."""
    pieces: dict[str, dict[str, Piece]] = defaultdict(dict)
    for key, (name, piece) in by_file_key.items():
        if name in stored:
            pieces[name][key] = piece
    return [region for name, of_name in pieces.items() for region in frozen_regions(*stored[name], of_name, sources)]


def _region(source: RowSource, piece: Piece, into: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Region:
    """`into` is this rank's part of the slice that the piece fills, `sizes` are the whole slice's."""
    if not sizes:
        return Region(source, into.view(1), (0,), (1,), 0)
    unmerged = piece.unmerged(sizes)
    num_column_dims = 1 if piece.axes is None else len(piece.axes.groups[-1])
    return Region(source, piece.in_file_order(into), piece.unmerged(offsets), unmerged, len(unmerged) - num_column_dims)


def _read(
    plan: _Plan,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    files: Files,
    on_progress: Callable[[int, int], None],
) -> LoadSummary:
    start = time.perf_counter()
    total = sum(region.num_bytes for region in plan.regions)
    with files:
        fill(plan.regions, files, lambda done: on_progress(done, total))
        seconds = time.perf_counter() - start
        speed = files.bytes_read / max(seconds, 1e-9)
        logger.info("Read %.2f GB of weights from %s in %.1f s (%.2f GB/s)", total / 1e9, folder, seconds, speed / 1e9)
        summary = LoadSummary(len(plan.regions), files.bytes_read, seconds)
        for key, source, piece in plan.tied_copies:
            _compare_tied(key, source, piece, tensors[_EMBEDDING], files)
    return summary


def _compare_tied(key: str, source: RowSource, piece: Piece, embedding_VD: Tensor, files: Files) -> None:
    local_VD = local_tensor(embedding_VD.detach())
    copy_VD = torch.empty_like(local_VD)
    fill([_region(source, piece, copy_VD, local_box(embedding_VD).offsets, embedding_VD.shape)], files)
    if torch.equal(copy_VD, local_VD):
        logger.info("%s is a copy of the embedding, which the model uses for its output: dropped", key)
    else:
        logger.warning("%s differs from the embedding, which the model uses for its output: dropped", key)
