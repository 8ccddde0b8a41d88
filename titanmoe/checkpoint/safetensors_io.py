"""The safetensors format: reading headers, and writing files tensor by tensor.

A file is an 8-byte little-endian length, a JSON header of that length (name -> dtype, shape, and begin and end of
its bytes), and the bytes, without holes (https://github.com/huggingface/safetensors#format). `row_source` reads the
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanmoe.config.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000
DAMAGED = "The file is damaged or was not copied whole: copy or download it again."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, as its header describes it. `start` counts bytes from the beginning of the file."""

    key: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in file order, without reading any of them.

    Raises:
        ConfigError: the file cannot be opened, is empty, a Git-LFS pointer, cut short, or not a safetensors file.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if file_bytes == 0:
                raise ConfigError("the file is empty", where=str(path), mend=DAMAGED)
            if prefix == b"version ":
                raise ConfigError(
                    "this is a Git-LFS pointer: a few lines of text in place of the weights",
                    where=str(path),
                    mend="Run `git lfs install && git lfs pull` in the folder it came from.",
                )
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                what = f"not a safetensors file: it begins with a header length of {header_bytes}"
                raise ConfigError(what, where=str(path), mend=DAMAGED)
            if 8 + header_bytes > file_bytes:
                what = f"the file is cut short: {file_bytes} bytes, of which its header alone takes {8 + header_bytes}"
                raise ConfigError(what, where=str(path), mend=DAMAGED)
            text = file.read(header_bytes)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = [_tensor_info(key, entry, path, 8 + header_bytes) for key, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the header is damaged ({error})", where=str(path), mend=DAMAGED) from error
    tensors.sort(key=lambda info: (info.start, info.num_bytes))
    end = 8 + header_bytes
    for info in tensors:
        if info.start != end:
            what = f"the header is damaged: {info.key} does not begin where the tensor before it ends"
            raise ConfigError(what, where=str(path), mend=DAMAGED)
        end += info.num_bytes
    if end != file_bytes:
        state = "cut short" if file_bytes < end else "longer than its header says"
        raise ConfigError(f"the file is {state}: {file_bytes} bytes instead of {end}", where=str(path), mend=DAMAGED)
    return {info.key: info for info in tensors}


def _tensor_info(key: str, entry: Mapping[str, Any], path: Path, data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"tensor {key} has impossible sizes")
    # Packed sub-byte formats are listed by name only; their readers, if ever, know their sizes.
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {key} of shape {list(shape)} and dtype {dtype} takes {end - begin} bytes")
    return TensorInfo(key, path, dtype, shape, data_start + begin, end - begin)


class TensorWriter:
    """Writes one safetensors file as its tensors come, whole or some rows at a time, holding none of them.

    The header comes first, so names, dtypes and shapes are given up front. Larger dtypes must come before smaller
    ones: readers may map the file and expect each tensor aligned to its dtype. They may be written in any order.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        sizes = [dtype.itemsize for _, dtype, _ in tensors]
        assert sizes == sorted(sizes, reverse=True), "tensors of larger dtypes come first"
        self._announced = {key: (dtype, tuple(shape)) for key, dtype, shape in tensors}
        self._num_left = {key: prod(shape) for key, (_, shape) in self._announced.items() if prod(shape)}
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close and abandon)
        start = self._file.write(_encode_header(tensors))
        self._starts: dict[str, int] = {}
        for key, (dtype, shape) in self._announced.items():
            self._starts[key] = start
            start += prod(shape) * dtype.itemsize

    def write(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or rows (slices along dim 0) of it from `row` on, of any device and dtype, once each."""
        dtype, shape = self._announced[key]
        end = (row + tensor.shape[0], *tensor.shape[1:]) if tensor.dim() else ()
        assert len(end) == len(shape) and end[1:] == shape[1:] and end[:1] <= shape[:1], (
            f"{key}: {end}, announced {shape}"
        )
        if tensor.numel():
            self._file.seek(self._starts[key] + row * prod(shape[1:]) * dtype.itemsize)
            self._file.write(bytes_of(tensor.to("cpu", dtype).contiguous()))
            self._num_left[key] -= tensor.numel()
            if not self._num_left[key]:
                del self._num_left[key]

    @property
    def complete(self) -> bool:
        """Whether every announced tensor was written."""
        return not self._num_left

    def close(self) -> None:
        """Hand everything to the disk and wait until it has it."""
        assert self.complete, "not every announced tensor was written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without finishing; the file is not usable."""
        # Closing tries once more to write what is buffered, and fails again where the disk is full.
        with suppress(OSError):
            self._file.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous()
    # Not view(-1): a contiguous tensor of one element may have any stride.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _encode_header(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, dtype, shape in tensors:
        end = begin + prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Padded with spaces to a multiple of 8, so that the first tensor is aligned for every dtype.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
