"""Reading an export back, as a loader does, and comparing every value with the model's.

Names, shapes and the order of dims come from what is in the folder (config.json, headers, the family's reading rules),
not from what was meant to be written. Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from titanmoe.checkpoint.gather import gather_each
from titanmoe.checkpoint.hf_entries import Entry
from titanmoe.checkpoint.hf_folder import describe_keys, list_tensors, read_hf_config
from titanmoe.checkpoint.model_tensors import tensors_of_all
from titanmoe.checkpoint.progress import Progress
from titanmoe.checkpoint.quantization import parse_quantization
from titanmoe.checkpoint.row_source import Files, RowSource
from titanmoe.checkpoint.safetensors_io import DTYPES
from titanmoe.checkpoint.sources import sources_of
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import Family, family_of_hf_config
from titanmoe.models.keys import map_keys
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.scaled_casts import FP8, block_scales, expand_scales
from titanmoe.parallel.ranks import Ranks


def find_difference(
    folder: Path | None,
    tensors: Mapping[str, Tensor],
    family: Family,
    spec: DecoderSpec,
    meant: Sequence[Entry],
    ranks: Ranks,
    on_progress: Progress,
    each: Iterator[tuple[str, Tensor]] | None = None,
) -> str:
    """What first differs between a folder and the model, in words; "" if nothing does.

    Plain values must be the model's, rounded to the dtype that was meant, bit for bit. FP8 must lie within half a step
    of the model's. Beyond the model, one whole parameter and some rows of it are in memory.

    Args:
        folder: on rank 0, which compares; None on others, which only take part in gathering sharded parameters.
        tensors: what this rank has of the model, or all of it on the meta device.
        meant: what was to be written.
        ranks: those that share the model.
        on_progress: called after each file tensor.
        each: names and values of the model's tensors, if these are not what is in memory; see `gather_each`.
    """
    problem = ""
    of_all = tensors_of_all(tensors, ranks)
    sources: dict[str, RowSource] = {}
    entries_of: dict[str, list[Entry]] = {}
    total, done = sum(entry.num_bytes for entry in meant), 0
    with Files() as files:
        if folder is not None:
            try:
                sources = _sources(folder, family, spec)
                entries_of = _as_read(sources, of_all, family, meant)
            except ConfigError as error:
                problem = str(error)
        # To the end, after a difference too: other ranks take part in the gathering.
        for name, whole in gather_each(tensors, ranks) if each is None else each:
            for entry in entries_of.get(name, ()):
                if not problem:
                    try:
                        problem = _compare(entry, whole, sources[entry.key], files)
                    except ConfigError as error:
                        problem = str(error)
                done += entry.num_bytes
                on_progress("verified", done, total)
            del whole  # before the next comes
    return problem


def _sources(folder: Path, family: Family, spec: DecoderSpec) -> dict[str, RowSource]:
    """The folder's weights by file key; ConfigError if a loader would refuse it or take it for another model."""
    config = read_hf_config(folder)
    found = family_of_hf_config(config)
    if found.name != family.name or found.from_hf_config(config) != spec:
        raise ConfigError("config.json describes another model")
    return sources_of(list_tensors(folder), parse_quantization(config))


def _as_read(
    sources: Mapping[str, RowSource], of_all: Mapping[str, Tensor], family: Family, meant: Sequence[Entry]
) -> dict[str, list[Entry]]:
    """What a reader takes each parameter from, by the parameter's name; ConfigError if that is not all of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in of_all.items()}
    dtypes = {entry.name: entry.dtype for entry in meant}
    by_file_key, _ = map_keys(family.layouts, shapes, sources)
    if odd := sorted(by_file_key.keys() ^ sources.keys()):
        raise ConfigError(f"there are missing or unknown tensors: {describe_keys(odd)}")
    entries: dict[str, list[Entry]] = {}
    for key, (name, piece) in by_file_key.items():
        entry = Entry(key, name, piece, dtypes[name], piece.shape(shapes[name]))
        if (sources[key].shape, DTYPES.get(sources[key].info.dtype)) != (entry.shape, entry.dtype):
            raise ConfigError(f"{key} is {sources[key].info.dtype} {list(sources[key].shape)}, meant was {entry}")
        entries.setdefault(name, []).append(entry)
    return entries


def _compare(entry: Entry, whole: Tensor, source: RowSource, files: Files) -> str:
    # A source's rows are all dims but the last; an entry's are its first dim.
    num_rows = prod(entry.shape[1:-1])
    for row, block in entry.row_blocks(whole):
        block = block.cpu()
        if block.dim() == 1:
            found = source.rows(files, 0, 1).view(-1)[row : row + len(block)]
        else:
            found = source.rows(files, row * num_rows, block.shape[0] * num_rows).view(block.shape)
        wrong = _wrong_fp8(found, block) if entry.dtype == FP8 else _wrong_bits(found, block.to(entry.dtype))
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            place = [row + index[0], *index[1:]]
            what = f"{found[index].item()} in the file, {block[index].item()} in the model ({entry.name})"
            return f"{entry.key} {place}: {what}"
    return ""


def _wrong_bits(found: Tensor, expected: Tensor) -> Tensor:
    """Where the bits differ (NaN equals NaN here, and 0 is not -0)."""
    as_integer = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return found.view(as_integer) != expected.contiguous().view(as_integer)


def _wrong_fp8(found_RC: Tensor, expected_RC: Tensor) -> Tensor:
    """Where values are further away than half a step of e4m3, which has 3 bits after the leading one.

    Below 2^-6 * scale steps are 2^-9 * scale. A hair is left for the rounding of scale and quotient in float32.
    """
    hair = 1 + 1e-5
    smallest_rc = block_scales(expected_RC) * (hair / 1024)
    smallest_RC = expand_scales(smallest_rc, expected_RC.shape[0], expected_RC.shape[1])
    half_step_RC = torch.maximum(expected_RC.float().abs() * (hair / 16), smallest_RC)
    # Not `>`, which NaN would pass.
    return ((found_RC - expected_RC).abs_() <= half_step_RC).logical_not_()
