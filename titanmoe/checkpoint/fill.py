"""Filling regions of memory from the rows of files: chunk by chunk, by a few threads.

One thread would leave the disk idle while it converts, copies, or waits for the system to hand out fresh pages of the
memory that it fills.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from queue import SimpleQueue
from typing import Protocol

from torch import Tensor

from titanmoe.checkpoint.row_source import Files, PlainSource, RowSource
from titanmoe.checkpoint.safetensors_io import DTYPES

_NUM_THREADS = 4
_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Region:
    """Fill `into` from the region of a source that begins at `offsets`.

    Dims are those of the source with nothing merged: `sizes` has the whole source's, of which the first
    `num_row_dims` make up its rows and the others its columns. `into` has as many, of any strides, dtype and device.
    """

    source: RowSource
    into: Tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    num_row_dims: int

    @cached_property
    def is_straight(self) -> bool:
        """Whether every piece of it in the file is, byte for byte, a piece of the memory to fill."""
        if not isinstance(self.source, PlainSource) or DTYPES[self.source.info.dtype] != self.into.dtype:
            return False
        has_whole_rows = self.into.shape[self.num_row_dims :] == self.sizes[self.num_row_dims :]
        return (has_whole_rows or len(self.sizes) == 1) and self.into.device.type == "cpu" and self.into.is_contiguous()

    @property
    def num_bytes(self) -> int:
        """What is read of the tensor that holds the values: whole rows, unless it is straight; no scales."""
        return _Chunk(self, self.into, 0, prod(self.into.shape[: self.num_row_dims])).num_bytes

    def chunks(self) -> Iterator[_Chunk]:
        """The region in pieces that are whole rows of the source, one after the other, in the order of the file."""
        num_columns = prod(self.sizes[self.num_row_dims :])
        # Decoded values are in float32, if they are not what the file has.
        value_bytes = self.into.element_size() if self.is_straight else 4
        max_rows = max(1, _CHUNK_BYTES // (value_bytes * num_columns))
        # How many rows one step along each of the row dims is.
        strides = [prod(self.sizes[dim + 1 : self.num_row_dims]) for dim in range(self.num_row_dims)]
        if self.into.numel():
            yield from self._split(self.into, sum(map(int.__mul__, self.offsets, strides)), strides, max_rows)

    # No function within `chunks`: one that calls itself would keep what it refers to until garbage is collected.
    def _split(self, into: Tensor, row: int, strides: Sequence[int], max_rows: int, dim: int = 0) -> Iterator[_Chunk]:
        """`into` begins at `row`; its dims before `dim` are of size 1."""
        if dim == self.num_row_dims:
            yield _Chunk(self, into, row, 1)
            return
        is_dense = into.shape[dim + 1 : self.num_row_dims] == self.sizes[dim + 1 : self.num_row_dims]
        step = max_rows // strides[dim] if is_dense else 0
        for begin in range(0, into.shape[dim], step or 1):
            part = into.narrow(dim, begin, min(step or 1, into.shape[dim] - begin))
            if step:
                yield _Chunk(self, part, row + begin * strides[dim], part.shape[dim] * strides[dim])
            else:
                yield from self._split(part, row + begin * strides[dim], strides, max_rows, dim + 1)


@dataclass(frozen=True)
class _Chunk:
    """`num_rows` whole rows of a region's source, and the part of the memory that they fill."""

    region: Region
    into: Tensor
    first_row: int
    num_rows: int

    @property
    def num_bytes(self) -> int:
        """As `Region.num_bytes`."""
        if self.region.is_straight:
            return self.into.numel() * self.into.element_size()
        num_rows = prod(self.region.sizes[: self.region.num_row_dims])
        return self.region.source.info.num_bytes * self.num_rows // num_rows

    def read(self, files: Files) -> None:
        source, num_row_dims = self.region.source, self.region.num_row_dims
        column_sizes, column_offsets = self.region.sizes[num_row_dims:], self.region.offsets[num_row_dims:]
        if self.region.is_straight:
            # Columns are left out of a vector only, which is a single row.
            start = self.first_row * prod(column_sizes) + (column_offsets[0] if num_row_dims == 0 else 0)
            files.read(source.info, start * self.into.element_size(), self.into)
            return
        rows_RC = source.rows(files, self.first_row, self.num_rows)
        if self.into.stride(-1) != 1:
            # A matrix is transposed faster by itself, block by block, than on its way into an order of more dims.
            rows_RC = rows_RC.t().contiguous().t()
        rows = rows_RC.view(self.num_rows, *column_sizes)
        sizes = self.into.shape[num_row_dims:]
        columns = [slice(begin, begin + size) for begin, size in zip(column_offsets, sizes, strict=True)]
        rows = rows[tuple([slice(None), *columns])]
        self.into.copy_(rows.view(self.into.shape))


class Chunk(Protocol):
    """Some of what is to be filled; `read` does it, on any thread."""

    @property
    def num_bytes(self) -> int: ...

    def read(self, files: Files) -> None: ...


class Fillable(Protocol):
    """What is to be filled from one source."""

    @property
    def source(self) -> RowSource: ...

    @property
    def num_bytes(self) -> int: ...

    def chunks(self) -> Iterator[Chunk]:
        """In the order of the file."""


def fill(regions: Iterable[Fillable], files: Files, on_progress: Callable[[int], None] | None = None) -> None:
    """Read every region. Each thread goes through a part of the bytes of its own, staging at most 4 MiB (or a row).

    Args:
        on_progress: called on this thread with the bytes read so far, after each chunk.

    Raises:
        ConfigError: what one of the sources raised; nothing more is read then.
    """
    stop = threading.Event()
    # What the threads report: bytes read, why one gave up, or that one has ended.
    reports: SimpleQueue[int | BaseException | None] = SimpleQueue()

    def work(chunks: list[Chunk]) -> None:
        try:
            for chunk in chunks:
                if stop.is_set():
                    break
                chunk.read(files)
                reports.put(chunk.num_bytes)
        except BaseException as error:  # raised again by the thread that waits
            reports.put(error)
        reports.put(None)

    threads = [threading.Thread(target=work, args=(chunks,)) for chunks in _parts(regions) if chunks]
    num_bytes = 0
    try:
        for thread in threads:
            thread.start()
        num_running = len(threads)
        while num_running:
            report = reports.get()
            if isinstance(report, BaseException):
                raise report
            if report is None:
                num_running -= 1
                continue
            num_bytes += report
            if on_progress is not None:
                on_progress(num_bytes)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _parts(regions: Iterable[Fillable]) -> list[list[Chunk]]:
    """The chunks in as many parts as there are threads, of about as many bytes each.

    Parts are whole stretches of the files: systems read ahead for who reads on and on, not for who takes turns.
    """
    regions = sorted(regions, key=lambda region: (region.source.info.path, region.source.info.start))
    total, num_bytes = sum(region.num_bytes for region in regions), 0
    parts: list[list[Chunk]] = [[] for _ in range(_NUM_THREADS)]
    for region in regions:
        for chunk in region.chunks():
            parts[num_bytes * _NUM_THREADS // total].append(chunk)
            num_bytes += chunk.num_bytes
    return parts
