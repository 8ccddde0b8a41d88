"""How the C library hands out memory, for runs on the CPU."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger("titanmoe")

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let freed tensors' memory be used again, instead of going back to the kernel.

    By default glibc maps every large block afresh and unmaps it when it is freed, so each activation and gradient is
    paid for with page faults: a tenth to a fifth of a training step on the CPU. The price is that memory once used
    stays with the process. Does nothing where the C library is another one.

    Returns:
        Whether the C library took it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    return all([mallopt(option, value) == 1 for option, value in settings.items()])
