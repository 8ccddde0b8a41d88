"""Expert parallelism: the experts are dealt to the ranks of a group, and tokens travel to them and back.

Each expert may be split over some ranks too (expert tensor parallelism): they gather their tokens before these travel,
each computes a part of the hidden units for all of them, and what comes back is summed.

Shape suffixes: T tokens, D model dim, E experts of all ranks, L experts of this rank, K experts per token, S = T * K
rows sent, A rows arrived, R rows as the experts see them, G ranks in the group.

A rank sends S rows and receives A; over the group as many arrive as are sent. The numbers are known only on the
devices, and a collective wants them on the hosts: that is the one time per layer and forward that a host waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from titanmoe.models.decoder import Decoder
from titanmoe.models.moe.dispatcher import Dispatcher, Routed
from titanmoe.models.moe.layer import MoELayer
from titanmoe.ops.collectives import all_gather, reduce_scatter
from titanmoe.ops.permute import Permutation, combine, permute, permute_weights, regroup_by_expert, sort_by_expert
from titanmoe.parallel.mesh import EXPERT, EXPERT_TENSOR
from titanmoe.parallel.tensor import split_parameter, sum_over


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split the experts of every MoE layer over `mesh`; the model is on the meta device.

    Parameters of the experts become DTensors, sharded by expert and by hidden unit; dispatchers are replaced. The
    number of experts, and that of their hidden units, must be multiples of the numbers of ranks.

    Args:
        mesh: of the axis ep, etp, or both.
    """
    axes = mesh.mesh_dim_names
    assert axes is not None
    for _, layer in model.moe_layers():
        for name, parameter in list(layer.experts.named_parameters(recurse=False)):
            hidden_dim = layer.experts.hidden_dims[name]
            split = Replicate() if hidden_dim is None else Shard(hidden_dim)
            placements = [Shard(0) if axis == EXPERT else split for axis in axes]
            setattr(layer.experts, name, split_parameter(parameter, mesh, placements))
        if EXPERT in axes:
            layer.dispatcher = AllToAllDispatcher(layer.spec.num_experts, mesh.get_group(EXPERT))
        if EXPERT_TENSOR in axes:
            group = mesh.get_group(EXPERT_TENSOR)
            layer.dispatcher = _SharingDispatcher(layer.dispatcher, group)
            layer.experts.num_addends, layer.experts.sum_addends = group.size(), partial(sum_over, group)


def exchanging_dispatcher(layer: MoELayer) -> AllToAllDispatcher | None:
    """What exchanges the rows of a layer, if its experts are on several ranks."""
    dispatcher = layer.dispatcher
    if isinstance(dispatcher, _SharingDispatcher):
        dispatcher = dispatcher.inner
    return dispatcher if isinstance(dispatcher, AllToAllDispatcher) else None


@dataclass(frozen=True)
class _Sent:
    """Rows on their way, and how many come from where for which expert."""

    x_AD: Tensor
    weights_A: Tensor
    num_arrived_GL: Tensor
    sent: Permutation
    num_sent_G: list[int]
    num_arrived_G: list[int]


@dataclass(frozen=True)
class _Journey:
    """How rows came, for the way back."""

    sent: Permutation
    num_sent_G: list[int]
    num_arrived_G: list[int]
    arrived: Permutation


class AllToAllDispatcher:
    """Rows are sorted by expert, sent to the rank that has the expert, and sorted by expert there. Collective."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group

    def send(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> _Sent:
        sent = sort_by_expert(experts_TK, self.num_experts)
        num_sent_E = sent.offsets_E.long()
        num_sent_E[1:] -= sent.offsets_E[:-1]
        num_arrived_GL, sent_G, arrived_G = self.exchange_numbers(num_sent_E.view(self.group.size(), -1))
        x_AD = _exchange(permute(x_TD, sent), arrived_G, sent_G, self.group)
        weights_A = _exchange(permute_weights(weights_TK, sent), arrived_G, sent_G, self.group)
        return _Sent(x_AD, weights_A, num_arrived_GL, sent, sent_G, arrived_G)

    def exchange_numbers(self, num_sent_GL: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """How many rows arrive from where for which expert, and the rows to and from each rank. Makes the host wait."""
        num_arrived_GL = torch.empty_like(num_sent_GL)
        dist.all_to_all_single(num_arrived_GL, num_sent_GL, group=self.group)
        sent_G, arrived_G = torch.stack([num_sent_GL, num_arrived_GL]).sum(2).tolist()
        return num_arrived_GL, sent_G, arrived_G

    def receive(self, sent: _Sent, align: int) -> Routed:
        """Waits for the rows; each expert's are padded here, where they arrive."""
        # What arrives is ordered by where it came from, then by expert.
        num_arrived = sum(sent.num_arrived_G)
        arrived = regroup_by_expert(sent.num_arrived_GL, num_arrived, align)
        journey = _Journey(sent.sent, sent.num_sent_G, sent.num_arrived_G, arrived)
        x_RD, weights_R = permute(sent.x_AD, arrived), permute_weights(sent.weights_A[:, None], arrived)
        return Routed(x_RD, weights_R, arrived.offsets_E, num_arrived, journey)

    def combine(self, y_RD: Tensor, routed: Routed, more_TD: Tensor | None) -> Tensor:
        """y_TD: the sum of every token's rows."""
        assert more_TD is None, "rows have travelled"
        journey: _Journey = routed.journey
        y_AD = combine(y_RD, journey.arrived)
        return combine(_exchange(y_AD, journey.num_sent_G, journey.num_arrived_G, self.group), journey.sent)


class _SharingDispatcher:
    """`inner` for the tokens of all ranks of a group, each of which has a part of every expert. Collective."""

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup) -> None:
        self.inner = inner
        self.group = group

    def send(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Any:
        x_TD, weights_TK = all_gather(x_TD, self.group), all_gather(weights_TK, self.group)
        return self.inner.send(x_TD, weights_TK, all_gather(experts_TK, self.group))

    def receive(self, sent: Any, align: int) -> Routed:
        return self.inner.receive(sent, align)

    def combine(self, y_RD: Tensor, routed: Routed, more_TD: Tensor | None) -> Tensor:
        """y_TD: the sum of every own token's rows, over all parts of the experts."""
        return reduce_scatter(self.inner.combine(y_RD, routed, more_TD), self.group)


def _exchange(rows: Tensor, num_arriving_G: list[int], num_sent_G: list[int], group: Any) -> Tensor:
    return all_to_all_single_autograd(rows.contiguous(), num_arriving_G, num_sent_G, group)
