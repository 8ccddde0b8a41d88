"""Cutting elementwise work on the CPU into blocks of rows.

A chain of elementwise operations over a large tensor writes every intermediate to memory and reads it back. On an
accelerator a compiler fuses the chain; on the CPU, running the whole chain on some rows at a time keeps intermediates
small and in the last level of cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_NUMEL = 1 << 19
"""Elements in a block: 2 MiB in float32. Smaller ones cost more in waking threads than they save in cache misses."""


def works_in_blocks(tensor: Tensor) -> bool:
    """Whether `tensor` is on the CPU and not being traced (a compiler fuses by itself, and would unroll the loop)."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def row_blocks(x_RN: Tensor) -> Iterator[slice]:
    """Slices of dim 0 that cover it, each of about `_BLOCK_NUMEL` elements; the last may go beyond it."""
    step = max(1, _BLOCK_NUMEL // max(1, x_RN.shape[1]))
    for start in range(0, x_RN.shape[0], step):
        yield slice(start, start + step)
