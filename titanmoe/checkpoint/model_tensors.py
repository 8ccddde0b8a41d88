"""A model's tensors by name, whole or in shards, and the ranks that share them."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanmoe.parallel.ranks import Ranks

# Wrappers for activation checkpointing and compilation put these segments into parameter names.
_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, in the model's order, without wrapper segments in the names."""
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        for segment in _WRAPPER_SEGMENTS:
            name = name.replace(segment, "")
        tensors[name] = tensor
    return tensors


def ranks_sharing(tensors: Iterable[Tensor]) -> Ranks:
    """All ranks of the job if any tensor is a DTensor, else this rank alone."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return Ranks(0, 1, None)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
