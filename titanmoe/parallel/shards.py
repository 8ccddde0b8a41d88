"""Which part of every parameter a rank has, and what FSDP2 makes of it: sizes alone, without ranks or memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from titanmoe.config.sizes import Degrees
from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.models.spec import DecoderSpec, GroupedQuery
from titanmoe.parallel.mesh import EXPERT, EXPERT_TENSOR, FSDP, TENSOR

FSDP_OF_EXPERTS = "fsdp of experts"
"""The axis that experts are sharded over where it is not the others'."""
ENDS = ("the embedding", "norm and output", "embedding and norm")
"""Groups beside the layers'; the last one is instead of both, if embeddings are tied."""


def shard_dim(shape: Sequence[int], num_shards: int) -> int:
    """The dim along which FSDP2 cuts: the first; but of experts that cannot be dealt evenly the model dim."""
    model_dim = {4: 3, 3: 1}.get(len(shape), 0)  # gate_up (E, 2, H, D), down (E, D, H)
    is_first = shape[0] % num_shards == 0 or shape[model_dim] % num_shards
    return 0 if is_first else model_dim


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as FSDP2 finds it: what of it the ranks of tp, ep and etp leave to be sharded.

    Attributes:
        group: what is gathered together: a layer, its experts, or one of ENDS.
        axis: that it is sharded over.
        shape, dtype: of what is stored.
        learns: whether it has a gradient.
        splits: the other axes whose ranks have different parts of it.
        addends: the axis over which its gradients are addends; "" if there is none.
    """

    name: str
    group: str
    axis: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    learns: bool = True
    splits: tuple[str, ...] = ()
    addends: str = ""

    def num_padded(self, num_shards: int) -> int:
        """Numbers in all shards, which are filled up to be equal."""
        size, others = self._sizes(num_shards)
        return -(-size // num_shards) * num_shards * others

    def num_owned(self, num_shards: int, shard: int) -> int:
        """Numbers in one shard, without padding."""
        size, others = self._sizes(num_shards)
        most = -(-size // num_shards)
        return max(0, min(most, size - shard * most)) * others

    def _sizes(self, num_shards: int) -> tuple[int, int]:
        """Of the dim that is cut, and of all others."""
        size = self.shape[shard_dim(self.shape, num_shards)]
        return size, math.prod(self.shape) // size


def local_parameters(model: Decoder, degrees: Degrees, part: Part | None = None) -> list[LocalParameter]:
    """Of a model that is not distributed yet, or of a part of it; in the model's order."""
    owners = (model if part is None else model.view(part)).named_modules()
    return [
        _local(f"{path}.{name}", name, owner, parameter, model.spec, degrees)
        for path, owner in owners
        for name, parameter in owner.named_parameters(recurse=False)
    ]


def _local(
    path: str, name: str, owner: nn.Module, parameter: Tensor, spec: DecoderSpec, degrees: Degrees
) -> LocalParameter:
    group, shape = _group(path, spec.tie_embeddings), tuple(parameter.shape)
    local = partial(LocalParameter, path, dtype=parameter.dtype, learns=parameter.requires_grad)
    if isinstance(owner, Experts) and degrees.shards_experts_apart:
        group, shape, dim = f"the experts of {group}", _split(shape, 0, degrees.ep), owner.hidden_dims[name]
        if dim is None:
            return local(group, FSDP_OF_EXPERTS, shape, splits=(EXPERT,), addends=EXPERT_TENSOR)
        return local(group, FSDP_OF_EXPERTS, _split(shape, dim, degrees.etp), splits=(EXPERT, EXPERT_TENSOR))
    dim = tensor_dim(path, spec, degrees.tp)
    if dim is not None and isinstance(owner, Linear):
        dim = owner.feature_dims[name][dim]
    if dim is None:
        return local(group, FSDP, shape, addends=TENSOR)
    return local(group, FSDP, _split(shape, dim, degrees.tp), splits=(TENSOR,))


def _group(name: str, is_tied: bool) -> str:
    if name.startswith("layers."):
        return f"layer {name.split('.')[1]}"
    embedding, last, both = ENDS
    if is_tied:
        return both
    return embedding if name.startswith("tok_embeddings") else last


def tensor_dim(name: str, spec: DecoderSpec, num_ranks: int) -> int | None:
    """What `apply_tensor_parallel` splits of a parameter's module: outputs (0), inputs (1), or nothing (None)."""
    module = name.split(".")[-2]
    if module in ("k_proj", "v_proj"):
        attention = spec.layers[int(name.split(".")[1])].attention
        assert isinstance(attention, GroupedQuery)
        return 0 if attention.num_kv_heads % num_ranks == 0 else None
    if module in ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "tok_embeddings", "output"):
        return 0
    return 1 if module in ("o_proj", "down_proj") else None


def _split(shape: tuple[int, ...], dim: int, num_ranks: int) -> tuple[int, ...]:
    return tuple(size // num_ranks if index == dim else size for index, size in enumerate(shape))
