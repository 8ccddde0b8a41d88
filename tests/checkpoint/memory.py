"""Memory of this process, from Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from /proc")


def status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS is what is resident now, VmHWM its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Let VmHWM start again from what is in use now.

    Memory that was freed and kept for later goes back to the system first: what takes its place would not be seen. From
    now on, what is freed goes back at once. By default glibc keeps up to twice the largest tensor that was ever freed,
    and how much of that is in use at the peak is a matter of luck.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    assert libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20) == 1
    Path("/proc/self/clear_refs").write_text("5")
