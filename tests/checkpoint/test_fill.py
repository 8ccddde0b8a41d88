"""Regions of file tensors in memory: every slice, order of dims, dtype and chunk, and threads that fail."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titanmoe.checkpoint import fill as fill_module
from titanmoe.checkpoint import row_source
from titanmoe.checkpoint.fill import Region, fill
from titanmoe.checkpoint.row_source import Files, PlainSource
from titanmoe.checkpoint.safetensors_io import TensorInfo, read_header
from titanmoe.config.errors import ConfigError
from titanmoe.models.keys import Axes, Piece

CHUNK_BYTES = [1, 40, 300, 1 << 22]


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def _source(path: Path, tensor: Tensor) -> PlainSource:
    save_file({"before": torch.ones(3), "x": tensor, "z.after": torch.ones(5)}, path)
    return PlainSource(read_header(path)["x"])


def _nan(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _fill(*regions: Region) -> int:
    """Fill, check what was reported beside what was read, and return it."""
    reported = [0]
    with Files() as files:
        fill(regions, files, reported.append)
        assert reported == sorted(reported)
        assert reported[-1] == files.bytes_read == sum(region.num_bytes for region in regions)
    return reported[-1]


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("shape", [(9,), (7, 6), (4, 5, 3), (2, 3, 4, 2)])
def test_every_region_equals_the_library_s_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], chunk_bytes: int
) -> None:
    monkeypatch.setattr(fill_module, "_CHUNK_BYTES", chunk_bytes)
    source = _source(tmp_path / "file.safetensors", _random(shape))
    ranges = [[(0, size), (1, size), (0, size - 1), (1, 1)] for size in shape]
    with safe_open(tmp_path / "file.safetensors", "pt") as library, Files() as files:
        whole = library.get_tensor("x")
        for region in itertools.product(*ranges):
            expected = whole[tuple(slice(begin, end) for begin, end in region)]
            offsets = tuple(begin for begin, _ in region)
            holder = _nan((*expected.shape, 2))
            # As the file has it, of another dtype, and with holes, as a slice of a parameter may have them.
            for into in (_nan(expected.shape), _nan(expected.shape, torch.float64), holder[..., 1]):
                fill([Region(source, into, offsets, shape, len(shape) - 1)], files)
                assert torch.equal(into, expected.to(into.dtype)), (region, into.dtype)
            assert holder[..., 0].isnan().all()


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize(
    "axes",
    [
        Axes("e (g h) d", "e g h d"),  # gate above up
        Axes("e d (g h)", "e g h d"),  # Llama 4: transposed
        Axes("e d (h g)", "e g h d"),  # gpt-oss: transposed and interleaved
        Axes("e (h g) d", "e g h d"),
        Axes("(e g h) d", "e g h d"),
        Axes("(d e)(g h)", "e g h d"),
        Axes("(h g e d)", "e g h d"),
        Axes("h e (d g)", "e g h d"),
    ],
    ids=lambda axes: axes.file,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_order_of_dims_whole_and_in_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axes: Axes, dtype: torch.dtype, chunk_bytes: int
) -> None:
    """The file is made by numpy-like indexing of the parameter, element by element."""
    monkeypatch.setattr(fill_module, "_CHUNK_BYTES", chunk_bytes)
    shape = {"e": 3, "g": 2, "h": 5, "d": 7}
    parameter = _random(tuple(shape.values()), torch.bfloat16)
    piece = Piece("x", axes=axes)
    unmerged_names = [name for group in axes.groups for name in group]
    stored = torch.empty([shape[name] for name in unmerged_names], dtype=torch.bfloat16)
    for index in itertools.product(*(range(size) for size in shape.values())):
        of_name = dict(zip(shape, index, strict=True))
        stored[tuple(of_name[name] for name in unmerged_names)] = parameter[index]
    source = _source(tmp_path / "file.safetensors", stored.reshape(piece.shape(parameter.shape)))

    num_row_dims = len(unmerged_names) - len(axes.groups[-1])
    for begin, end in [((0, 0, 0, 0), (3, 2, 5, 7)), ((1, 0, 0, 0), (3, 2, 5, 7)), ((0, 1, 1, 2), (2, 2, 4, 6))]:
        box = tuple(slice(*ends) for ends in zip(begin, end, strict=True))
        into = _nan(parameter[box].shape, dtype)
        sizes = piece.unmerged(parameter.shape)
        _fill(Region(source, piece.in_file_order(into), piece.unmerged(begin), sizes, num_row_dims))
        assert torch.equal(into, parameter[box].to(dtype)), box


_FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("to", _FLOATS)
@pytest.mark.parametrize("of", _FLOATS)
def test_every_dtype_is_rounded_as_torch_does(tmp_path: Path, of: torch.dtype, to: torch.dtype) -> None:
    values = _random((33, 5), torch.float64).to(of)
    into = _nan((33, 5), to)
    _fill(Region(_source(tmp_path / "file.safetensors", values), into, (0, 0), (33, 5), 1))
    assert torch.equal(into, values.to(to))


def test_only_the_rows_wanted_are_read(tmp_path: Path) -> None:
    source = _source(tmp_path / "file.safetensors", _random((4, 6, 5)))
    # Rows 2 to 4 of matrices 1 and 2; whole rows, though only part of each is wanted.
    into = _nan((2, 3, 2))
    assert _fill(Region(source, into, (1, 2, 1), (4, 6, 5), 2)) == 2 * 3 * 5 * 4
    # Of a vector, the elements.
    vector = _source(tmp_path / "vector.safetensors", _random((100,)))
    assert _fill(Region(vector, _nan((7,)), (20,), (100,), 0)) == 7 * 4


def test_no_chunk_is_larger_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's matrix alone may be larger than what is to be in memory at once."""
    monkeypatch.setattr(fill_module, "_CHUNK_BYTES", 4 * 64 * 10)
    requests = []
    rows = PlainSource.rows

    def counted(self: PlainSource, files: Files, first: int, count: int) -> Tensor:
        requests.append(range(first, first + count))
        return rows(self, files, first, count)

    monkeypatch.setattr(PlainSource, "rows", counted)
    values = _random((3, 25, 64))
    source = _source(tmp_path / "file.safetensors", values)
    into = _nan((3, 64, 25))
    _fill(Region(source, into.transpose(1, 2), (0, 0, 0), (3, 25, 64), 2))
    assert torch.equal(into, values.transpose(1, 2))
    assert max(len(request) for request in requests) == 10
    assert sorted(itertools.chain(*requests)) == list(range(75))


def test_what_is_filled_is_not_kept(tmp_path: Path) -> None:
    """No reference cycle keeps it until garbage is collected: a loader of pieces would have many of them in memory."""
    source, into = _source(tmp_path / "file.safetensors", _random((4, 5, 3))), _nan((3, 4, 5)).permute(1, 2, 0)
    refers = weakref.ref(into)
    gc.disable()
    try:
        _fill(Region(source, into, (0, 0, 0), (4, 5, 3), 2))
        del into
        assert refers() is None
    finally:
        gc.enable()


def test_rows_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    """A sparse file of 6 GB: only its last row is written."""
    path = tmp_path / "huge.bin"
    shape = (3, 1 << 20, 1 << 10)
    num_bytes = 2 * shape[0] * shape[1] * shape[2]
    last = _random((1 << 10,), torch.bfloat16)
    with open(path, "wb") as file:
        file.seek(8 + num_bytes - last.numel() * 2)
        file.write(last.view(torch.uint8).numpy().tobytes())
    source = PlainSource(TensorInfo("x", path, "BF16", shape, 8, num_bytes))
    for dtype in (torch.bfloat16, torch.float32):
        into = _nan((1, 2, 1 << 10), dtype)
        _fill(Region(source, into, (2, shape[1] - 2, 0), shape, 2))
        assert torch.equal(into[0, 1], last.to(dtype))
        assert not into[0, 0].any()


# Threads and accidents


@dataclass(frozen=True)
class _FailingSource:
    info: TensorInfo
    error: BaseException
    at_row: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def rows(self, files: Files, first: int, count: int) -> Tensor:
        if first <= self.at_row < first + count:
            raise self.error
        return PlainSource(self.info).rows(files, first, count)


@pytest.mark.parametrize("error", [ConfigError("a scale is NaN"), RuntimeError("decoding"), KeyboardInterrupt()])
def test_what_a_thread_raises_is_raised_here_and_no_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(fill_module, "_CHUNK_BYTES", 40)
    source = _source(tmp_path / "file.safetensors", _random((200, 10)))
    before = threading.active_count()
    with Files() as files, pytest.raises(type(error)) as caught:
        fill([Region(_FailingSource(source.info, error, 77), _nan((200, 10)), (0, 0), (200, 10), 1)], files)
    assert caught.value is error
    assert threading.active_count() == before


def test_an_error_in_the_callback_stops_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "_CHUNK_BYTES", 40)
    source = _source(tmp_path / "file.safetensors", _random((2000, 10)))
    before = threading.active_count()

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with Files() as files:
        with pytest.raises(KeyboardInterrupt):
            fill([Region(source, _nan((2000, 10)), (0, 0), (2000, 10), 1)], files, interrupt)
        assert files.bytes_read < 2000 * 40
    assert threading.active_count() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "file.safetensors"
    source = _source(path, _random((3, 4)))
    region = Region(source, _nan((3, 4), dtype), (0, 0), (3, 4), 1)
    with Files() as files:
        fill([region], files)
        os.truncate(path, source.info.start + source.info.num_bytes - 4)
        with pytest.raises(ConfigError, match="ended while it was being read") as caught:
            fill([region], files)
    assert str(path) in str(caught.value)
    path.unlink()
    with Files() as files, pytest.raises(ConfigError, match="reading failed: No such file"):
        fill([region], files)


def test_a_disk_that_fails_and_one_that_gives_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = _random((30, 7))
    source = _source(tmp_path / "file.safetensors", values)
    into = _nan((30, 7))
    region = Region(source, into, (0, 0), (30, 7), 1)
    preadv = os.preadv
    monkeypatch.setattr(row_source.os, "preadv", lambda fd, into, *rest: preadv(fd, [into[0][:13]], *rest))
    with Files() as files:
        fill([region], files)
        assert torch.equal(into, values)

        def fail(*args: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(row_source.os, "preadv", fail)
        with pytest.raises(ConfigError, match="reading failed: Input/output error"):
            fill([region], files)


def test_systems_that_cannot_leave_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = _random((30, 7))
    source = _source(tmp_path / "file.safetensors", values)
    calls = []
    preadv = os.preadv

    def old_kernel(descriptor: int, into: list[memoryview], position: int, flags: int = 0) -> int:
        calls.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return preadv(descriptor, into, position)

    monkeypatch.setattr(row_source.os, "preadv", old_kernel)
    monkeypatch.setattr(row_source.sys, "platform", "linux")
    monkeypatch.setattr(fill_module, "_CHUNK_BYTES", 40)
    into = _nan((30, 7))
    with Files(fill_cache=False) as files:
        fill([Region(source, into, (0, 0), (30, 7), 1)], files)
    assert torch.equal(into, values)
    assert calls[0] != 0 and calls[-1] == 0
    assert sum(flags != 0 for flags in calls) <= fill_module._NUM_THREADS
