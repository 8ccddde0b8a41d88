"""Tensor parallelism with sequence parallelism (Korthikanti et al., arXiv 2205.05198).

Between layers each rank of a group has its own tokens of the group's sequences, so norms, routers and experts need
nothing of the others. Attention and feed-forwards gather the tokens of the group, compute a part of the heads or of
the hidden units for all of them, and hand the sums back, each rank getting its own tokens of them.

What is not split is replicated over the group, and each rank's gradient of it is an addend: of its own tokens, or of
its own heads. `finish_gradients` adds them up, once per step.

Shape suffixes: B batch, P tokens of a part, S all of the group's, T = B * S, D model dim, N heads, K key heads, V words
of this rank, W all words.
Bytes per rank, and layer with attention and feed-forward: each gathers and hands back (G - 1) / G of B * S * D elements
in the forward pass, and the same in the backward pass, with G ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titanmoe.models.attention import Attend, GroupedQueryAttention
from titanmoe.models.decoder import Decoder, Head
from titanmoe.models.feed_forward import FeedForward
from titanmoe.models.latent_attention import LatentAttention
from titanmoe.models.linear import Linear
from titanmoe.ops.collectives import all_gather, reduce_scatter
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.mesh import EXPERT_TENSOR, TENSOR

_TOKENS = 1  # the dim of (B, S, ...)


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split the layers over `mesh`, which has one axis; the model is on the meta device.

    All parameters but those of the experts become DTensors. Heads, hidden units and words must be multiples of the
    number of ranks. The model is then to be called with the same tokens on all ranks of the group.
    """
    group = mesh.get_group()
    tokens = _Tokens(group)
    for block in model.blocks():
        if isinstance(block.attention, GroupedQueryAttention):
            _split_grouped_query(block.attention, mesh, tokens)
        else:
            _split_latent(block.attention, mesh, tokens)
        shared = block.moe.shared_experts if block.moe is not None else None
        for feed_forward in filter(None, (block.feed_forward, shared)):
            _split_feed_forward(feed_forward, mesh, tokens)
    if (embedding := model.tok_embeddings) is not None:
        _place(embedding, mesh, Shard(0))
        embedding.forward = functools.partial(_embed, embedding, tokens)  # type: ignore[method-assign]
    if model.output is not None:
        _place(model.output, mesh, Shard(0))
    model.project = _Words(tokens)
    experts = {id(parameter) for _, layer in model.moe_layers() for parameter in layer.experts.parameters()}
    for module in model.modules():
        rest = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in experts]
        if any(not isinstance(parameter, DTensor) for parameter in rest):
            _place(module, mesh, Replicate())


def _place(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make DTensors of the module's own parameters that are none yet. `Shard(0)` splits outputs, `Shard(1)` inputs."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not isinstance(parameter, DTensor):
            own = placement
            if isinstance(placement, Shard) and isinstance(module, Linear):
                dim = module.feature_dims[name][placement.dim]
                own = Replicate() if dim is None else Shard(dim)
            setattr(module, name, split_parameter(parameter, mesh, [own]))


def sum_over(group: dist.ProcessGroup, addend: Tensor) -> Tensor:
    """The sum over the ranks of a group, without a gradient."""
    total = addend.clone()
    dist.all_reduce(total, group=group)
    return total


def split_parameter(parameter: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    """A meta parameter as a DTensor. Each dim must be a multiple of the ranks that it is split over."""
    local = parameter.detach()
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            size, remainder = divmod(local.shape[placement.dim], mesh.size(axis))
            assert remainder == 0, "validated"
            local = local.narrow(placement.dim, 0, size)
    sharded = DTensor.from_local(local.contiguous(), mesh, placements, run_check=False)
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


class _Tokens:
    """What the ranks of a group do with the tokens of their sequences."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = group.size(), group.rank()

    def gather(self, x_BPD: Tensor) -> Tensor:
        """x_BSD; in the backward pass gradients are summed over ranks."""
        return all_gather(x_BPD, self.group, dim=_TOKENS)

    def sum(self, x_BSD: Tensor) -> Tensor:
        """This rank's tokens (B, P, D) of the sum over ranks."""
        return reduce_scatter(x_BSD, self.group, dim=_TOKENS)

    def own(self, x_BSD: Tensor) -> Tensor:
        """This rank's tokens of what every rank has."""
        return x_BSD.chunk(self.size, dim=_TOKENS)[self.rank]


def _gather_input(tokens: _Tokens, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (tokens.gather(args[0]), *args[1:])


def _own_input(tokens: _Tokens, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (tokens.own(args[0]), *args[1:])


def _gather_output(tokens: _Tokens, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return tokens.gather(output)


def _sum_output(tokens: _Tokens, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return tokens.sum(output)


def _before(module: nn.Module, hook: Any, tokens: _Tokens) -> None:
    module.register_forward_pre_hook(functools.partial(hook, tokens))


def _after(module: nn.Module, hook: Any, tokens: _Tokens) -> None:
    module.register_forward_hook(functools.partial(hook, tokens))


def _split_sum(linear: Linear, mesh: DeviceMesh, tokens: _Tokens) -> None:
    """Split the inputs of `linear`: its outputs are addends, and each rank gets its own tokens of their sum."""
    _place(linear, mesh, Shard(1))
    linear.num_addends, linear.sum_addends = tokens.size, functools.partial(sum_over, tokens.group)
    _after(linear, _sum_output, tokens)


def _split_feed_forward(feed_forward: FeedForward, mesh: DeviceMesh, tokens: _Tokens) -> None:
    _before(feed_forward, _gather_input, tokens)
    _place(feed_forward.gate_proj, mesh, Shard(0))
    _place(feed_forward.up_proj, mesh, Shard(0))
    _split_sum(feed_forward.down_proj, mesh, tokens)


def _split_grouped_query(attention: GroupedQueryAttention, mesh: DeviceMesh, tokens: _Tokens) -> None:
    spec = attention.spec
    _before(attention, _gather_input, tokens)
    _place(attention.q_proj, mesh, Shard(0))
    splits_keys = spec.num_kv_heads % tokens.size == 0
    for projection in (attention.k_proj, attention.v_proj):
        if splits_keys:
            _place(projection, mesh, Shard(0))
        else:  # each rank computes all heads of its own tokens, and takes those it needs of all tokens
            _before(projection, _own_input, tokens)
            _after(projection, _gather_output, tokens)
    attention.attend = _OwnHeads(attention.attend, tokens, spec.num_heads, None if splits_keys else spec.num_kv_heads)
    _split_sum(attention.o_proj, mesh, tokens)


def _split_latent(attention: LatentAttention, mesh: DeviceMesh, tokens: _Tokens) -> None:
    """Each rank computes latents of its own tokens; they are gathered, being narrower than what they come from."""
    if attention.spec.q_lora_rank is None:
        _before(attention.q_proj, _gather_input, tokens)
        _place(attention.q_proj, mesh, Shard(0))
    else:
        _after(attention.q_a_proj, _gather_output, tokens)
        _place(attention.q_b_proj, mesh, Shard(0))
    _after(attention.kv_a_proj, _gather_output, tokens)
    _place(attention.kv_b_proj, mesh, Shard(0))
    _split_sum(attention.o_proj, mesh, tokens)


class _OwnHeads:
    """`attend` with this rank's query heads, and with the keys, values and sinks that belong to them.

    Args:
        num_kv_heads: if the keys that come are those of all heads; None if they are only this rank's.
    """

    def __init__(self, attend: Attend, tokens: _Tokens, num_heads: int, num_kv_heads: int | None) -> None:
        self.attend, self.tokens = attend, tokens
        self.key_heads: list[int] | None = None
        if num_kv_heads is not None:
            queries_per_key, num_own = num_heads // num_kv_heads, num_heads // tokens.size
            own = range(tokens.rank * num_own, (tokens.rank + 1) * num_own)
            # The largest groups of neighbouring queries that share a key head, on every rank.
            step = math.gcd(queries_per_key, num_own)
            self.key_heads = [query // queries_per_key for query in own[::step]]

    def __call__(
        self,
        q_BSNH: Tensor,
        k_BSKH: Tensor,
        v_BSKV: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        sinks_N: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if sinks_N is not None:
            sinks_N = sinks_N.chunk(self.tokens.size)[self.tokens.rank]
        if self.key_heads is not None:
            # Not by an index, which would have to be sent to the device in every layer.
            k_BSKH, v_BSKV = (
                torch.cat([heads.narrow(2, head, 1) for head in self.key_heads], dim=2) for heads in (k_BSKH, v_BSKV)
            )
        return self.attend(q_BSNH, k_BSKH, v_BSKV, cu_seqlens, sinks_N=sinks_N, **options)


def _embed(embedding: nn.Embedding, tokens: _Tokens, tokens_BS: Tensor) -> Tensor:
    """Each rank looks up the words that it has, and hands them to the ranks whose tokens they are."""
    weight_VD = local_tensor(embedding.weight)
    words_BS = tokens_BS - tokens.rank * weight_VD.shape[0]
    is_elsewhere_BS = (words_BS < 0) | (words_BS >= weight_VD.shape[0])
    x_BSD = F.embedding(words_BS.masked_fill(is_elsewhere_BS, 0), weight_VD)
    return tokens.sum(x_BSD.masked_fill(is_elsewhere_BS[..., None], 0))


class _Words:
    """The vocabulary dealt to the ranks of a group. See `Decoder.project`."""

    def __init__(self, tokens: _Tokens) -> None:
        self.tokens = tokens
        self.group = tokens.group

    def __call__(self, hidden_BPD: Tensor, weight_VD: Tensor, head: Head | None) -> Any:
        """Logits (B, P, W) of this rank's tokens; or the head of all tokens and this rank's words."""
        hidden_BSD = self.tokens.gather(hidden_BPD)
        if head is not None:
            return head(hidden_BSD, weight_VD, words=self.group)
        return self._all_words(F.linear(hidden_BSD, weight_VD))

    def _all_words(self, logits_BSV: Tensor) -> Tensor:
        """All logits of this rank's tokens, from those of this rank's words of all tokens."""
        parts_GBPV = logits_BSV.unflatten(_TOKENS, (self.tokens.size, -1)).movedim(1, 0)
        parts_GBPV = all_to_all_single_autograd(parts_GBPV.contiguous(), None, None, self.group)
        return parts_GBPV.movedim(0, 2).flatten(2)


@torch.no_grad()
def finish_gradients(model: nn.Module) -> None:
    """Sum, over the ranks of a tensor-parallel group, the gradients of what is replicated there.

    To be called on all ranks after the last backward pass of a step: one all-reduce for each mesh and dtype.
    """
    waiting: dict[tuple[DeviceMesh, str, torch.dtype], list[Tensor]] = {}
    for parameter in model.parameters():
        axis = _replicated_axis(parameter)
        if axis is not None and parameter.grad is not None:
            assert isinstance(parameter, DTensor)
            grad = local_tensor(parameter.grad)
            waiting.setdefault((parameter.device_mesh, axis, grad.dtype), []).append(grad)
    for (mesh, axis, _), grads in waiting.items():
        _all_reduce(grads, mesh.get_group(axis))


def _replicated_axis(parameter: Tensor) -> str | None:
    """The axis over which the gradients of a parameter are addends."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.mesh_dim_names is None:
        return None
    axes = zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)
    return next((axis for axis, place in axes if axis in (TENSOR, EXPERT_TENSOR) and place.is_replicate()), None)


def _all_reduce(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each of them over the group, in float32 and in one call."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if tensors:
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
