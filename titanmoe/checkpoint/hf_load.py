"""Filling a model from safetensors files in Hugging Face layout, slice by slice.

Two passes. The first looks at names, shapes and dtypes only (the index and the files' headers) and accounts for every
file tensor and every model tensor, so that a wrong checkpoint is refused before anything is read. The second goes
through the files in the order of their bytes and reads what this rank holds, straight into it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.hf_folder import describe_keys, list_tensors, require_folder
from titanmoe.checkpoint.model_tensors import model_tensors, ranks_sharing
from titanmoe.checkpoint.safetensors_io import DTYPES, TensorInfo, TensorReader
from titanmoe.config.errors import ConfigError
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family
from titanmoe.models.keys import Piece, map_keys, pieces_of
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.sharding import local_box, local_tensor

logger = logging.getLogger("titanmoe.checkpoint")

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class LoadSummary:
    """What one rank read: file tensors (or regions of them), and bytes of files, whole rows included."""

    num_tensors: int
    bytes_read: int
    seconds: float


@dataclass(frozen=True)
class _Read:
    """Fill `into`, a view of the model's memory, from the region of a file tensor that begins at `offset`."""

    info: TensorInfo
    into: Tensor
    offset: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.into.numel() * DTYPES[self.info.dtype].itemsize


@dataclass(frozen=True)
class _Plan:
    """What this rank reads, in the order of the bytes, and copies of the embedding that it compares with its own."""

    reads: list[_Read]
    tied_copies: list[TensorInfo]


def load_hf_weights(
    model: Decoder,
    folder: str | Path,
    family: Family,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadSummary:
    """Fill every parameter and persistent buffer of a materialised model from a folder of safetensors files.

    Each rank reads only what it holds, converting dtypes on the way. Beyond the model, at most one file tensor (or
    16 MiB of it) is in memory. If the model is sharded, every rank must call this; all of them succeed or all raise.

    Args:
        model: parameters may be plain tensors or DTensors. A buffer that no rule maps keeps its value (one line is
            logged): files of this family have no place for it.
        folder: holds `*.safetensors` and, if there are several, `model.safetensors.index.json`.
        family: whose files these are. If the model ties its output to the embedding, a copy of it in the files is
            dropped, with a warning if it differs from the embedding.
        on_progress: called after each tensor with the bytes that this rank has read and will have read.

    Raises:
        ConfigError: the folder or a file of it is unusable; or the files' tensors are not the model's: one message
            lists what is missing in the files, unknown in the files, of another shape, and of a dtype not supported.
    """
    tensors = model_tensors(model)
    assert not any(tensor.is_meta for tensor in tensors.values()), "materialise the model before loading it"
    ranks = ranks_sharing(tensors.values())
    plans: list[_Plan] = []
    # Kept out of what `on_all` returns, which every rank would receive from every other.
    ranks.on_all(lambda: plans.append(_plan(tensors, require_folder(folder), family, model.spec)))
    return ranks.on_all(lambda: _read(plans[0], tensors, folder, on_progress))[ranks.rank]


def _plan(tensors: Mapping[str, Tensor], folder: Path, family: Family, spec: DecoderSpec) -> _Plan:
    """Account for every tensor of the files and of the model."""
    infos = list_tensors(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    by_file_key, without_rule = map_keys(family.layouts, shapes, infos)
    if parameters := [name for name in without_rule if isinstance(tensors[name], nn.Parameter)]:
        raise ConfigError(f"no file tensor of this family can fill these parameters: {describe_keys(parameters)}")
    if without_rule:
        logger.info("Not in checkpoints of this family, left as initialised: %s", describe_keys(without_rule))
    if ignored := {key for key in infos if key not in by_file_key and _matches(key, family.ignored_keys)}:
        logger.info("Not needed, dropped: %s", describe_keys(ignored))

    expected = {key: piece.shape(shapes[name]) for key, (name, piece) in by_file_key.items()}
    optional = {}
    if spec.tie_embeddings:
        optional = {
            piece.file_key: shapes[_EMBEDDING] for piece in pieces_of(family.rules, _OUTPUT, shapes[_EMBEDDING])
        }
    _check_tensors(folder, expected, optional, {key: info for key, info in infos.items() if key not in ignored})
    return _Plan(_plan_reads(tensors, by_file_key, infos), [infos[key] for key in optional if key in infos])


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _check_tensors(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    infos: Mapping[str, TensorInfo],
) -> None:
    """Compare the files' tensors with the model's, and say everything that differs at once."""
    lines = []
    if missing := [key for key in expected if key not in infos]:
        lines.append(f"missing in the files ({len(missing)}): {describe_keys(missing)}")
    if unknown := [key for key in infos if key not in expected and key not in optional]:
        lines.append(f"unknown in the files ({len(unknown)}): {describe_keys(unknown)}")
    shared = [(key, shape) for key, shape in (*expected.items(), *optional.items()) if key in infos]
    differing = defaultdict(list)
    for key, shape in shared:
        if infos[key].shape != shape:
            differing[f"found {list(infos[key].shape)}, expected {list(shape)}"].append(key)
    lines += [f"shape mismatch ({len(keys)}): {describe_keys(keys)}: {sizes}" for sizes, keys in differing.items()]
    unsupported = defaultdict(list)
    for key, _ in shared:
        dtype = DTYPES.get(infos[key].dtype)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            unsupported[infos[key].dtype].append(key)
    lines += [
        f"dtype {name} not supported yet ({len(keys)}): {describe_keys(keys)}" for name, keys in unsupported.items()
    ]
    if lines:
        raise ConfigError(
            "the files do not hold this model\n  " + "\n  ".join(lines),
            where=str(folder),
            mend="Model and files must be of the same family and sizes: compare config.json with the model's config.",
        )


def _plan_reads(
    tensors: Mapping[str, Tensor], by_file_key: Mapping[str, tuple[str, Piece]], infos: Mapping[str, TensorInfo]
) -> list[_Read]:
    shards = {name: (local_tensor(tensor.detach()), local_box(tensor).offsets) for name, tensor in tensors.items()}
    reads = []
    for key, (name, piece) in by_file_key.items():
        into, offset = shards[name]
        at = [index - begin for index, begin in zip(piece.at, offset, strict=False)]
        if all(0 <= index < size for index, size in zip(at, into.shape, strict=False)):
            into = into[tuple(at)]
            if into.numel():
                reads.append(_Read(infos[key], into, offset[len(at) :]))
    return sorted(reads, key=lambda read: (read.info.path, read.info.start))


def _read(
    plan: _Plan, tensors: Mapping[str, Tensor], folder: str | Path, on_progress: Callable[[int, int], None] | None
) -> LoadSummary:
    start = time.perf_counter()
    line_due = start + _SECONDS_BETWEEN_LINES
    total = sum(read.num_bytes for read in plan.reads)
    done = 0
    bytes_read = 0
    for path, reads_of_file in groupby(plan.reads, key=lambda read: read.info.path):
        with TensorReader(path) as reader:
            for read in reads_of_file:
                reader.read(read.info, read.into, read.offset)
                done += read.num_bytes
                if on_progress is not None:
                    on_progress(done, total)
                if time.perf_counter() > line_due:
                    line_due = time.perf_counter() + _SECONDS_BETWEEN_LINES
                    logger.info("Reading weights: %.1f of %.1f GB", done / 1e9, total / 1e9)
            bytes_read += reader.bytes_read
    seconds = time.perf_counter() - start
    speed = bytes_read / max(seconds, 1e-9)
    logger.info("Read %.2f GB of weights from %s in %.1f s (%.2f GB/s)", total / 1e9, folder, seconds, speed / 1e9)
    for info in plan.tied_copies:
        _compare_tied(info, tensors[_EMBEDDING])
    return LoadSummary(len(plan.reads), bytes_read, seconds)


def _compare_tied(info: TensorInfo, embedding_VD: Tensor) -> None:
    local_VD = local_tensor(embedding_VD.detach())
    copy_VD = torch.empty_like(local_VD)
    with TensorReader(info.path) as reader:
        reader.read(info, copy_VD, local_box(embedding_VD).offsets)
    if torch.equal(copy_VD, local_VD):
        logger.info("%s is a copy of the embedding, which the model uses for its output: dropped", info.key)
    else:
        logger.warning("%s differs from the embedding, which the model uses for its output: dropped", info.key)
