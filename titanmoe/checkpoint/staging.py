"""Copies of shards in CPU memory, for a save that goes on while training changes the originals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from titanmoe.checkpoint.dcp_storage import Shard
from titanmoe.checkpoint.quantized_state import as_plain


class Staging:
    """Copies shards to the CPU. With `pinned`, buffers are page-locked and kept for the next save.

    Buffers are used again by the next `copy`: the save that reads them must be over by then.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    def copy(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """A snapshot; once this returns, changing the originals does not change it."""
        copies = {
            name: Shard(self._copy(name, shard.local), shard.shape, shard.offsets) for name, shard in shards.items()
        }
        if self._pinned:
            torch.accelerator.synchronize()
        return copies

    def _copy(self, name: str, local: Tensor) -> Tensor:
        local = as_plain(local)
        if not self._pinned:
            return torch.empty(local.shape, dtype=local.dtype, device="cpu").copy_(local)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=True)
            self._buffers[name] = buffer
        return buffer.copy_(local, non_blocking=True)
