"""A model's tensors by name, whole or in shards, and the ranks that share them. Ranks may hold different ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanmoe.models.adapters import is_adapter
from titanmoe.parallel.ranks import Ranks

# Wrappers for activation checkpointing and compilation put these segments into parameter names.
_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, in the model's order, without wrapper segments in the names."""
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[without_wrappers(name)] = tensor
    return tensors


def without_wrappers(name: str) -> str:
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name


def without_adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model itself, without those that the lora converter adds."""
    return {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}


def ranks_sharing(tensors: Iterable[Tensor]) -> Ranks:
    """All ranks of the job if any tensor is a DTensor, else this rank alone."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return Ranks(0, 1, None)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def tensors_of_all(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """What all ranks have together: tensors of the whole shapes on the meta device, parameters among them as such.

    They are in the order of a model that is on one rank, whichever layers a rank has. Every rank must call it.
    """
    mine = {name: (tensor.shape, tensor.dtype, isinstance(tensor, nn.Parameter)) for name, tensor in tensors.items()}
    found: dict[str, tuple[torch.Size, torch.dtype, bool]] = {}
    for of_rank in ranks.gather(mine):
        for name, kind in of_rank.items():
            assert found.setdefault(name, kind) == kind, f"{name} is {found[name]} on one rank, {kind} on another"
    modules = list(dict.fromkeys(name.partition(".")[0] for name in found))

    def place(name: str) -> tuple[int, int]:
        module, _, rest = name.partition(".")
        layer = rest.partition(".")[0]
        return modules.index(module), int(layer) if layer.isdecimal() else -1

    whole = {}
    for name in sorted(found, key=place):
        shape, dtype, is_parameter = found[name]
        whole[name] = torch.empty(shape, dtype=dtype, device="meta")
        if is_parameter:
            whole[name] = nn.Parameter(whole[name], requires_grad=False)
    return whole
