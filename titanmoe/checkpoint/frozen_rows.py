"""Weights of files into the parts of frozen weights: rows are read, quantised, and put where they belong.

A model never has such a weight as numbers: some rows of one matrix are in memory at a time. What files hold in the
very format that the model has, FP8 codes with a scale per output or per 128 x 128 values, is taken as it is.

Shape suffixes: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.fill import Region
from titanmoe.checkpoint.hf_folder import describe_keys
from titanmoe.checkpoint.model_tensors import without_wrappers
from titanmoe.checkpoint.quantized_rows import QuantizedSource
from titanmoe.checkpoint.row_source import Files, RowSource
from titanmoe.config.errors import ConfigError
from titanmoe.models.keys import Piece
from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.scaled_casts import BLOCK_SIZE
from titanmoe.parallel.ranks import Ranks

Rows = tuple[tuple[int, ...], slice]
"""A matrix of a weight, by its leading indices, and rows of it."""


def stored_weights(model: nn.Module) -> dict[str, tuple[nn.Module, Stored]]:
    """By name, the weights of a model that are stored as parts, with the modules that have these."""
    return {
        without_wrappers(f"{path}.{stored.name}"): (module, stored)
        for path, module in model.named_modules()
        for stored in getattr(module, "stored", {}).values()
    }


def stored_of_all(model: nn.Module, ranks: Ranks) -> dict[str, Stored]:
    """Of the weights that any rank has stored as parts, by name; every rank must call it."""
    mine = {name: stored for name, (_, stored) in stored_weights(model).items()}
    return {name: stored for of_rank in ranks.gather(mine) for name, stored in of_rank.items()}


def weights_of_parts(stored: Mapping[str, Stored]) -> dict[str, str]:
    """The weight that each part belongs to, by names."""
    return {f"{name.rpartition('.')[0]}.{part}": name for name in stored for part in stored[name].part_names}


def as_weights(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """A model's tensors on the meta device, with stored weights in the place of their parts.

    These have the dtype of the first other tensor, which is an embedding if the model is whole.
    """
    weight_of = weights_of_parts(stored)
    dtype = next((tensor.dtype for name, tensor in tensors.items() if name not in weight_of), None)
    names = dict.fromkeys(weight_of.get(name, name) for name in tensors)
    return {
        name: nn.Parameter(torch.empty(stored[name].shape, dtype=dtype, device="meta"))
        if name in stored
        else tensors[name]
        for name in names
    }


def frozen_regions(
    module: nn.Module, stored: Stored, pieces: Mapping[str, Piece], sources: Mapping[str, RowSource]
) -> Iterator[FrozenRegion]:
    """What this process reads of a weight.

    Args:
        pieces: what the weight is made of, by key.
    """
    here: dict[tuple[int, ...], list[Rows]] = {}
    depth = len(next(iter(pieces.values())).at)
    for matrix, rows in stored.pieces(module):
        here.setdefault(matrix[:depth], []).append((matrix, rows))
    for key, piece in pieces.items():
        if piece.at in here:
            yield FrozenRegion(sources[key], piece, module, stored, tuple(here[piece.at]))


@dataclass(frozen=True)
class FrozenRegion:
    """What this process needs of one file tensor, as `fill` wants it.

    Attributes:
        rows: of the weight that `piece` is a slice of.
    """

    source: RowSource
    piece: Piece
    module: nn.Module
    stored: Stored
    rows: tuple[Rows, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the slice."""
        return self.stored.shape[len(self.piece.at) :]

    @cached_property
    def has_rows(self) -> bool:
        """Whether rows of the file are rows of the weight, whatever their order."""
        return self.piece.axes is None or self.piece.axes.order[-1] == len(self.sizes) - 1

    @cached_property
    def recipe(self) -> str:
        """That of `quantize.frozen.float8` with which the file tensor is taken as it is; "" if there is none."""
        source, (num_rows, num_columns) = self.source, self.sizes[-2:]
        in_order = self.piece.axes is None or (
            self.piece.axes.order == tuple(range(len(self.sizes))) and len(self.piece.axes.groups[-1]) == 1
        )
        if not isinstance(source, QuantizedSource) or source.info.dtype != "F8_E4M3" or not in_order:
            return ""
        grid = source.grid
        if grid.block_rows == 1 and grid.block_columns >= num_columns:
            return "channel"
        fits = grid.matrix_rows == num_rows or (grid.matrix_rows % num_rows == 0 and num_rows % BLOCK_SIZE == 0)
        return "block" if (grid.block_rows, grid.block_columns) == (BLOCK_SIZE,) * 2 and fits else ""

    @property
    def is_taken_as_it_is(self) -> bool:
        return self.stored.format.name == f"float8-{self.recipe}"

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks())

    def chunks(self) -> Iterator[_Chunk]:
        if self.has_rows:
            yield from (_Chunk(self, (rows,)) for rows in self.rows)
            return
        by_matrix: dict[tuple[int, ...], list[Rows]] = {}
        for matrix, rows in self.rows:
            by_matrix.setdefault(matrix, []).append((matrix, rows))
        yield from (_Chunk(self, tuple(of_matrix)) for of_matrix in by_matrix.values())


@dataclass(frozen=True)
class _Chunk:
    """Rows of one matrix, without gaps."""

    region: FrozenRegion
    rows: tuple[Rows, ...]

    @property
    def num_rows(self) -> int:
        return self.rows[-1][1].stop - self.rows[0][1].start

    @property
    def num_bytes(self) -> int:
        info, sizes = self.region.source.info, self.region.sizes
        return info.num_bytes * self.num_rows // prod(sizes[:-1])

    def read(self, files: Files) -> None:
        """
        Raises:
            ConfigError: reading failed, or values are not finite.
        """
        region, first = self.region, self.rows[0][1].start
        try:
            if region.is_taken_as_it_is:
                region.stored.put(region.module, self.rows[0][0], first, self._codes(files))
                return
            values_RC = self._values(files)
            for matrix, rows in self.rows:
                values = values_RC[rows.start - first : rows.stop - first]
                region.stored.fill(region.module, matrix, rows.start, values)
        except ValueError as error:
            raise ConfigError(
                str(error),
                where=f"{region.source.info.path}: {region.source.info.key}",
                mend="The checkpoint is damaged: copy or download the file again.",
            ) from error

    def _values(self, files: Files) -> Tensor:
        """Of all rows, float32 (R, C)."""
        region, (matrix, rows) = self.region, self.rows[0]
        sizes, piece = region.sizes, region.piece
        into = torch.empty(*[1] * (len(sizes) - 2), self.num_rows, sizes[-1])
        offsets = (*matrix[len(piece.at) :], rows.start, 0)
        unmerged = piece.unmerged(sizes)
        num_column_dims = 1 if piece.axes is None else len(piece.axes.groups[-1])
        num_row_dims = len(unmerged) - num_column_dims
        whole = Region(region.source, piece.in_file_order(into), piece.unmerged(offsets), unmerged, num_row_dims)
        for chunk in whole.chunks():
            chunk.read(files)
        return into.flatten(0, -2)

    def _codes(self, files: Files) -> tuple[Tensor, Tensor]:
        region, (matrix, rows) = self.region, self.rows[0]
        assert isinstance(region.source, QuantizedSource)
        first = rows.start
        for dim, index in enumerate(matrix[len(region.piece.at) :]):
            first += index * prod(region.sizes[dim + 1 : -1])
        quantized = region.source.quantized_rows(files, first, self.num_rows)
        codes_RC = quantized.codes_RC.view(torch.uint8)
        if ((codes_RC & 127) == 127).any():
            raise ValueError("a code stands for no number")
        return codes_RC, quantized.scales_SG.contiguous().view(torch.uint8)


def describe(regions: Iterable[FrozenRegion]) -> str:
    """How many weights of the files are taken as they are, and which are quantised."""
    regions = list(regions)
    keys = [region.source.info.key for region in regions if not region.is_taken_as_it_is]
    line = f"Frozen weights: {len(regions) - len(keys)} tensors taken as they are, {len(keys)} quantised while read"
    if 0 < len(keys) < len(regions):
        line += f": {describe_keys(keys)} (filter_fqns of the converter leaves them as they are)"
    is_float8 = (region for region in regions if region.stored.format.name.startswith("float8-"))
    others = Counter(region.recipe for region in is_float8 if region.recipe and not region.is_taken_as_it_is)
    for recipe, count in others.items():
        line += f'; with quantize.frozen.float8.recipe_name = "{recipe}", {count} would be taken as they are'
    return line
