"""Weights of files into the parts of frozen weights: rows are read, quantised, and put where they belong.

A model never has such a weight as numbers: some rows of one matrix are in memory at a time. What files hold in the
very format that the model has, FP8 codes with a scale per output or per 128 x 128 values, is taken as it is.

Shape suffixes: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from titanmoe.checkpoint.fill import Region
from titanmoe.checkpoint.model_tensors import without_wrappers
from titanmoe.checkpoint.quantized_rows import QuantizedSource
from titanmoe.checkpoint.row_source import Files, RowSource
from titanmoe.config.errors import ConfigError
from titanmoe.models.keys import Piece
from titanmoe.ops.frozen_formats import Float8Block, Float8Channel
from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.scaled_casts import BLOCK_SIZE

Rows = tuple[tuple[int, ...], slice]
"""A matrix of a weight, by its leading indices, and rows of it."""


def stored_weights(model: nn.Module) -> dict[str, tuple[nn.Module, Stored]]:
    """By name, the weights of a model that are stored as parts, with the modules that have these."""
    return {
        without_wrappers(f"{path}.{stored.name}"): (module, stored)
        for path, module in model.named_modules()
        for stored in getattr(module, "stored", {}).values()
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
    def is_taken_as_it_is(self) -> bool:
        source, format = self.source, self.stored.format
        in_order = self.piece.axes is None or (
            self.piece.axes.order == tuple(range(len(self.sizes))) and len(self.piece.axes.groups[-1]) == 1
        )
        if not isinstance(source, QuantizedSource) or source.info.dtype != "F8_E4M3" or not in_order:
            return False
        num_rows, num_columns = self.sizes[-2:]
        grid = source.grid
        if isinstance(format, Float8Channel):
            return grid.block_rows == 1 and grid.block_columns >= num_columns
        fits = grid.matrix_rows == num_rows or (grid.matrix_rows % num_rows == 0 and num_rows % BLOCK_SIZE == 0)
        return isinstance(format, Float8Block) and (grid.block_rows, grid.block_columns) == (BLOCK_SIZE,) * 2 and fits

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
    """How many weights of the files are taken as they are, and how many are quantised."""
    regions = list(regions)
    num_taken = sum(region.is_taken_as_it_is for region in regions)
    return f"Frozen weights: {num_taken} tensors taken as they are, {len(regions) - num_taken} quantised while read"
