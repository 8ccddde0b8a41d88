"""What weights are read from: rows of values, whatever the file holds them as.

A file tensor, with its scales if it is quantised, is seen as a matrix: its leading dims flattened into rows, its last
dim the columns. Rows are what one reads and decodes at a time, so a tensor of any size passes through little memory.
Several threads may read at once.

Legend: R rows, C columns.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from titanmoe.checkpoint.safetensors_io import DAMAGED, DTYPES, TensorInfo, bytes_of
from titanmoe.config.errors import ConfigError

# Linux 6.14 and later (include/uapi/linux/fs.h); Python's os module does not name it yet.
_RWF_DONTCACHE = 0x80


class Files:
    """Files opened as they are needed and kept open until the end of the `with` block; threads may share it.

    Each thread opens a file anew: how far a system reads ahead depends on who opened it.

    Args:
        fill_cache: False asks the system not to keep what it reads from the disk in its page cache (what is there
            already stays). That spares it as much memory as is read, which takes long to get in a virtual machine.
            Systems that cannot do so read as usual.
    """

    def __init__(self, *, fill_cache: bool = True) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[tuple[int, Path], int] = {}
        self._flags = 0 if fill_cache or sys.platform != "linux" else _RWF_DONTCACHE
        self.bytes_read = 0

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, info: TensorInfo, start: int, into: Tensor) -> None:
        """Fill `into`, a contiguous tensor on the CPU, with the file tensor's bytes from its byte `start` on.

        The bytes are taken as they are: `into` has the file tensor's dtype, or one of the same size.

        Raises:
            ConfigError: the file cannot be opened or ended early, or the disk failed.
        """
        left = bytes_of(into)
        assert start >= 0 and start + len(left) <= info.num_bytes, f"read beyond {info.key}"
        position = info.start + start
        try:
            descriptor = self._descriptor(info.path)
            while left:
                num_bytes = self._read_some(descriptor, left, position)
                if not num_bytes:
                    raise ConfigError("the file ended while it was being read", where=str(info.path), mend=DAMAGED)
                position += num_bytes
                left = left[num_bytes:]
        except OSError as error:
            raise ConfigError(f"reading failed: {error.strerror}", where=str(info.path)) from error
        with self._lock:
            self.bytes_read += into.numel() * into.element_size()

    def _read_some(self, descriptor: int, into: memoryview, position: int) -> int:
        """The system may read less than it is asked for (at most 2 GiB a call on Linux); 0 is the end of the file."""
        if flags := self._flags:
            try:
                return os.preadv(descriptor, [into], position, flags)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._flags = 0
        return os.preadv(descriptor, [into], position)

    def _descriptor(self, path: Path) -> int:
        key = (threading.get_ident(), path)
        with self._lock:
            if key not in self._descriptors:
                self._descriptors[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[key]


class RowSource(Protocol):
    """One weight of the files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the decoded values, as the file arranges them; () is taken as a row of one."""

    @property
    def info(self) -> TensorInfo:
        """The tensor that holds the values: for the order of the bytes, for progress, and for messages."""

    def rows(self, files: Files, first: int, count: int) -> Tensor:
        """`count` rows from row `first` on, decoded: (R, C) of any float dtype, on the CPU.

        Raises:
            ConfigError: reading failed, or the values cannot be decoded.
        """


@dataclass(frozen=True)
class PlainSource:
    """A tensor whose values are in the file as they are."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def rows(self, files: Files, first: int, count: int) -> Tensor:
        num_columns = self.shape[-1] if self.shape else 1
        rows_RC = torch.empty(count, num_columns, dtype=DTYPES[self.info.dtype])
        files.read(self.info, first * num_columns * rows_RC.element_size(), rows_RC)
        return rows_RC
