"""Context parallelism: every sequence is cut into parts of neighbouring tokens, one for each rank of a group.

All that is computed token by token needs nothing of the other ranks. For attention, tokens are exchanged for heads
(DeepSpeed-Ulysses, arXiv 2309.14509): each rank gets all tokens of the group's sequences for its share of the heads,
attends as one process would, whatever the mask, and gives the results back. Every rank does the same work, so nothing
has to be balanced.

Shape suffixes: B batch, P tokens of a part, S of the whole sequence, N heads, H head dim, G ranks of the group.
Bytes sent per rank, layer and direction: (G - 1) / G of the queries, keys, values and outputs of its tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from titanmoe.models.decoder import Decoder
from titanmoe.ops.attention import causal_attention


def apply_context_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Let the model take the parts of sequences that belong to this rank of `mesh`, which has one axis.

    The number of query heads of every layer must be a multiple of the number of ranks.
    """
    model.num_sequence_parts = mesh.size()
    for block in model.blocks():
        block.attention.attend = _HeadExchange(mesh.get_group())


def share_sequence_statistics(model: Decoder, mesh: DeviceMesh) -> None:
    """Let routers know that each rank of `mesh`, which has one axis, routes a part of every sequence."""
    for _, layer in model.moe_layers():
        layer.router.sequence_parts = _SequenceParts(mesh.get_group())


class _HeadExchange:
    """`causal_attention` of whole sequences, called with this rank's part of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self,
        q_BPNH: Tensor,
        k_BPKH: Tensor,
        v_BPKV: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        sinks_N: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `causal_attention`; `cu_seqlens` counts the tokens of whole sequences. Collective."""
        num_ranks, rank, num_kv_heads = self.group.size(), self.group.rank(), k_BPKH.shape[2]
        # Fewer key heads than ranks, or a number that cannot be dealt: some ranks get the same.
        repeats = num_ranks // math.gcd(num_ranks, num_kv_heads)
        if repeats > 1:
            k_BPKH, v_BPKV = (tensor.repeat_interleave(repeats, dim=2) for tensor in (k_BPKH, v_BPKV))
        if sinks_N is not None:
            sinks_N = sinks_N.chunk(num_ranks)[rank]
        q, k, v = (_tokens_for_heads(tensor, self.group) for tensor in (q_BPNH, k_BPKH, v_BPKV))
        return _heads_for_tokens(causal_attention(q, k, v, cu_seqlens, sinks_N=sinks_N, **options), self.group)


def _tokens_for_heads(x_BPNH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tokens (B, S, N / G, H) of this rank's heads, from all heads of its tokens."""
    parts_GBPNH = x_BPNH.unflatten(2, (group.size(), -1)).movedim(2, 0)
    return _exchange(parts_GBPNH, group).movedim(0, 1).flatten(1, 2)


def _heads_for_tokens(x_BSNH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: all heads (B, P, N, H) of this rank's tokens."""
    parts_GBPNH = x_BSNH.unflatten(1, (group.size(), -1)).movedim(1, 0)
    return _exchange(parts_GBPNH, group).movedim(0, 2).flatten(2, 3)


def _exchange(parts: Tensor, group: Any) -> Tensor:
    """Part g of dim 0 goes to rank g, and what rank g sends takes its place."""
    return all_to_all_single_autograd(parts.contiguous(), None, None, group)


class _SequenceParts:
    """See `titanmoe.models.moe.router.SequenceParts`."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.count: int = group.size()

    def mean(self, x: Tensor) -> Tensor:
        return all_reduce(x, "sum", self.group) / self.count
