"""Files that survive a power cut and a network file system that hiccups."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger("titanmoe")

Result = TypeVar("Result")

# Errors of a file system that may be gone at the next attempt. A full disk (ENOSPC) is not one of them.
_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EBUSY})
_WAITS_SECONDS = (0.5, 2.0, 8.0)
_READ_BYTES = 4 << 20


def may_pass(error: OSError) -> bool:
    """Whether the same call may succeed a little later."""
    return error.errno in _PASSING


def retrying(action: Callable[[], Result], what: str) -> Result:
    """Call `action`; after an OSError that may pass, wait and call it again, up to four times in all.

    Raises the last error. `what` names the action in the logged line.
    """
    for wait in _WAITS_SECONDS:
        try:
            return action()
        except OSError as error:
            if not may_pass(error):
                raise
            logger.warning("%s: %s; trying again in %g s", what, error.strerror, wait)
            time.sleep(wait)
    return action()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is there with all its bytes, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk its room is wanted
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename or a new file is safe only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return digest.hexdigest()


class HashingWriter(io.BufferedWriter):
    """A file opened for writing that knows the size and SHA-256 of what was written to it.

    Hashing on the way out costs no second read, and describes what was meant rather than what the disk made of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(os.fspath(path), "wb"), buffer_size=1 << 20)
        self.num_bytes = 0
        self.failure: OSError | None = None  # torch.save turns an error of ours into a RuntimeError without its cause
        self._digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        self._digest.update(content)
        self.num_bytes += memoryview(content).nbytes
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
