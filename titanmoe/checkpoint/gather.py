"""Sharded tensors, one after the other, whole in the memory of rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from titanmoe.checkpoint.model_tensors import tensors_of_all
from titanmoe.ops.sharding import Box, local_box, local_tensor
from titanmoe.parallel.ranks import Ranks

_BYTES_AT_ONCE = 2 << 20


def gather_each(tensors: Mapping[str, Tensor], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor that any rank has, in the model's order; every rank must go through all of them.

    Rank 0 gets each whole on the CPU, the others an empty one; at most one is in memory, and 2 MiB (or a row) on its
    way. DTensor.full_tensor would make every rank hold it, and gloo, or a shard that is not of dim 0, twice. Where
    there is one rank, tensors come as they are.
    """
    if ranks.size == 1:
        yield from ((name, local_tensor(tensor.detach())) for name, tensor in tensors.items())
        return
    held_by_ranks = ranks.gather({name: (local_box(tensor), tensor.device.type) for name, tensor in tensors.items()})
    for name, meta in tensors_of_all(tensors, ranks).items():
        holders = [(rank, *held[name]) for rank, held in enumerate(held_by_ranks) if name in held]
        if name in tensors:
            local = local_tensor(tensors[name].detach())
        else:
            local = torch.empty(0, dtype=meta.dtype, device=holders[0][2])
        whole = torch.empty(meta.shape if ranks.rank == 0 else 0, dtype=meta.dtype)
        # Of ranks that hold the same region, the first sends it.
        owners = {box: rank for rank, box, _ in reversed(holders)}
        for box, owner in owners.items():
            if not box.is_empty:
                _send(local, box, owner, ranks, whole)
        yield name, whole
        del whole


def _send(local: Tensor, box: Box, owner: int, ranks: Ranks, whole: Tensor) -> None:
    """Copy a region from its owner, whose `local` it is, into `whole` on rank 0, some rows at a time."""
    place = (
        whole[tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))]
        if ranks.rank == 0
        else whole
    )
    if owner == 0:
        if ranks.rank == 0:
            place.copy_(local)
        return
    row_shape = box.sizes[1:]
    row_bytes = torch.Size(row_shape).numel() * local.element_size()
    rows_at_once = max(1, _BYTES_AT_ONCE // row_bytes)
    for begin in range(0, box.sizes[0], rows_at_once):
        num_rows = min(rows_at_once, box.sizes[0] - begin)
        if ranks.rank == owner:
            rows = local[begin : begin + num_rows].contiguous()
        else:
            rows = torch.empty((num_rows, *row_shape), dtype=local.dtype, device=local.device)
        # Not a message to rank 0: for each pair of ranks, NCCL would set up a communicator.
        dist.broadcast(rows, owner)
        if ranks.rank == 0:
            place[begin : begin + num_rows].copy_(rows)
