"""Host memory: how the C library hands it out, and what is in it while the model runs on a device."""

from __future__ import annotations

import ctypes
import logging
import sys

import torch
from torch import Tensor, nn

logger = logging.getLogger("titanmoe")

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# asm-generic/mman-common.h of Linux.
_MADV_HUGEPAGE = 14
_HUGE_PAGE_BYTES = 2 << 20


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


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for pages of 2 MiB where the memory of a new, contiguous CPU tensor has not been written to yet.

    Getting the memory of a model page by page of 4 KiB takes longer than reading the model from a fast disk. Where the
    system has no such pages to give, the others are taken.
    """
    begin = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    num_bytes = tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin
    if sys.platform == "linux" and tensor.device.type == "cpu" and num_bytes >= _HUGE_PAGE_BYTES:
        whole_pages = num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole_pages), _MADV_HUGEPAGE)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers where the model runs; its parameters stay where they are kept."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
