"""What travels between ranks in one optimizer step: the formulas, which need no ranks and no process group.

Bytes are those that one rank sends if every message takes the cheapest way: with G ranks, (G - 1) / G of what an
all-gather puts together, of what a reduce-scatter takes in and of what an all-to-all deals out, and twice that of what
an all-reduce sums (it is the first two, one after the other). Padding that is sent counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from titanmoe.config.sizes import Degrees
from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.gradients import Flow, gradient_flow
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE
from titanmoe.parallel.activation_checkpoint import Mode, recomputed_blocks
from titanmoe.parallel.fsdp import Reshard
from titanmoe.parallel.mesh import CONTEXT, EXPERT, EXPERT_TENSOR, FSDP, PIPELINE, REPLICATE, TENSOR
from titanmoe.parallel.shards import ENDS, FSDP_OF_EXPERTS, LocalParameter, local_parameters
from titanmoe.parallel.stages import Stages

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
PARTS, WORLD = "cp x tp", "world"
"""Axes beside those of `mesh` and FSDP_OF_EXPERTS: the parts of the same sequences, and all ranks."""
_INT64, _FLOAT32, _FLOAT64 = 8, 4, 8


@dataclass(frozen=True)
class Step:
    """What decides how much travels in an optimizer step, beside the model and the mesh.

    Attributes:
        batch: sequences of a microbatch that one rank, or a group of ranks with the same sequences, computes.
        param_bytes: of a number as parameters and activations are computed with; weights in few bits stay so.
        reduce_bytes: of a number as gradients are summed over ranks.
        stops_early: a layer is recomputed only as far as its backward pass needs.
        has_balance_loss: whether routers add one.
        sums_counts: whether the tokens of every expert are summed over ranks, for a logged step or a moving bias.
    """

    batch: int
    seq_len: int
    num_microbatches: int = 1
    param_bytes: int = 2
    reduce_bytes: int = 4
    reshard: Reshard = "default"
    recompute: Mode = "none"
    recompute_option: str = "op"
    stops_early: bool = False
    has_balance_loss: bool = False
    sums_counts: bool = False


@dataclass(frozen=True)
class Rows:
    """Routed rows of one layer and optimizer step: how many leave the rank, and how many come from other ranks."""

    leaving: Fraction | int
    arriving: Fraction | int


@dataclass(frozen=True)
class Traffic:
    """What a rank sends for one purpose in one optimizer step."""

    kind: Kind
    axis: str
    what: str
    num_calls: int
    num_bytes: Fraction


def num_sent(kind: Kind, message: int | Fraction, num_ranks: int) -> Fraction:
    """Of a message of so many bytes, those that one of its ranks sends. An all-to-all's parts are taken as equal."""
    if kind == "send":
        return Fraction(message)
    return Fraction(message) * (num_ranks - 1) / num_ranks * (2 if kind == "all-reduce" else 1)


def axes_of(degrees: Degrees, rank: int) -> dict[str, tuple[int, ...]]:
    """The ranks along every axis through `rank`, as `Mesh` arranges them."""
    outer = {PIPELINE: degrees.pp, REPLICATE: degrees.dp_replicate}
    fsdp, num_experts = degrees.dp_shard * degrees.cp, degrees.ep * degrees.etp
    parts = degrees.cp * degrees.tp
    others = {"others": degrees.num_ranks // parts}
    experts = {FSDP_OF_EXPERTS: fsdp * degrees.tp // num_experts, EXPERT: degrees.ep, EXPERT_TENSOR: degrees.etp}
    views: tuple[dict[str, int], ...] = (
        outer | {FSDP: fsdp, TENSOR: degrees.tp},
        outer | experts,
        others | {CONTEXT: degrees.cp, TENSOR: degrees.tp},
        others | {PARTS: parts},
        {WORLD: degrees.num_ranks},
    )
    axes: dict[str, tuple[int, ...]] = {}
    for view in views:
        stride = 1
        for axis, size in reversed(view.items()):
            first = rank - rank // stride % size * stride
            axes[axis] = tuple(first + place * stride for place in range(size))
            stride *= size
    axes.pop("others")
    return axes


def step_traffic(
    model: Decoder,
    degrees: Degrees,
    step: Step,
    rank: int = 0,
    *,
    stages: Stages | None = None,
    rows: Sequence[Rows] | None = None,
) -> list[Traffic]:
    """Everything that `rank` sends in one optimizer step.

    What is frozen is gathered, and has no gradients. These are taken to be computed of all queries, keys and values of
    a layer, or of none of them.

    Args:
        model: the whole, converted and not distributed; on the meta device.
        stages: of the pipeline, if there is one.
        rows: of every MoE layer of this rank, over all microbatches; None takes all experts to be equally popular.
    """
    tally = _Tally(axes_of(degrees, rank), rank)
    job = _Job(model.spec, degrees, step, _part(model.spec, stages, tally.place(PIPELINE)), gradient_flow(model))
    parameters = local_parameters(model, degrees, None if stages is None else job.part)
    _parameters(tally, job, parameters)
    _rows_to_experts(tally, job, rows)
    _tokens_for_heads(tally, job)
    _tokens_of_a_layer(tally, job)
    _tokens_of_an_expert(tally, job)
    _norms_of_rows(tally, job, parameters)
    _words(tally, job)
    if stages is not None:
        _hidden_states(tally, job, stages)
        _tied_gradient(tally, job, parameters)
    _replicated_gradients(tally, parameters)
    _gradient_norm(tally, parameters)
    _agreements(tally, job)
    return tally.traffic


def num_host_waits(model: Decoder, degrees: Degrees, step: Step, rank: int = 0, *, stages: Stages | None = None) -> int:
    """How often a host waits for its device in an optimizer step that is not logged.

    Where experts are on several ranks, once for each MoE layer and forward pass: the host must know how many rows come
    and go. Of recomputation only that by operation asks again. And once for each forward pass through a part of the
    model whose attention cuts sequences into chunks.
    """
    spec, place = model.spec, axes_of(degrees, rank)[PIPELINE].index(rank)
    job = _Job(spec, degrees, step, _part(spec, stages, place), gradient_flow(model))
    waits = [layer.num_agreements for layer in job.layers() if isinstance(layer.spec.feed_forward, MoE)]
    num_waits = sum(waits) if degrees.ep > 1 else 0
    for part in [job.part] if stages is None else [stages.parts[stage] for stage in stages.of(place)]:
        chunks = {getattr(spec.layers[index].attention, "chunk", None) for index in part.layers}
        num_waits += sum(chunk is not None and chunk < step.seq_len for chunk in chunks)
    return num_waits * step.num_microbatches


def _part(spec: DecoderSpec, stages: Stages | None, place: int) -> Part:
    return Part(tuple(range(len(spec.layers)))) if stages is None else stages.on(place)


@dataclass(frozen=True)
class _Layer:
    """A layer of this rank; how often ranks agree on numbers of rows in its forward passes, and tokens travel."""

    spec: LayerSpec
    flow: Flow
    num_agreements: int
    num_exchanges: int


@dataclass(frozen=True)
class _Job:
    spec: DecoderSpec
    degrees: Degrees
    step: Step
    part: Part
    flows: Sequence[Flow]

    def layers(self) -> list[_Layer]:
        step = self.step
        again = recomputed_blocks(len(self.spec.layers), step.recompute, step.recompute_option)
        # By operation, tokens from other ranks are kept; otherwise, numbers that the host was told.
        by_op = step.recompute == "selective" and step.recompute_option == "op"
        return [
            _Layer(self.spec.layers[index], flow, 1 + (by_op and flow.output), 1 + (again[index] and flow.output))
            for index, flow in enumerate(self.flows)
            if index in self.part.layers
        ]

    @property
    def num_tokens(self) -> int:
        """Of a microbatch, on one rank, between layers."""
        return self.step.batch * self.step.seq_len // (self.degrees.cp * self.degrees.tp)

    @property
    def token_bytes(self) -> int:
        """Of one token between layers."""
        return self.spec.dim * self.step.param_bytes


class _Tally:
    def __init__(self, axes: Mapping[str, tuple[int, ...]], rank: int) -> None:
        self._axes, self._rank = axes, rank
        self.traffic: list[Traffic] = []

    def num_ranks(self, axis: str) -> int:
        return len(self._axes[axis])

    def place(self, axis: str) -> int:
        """Of the rank itself."""
        return self._axes[axis].index(self._rank)

    def add(self, kind: Kind, axis: str, what: str, messages: Sequence[int | Fraction]) -> None:
        """Messages of so many bytes, one for each call. A group of one rank sends none."""
        sent = sum((num_sent(kind, message, self.num_ranks(axis)) for message in messages), Fraction())
        self.add_sent(kind, axis, what, len(messages), sent)

    def add_sent(self, kind: Kind, axis: str, what: str, num_calls: int, num_bytes: Fraction | int) -> None:
        """Messages of which one knows how much is sent."""
        if self.num_ranks(axis) > 1 and num_calls:
            self.traffic.append(Traffic(kind, axis, what, num_calls, Fraction(num_bytes)))

    def add_gather(self, axis: str, what: str, message: int, num_forward: int, num_backward: int) -> None:
        """Gathered in each forward pass; gradients are summed and dealt out backward."""
        self.add("all-gather", axis, what, [message] * num_forward)
        self.add("reduce-scatter", axis, what, [message] * num_backward)

    def add_sum(self, axis: str, what: str, message: int, num_forward: int, num_backward: int) -> None:
        """The other way round."""
        self.add("reduce-scatter", axis, what, [message] * num_forward)
        self.add("all-gather", axis, what, [message] * num_backward)


# ---- parameters and gradients --------------------------------------------------------------------------------------


def _parameters(tally: _Tally, job: _Job, parameters: Sequence[LocalParameter]) -> None:
    groups: dict[str, list[LocalParameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.group, []).append(parameter)
    for what, members in groups.items():
        axis, step = members[0].axis, job.step
        num_shards = tally.num_ranks(axis)
        gathered = [
            member.num_padded(num_shards)
            * (step.param_bytes if member.dtype.is_floating_point else member.dtype.itemsize)
            for member in members
        ]
        tally.add("all-gather", axis, f"parameters of {what}", [sum(gathered)] * _num_gathers(what, job))
        learnt = sum(member.num_padded(num_shards) for member in members if member.learns) * step.reduce_bytes
        if learnt:
            tally.add("reduce-scatter", axis, f"gradients of {what}", [learnt])
            tally.add("all-reduce", REPLICATE, f"gradients of {what}", [learnt // num_shards])


def _num_gathers(group: str, job: _Job) -> int:
    """For each forward and each backward pass, unless parameters are kept from one to the other.

    In a pipeline they stay after a backward pass too, so that they are gathered once, or, where each forward pass frees
    them, at the beginning and after each of these.
    """
    times, reshard, (_, last, both) = job.step.num_microbatches, job.step.reshard, ENDS
    frees = reshard == "always" or (reshard == "default" and job.degrees.pp == 1 and group != last)
    if group == both:
        frees = False
    if job.degrees.pp > 1:
        return times + 1 if frees else 1
    return 2 * times if frees and _is_gathered_backward(group, job.flows) else times


def _is_gathered_backward(group: str, flows: Sequence[Flow]) -> bool:
    """For a backward pass of its own; or for none, since FSDP2 gathers a group while the next one goes backward."""
    if group in ENDS:
        return group != ENDS[0] or flows[0].output
    layer = int(group.rpartition(" ")[2])
    return flows[layer].output or (group == f"layer {layer}" and flows[min(layer + 1, len(flows) - 1)].output)


def _replicated_gradients(tally: _Tally, parameters: Sequence[LocalParameter]) -> None:
    """Summed once per step over the ranks that have the same parameters and different tokens, heads or hidden units."""
    for axis in (TENSOR, EXPERT_TENSOR):
        members = [parameter for parameter in parameters if parameter.learns and parameter.addends == axis]
        sizes = [member.num_owned(tally.num_ranks(member.axis), tally.place(member.axis)) for member in members]
        if sum(sizes):
            tally.add("all-reduce", axis, "gradients of what is not split", [sum(sizes) * _FLOAT32])


def _tied_gradient(tally: _Tally, job: _Job, parameters: Sequence[LocalParameter]) -> None:
    """Pipeline: the first and the last rank tell each other the gradient of the weight that both have."""
    for weight in parameters:
        if weight.name != "tok_embeddings.weight" or not (job.spec.tie_embeddings and weight.learns):
            continue
        size = weight.num_owned(tally.num_ranks(weight.axis), tally.place(weight.axis))
        if size:
            tally.add("send", PIPELINE, "gradient of a tied embedding", [size * _FLOAT32])


def _gradient_norm(tally: _Tally, parameters: Sequence[LocalParameter]) -> None:
    """One number for each way of splitting parameters, and each axis that takes part in it; and one for a pipeline."""
    layouts = {
        (parameter.axis, *(axis for axis in parameter.splits if tally.num_ranks(axis) > 1)) for parameter in parameters
    }
    for axis in (*itertools.chain(*layouts), PIPELINE):
        tally.add("all-reduce", axis, "norm of gradients", [_FLOAT64])


# ---- tokens --------------------------------------------------------------------------------------------------------


def _rows_to_experts(tally: _Tally, job: _Job, rows: Sequence[Rows] | None) -> None:
    """Of every MoE layer: how many rows come, the rows and their weights, and the results on their way back."""
    times, num_ranks = job.step.num_microbatches, job.degrees.ep
    given = None if rows is None else iter(rows)
    for layer in job.layers():
        moe = layer.spec.feed_forward
        if not isinstance(moe, MoE):
            continue
        even = Fraction(job.num_tokens * job.degrees.etp * times * moe.top_k * (num_ranks - 1), num_ranks)
        routed = Rows(even, even) if given is None else next(given)
        # Gradients travel against what they are gradients of.
        there = layer.num_exchanges * routed.leaving + layer.flow.feed_forward * routed.arriving
        back = layer.num_exchanges * routed.arriving + layer.flow.output * routed.leaving
        calls_there, calls_back = (
            (layer.num_exchanges + has) * times for has in (layer.flow.feed_forward, layer.flow.output)
        )
        counts = [moe.num_experts * _INT64] * (layer.num_agreements * times)
        tally.add("all-to-all", EXPERT, "how many rows come", counts)
        tally.add_sent("all-to-all", EXPERT, "rows to their experts", calls_there, there * job.token_bytes)
        tally.add_sent("all-to-all", EXPERT, "weights of rows", calls_there, there * _FLOAT32)
        tally.add_sent("all-to-all", EXPERT, "results of experts", calls_back, back * job.token_bytes)


def _tokens_for_heads(tally: _Tally, job: _Job) -> None:
    """Context parallelism: queries, keys and values of a rank's tokens for all tokens of some heads, and back."""
    for layer in job.layers():
        num_calls = (layer.num_exchanges + layer.flow.heads) * job.step.num_microbatches
        for channels in _exchanged_channels(layer.spec, job.degrees.cp, job.degrees.tp):
            message = job.num_tokens * job.degrees.tp * channels * job.step.param_bytes
            tally.add("all-to-all", CONTEXT, "tokens for heads", [message] * num_calls)


def _exchanged_channels(layer: LayerSpec, num_ranks: int, num_parts: int) -> tuple[int, int, int, int]:
    """Channels per token of the queries, keys, values and results that are exchanged, of one of the parts of heads."""
    attention = layer.attention
    num_heads = attention.num_heads // num_parts
    if not isinstance(attention, GroupedQuery):
        queries, values = num_heads * attention.qk_head_dim, num_heads * attention.v_head_dim
        return queries, queries, values, values
    num_kv_heads, remainder = divmod(attention.num_kv_heads, num_parts)
    if remainder:  # one for each of the largest groups of neighbouring queries that share a key head
        num_kv_heads = num_heads // math.gcd(attention.num_heads // attention.num_kv_heads, num_heads)
    # Key heads that are fewer than the ranks, or cannot be dealt, are repeated.
    num_kv_heads = math.lcm(num_kv_heads, num_ranks)
    queries, keys = num_heads * attention.head_dim, num_kv_heads * attention.head_dim
    return queries, keys, keys, queries


def _tokens_of_a_layer(tally: _Tally, job: _Job) -> None:
    """Tensor parallelism: the tokens of all ranks for a part of the layer, and the sum of the parts on the way back."""
    num_tokens, times = job.num_tokens * job.degrees.tp, job.step.num_microbatches
    for layer in job.layers():
        num_forward, feed_forward, flow = layer.num_exchanges * times, layer.spec.feed_forward, layer.flow
        for channels, has_gradient in _gathered_channels(job.spec, layer, job.degrees.tp):
            message = num_tokens * channels * job.step.param_bytes
            tally.add_gather(TENSOR, "tokens of a layer", message, num_forward, has_gradient * times)
        hidden = num_tokens * job.token_bytes
        tally.add_sum(TENSOR, "sums of a layer's parts", hidden, num_forward, flow.feed_forward * times)
        if not isinstance(feed_forward, MoE) or feed_forward.shared is not None:
            is_last = not isinstance(feed_forward, MoE)
            tally.add_gather(TENSOR, "tokens of a layer", hidden, num_forward, flow.feed_forward * times)
            num_sums = times if is_last and job.step.stops_early else num_forward
            tally.add_sum(TENSOR, "sums of a layer's parts", hidden, num_sums, flow.output * times)


def _gathered_channels(spec: DecoderSpec, layer: _Layer, num_ranks: int) -> list[tuple[int, bool]]:
    """Channels per token that attention gathers, and whether they have a gradient: those of its input, or of what is
    narrower; of keys and values that are not split."""
    attention, flow = layer.spec.attention, layer.flow
    if isinstance(attention, GroupedQuery):
        keys = (attention.num_kv_heads * attention.head_dim, flow.latents)
        return [(spec.dim, flow.attention), *([] if attention.num_kv_heads % num_ranks == 0 else [keys, keys])]
    queries = (attention.q_lora_rank, flow.latents) if attention.q_lora_rank else (spec.dim, flow.attention)
    return [queries, (attention.kv_lora_rank + attention.rope.dim, flow.latents)]


def _tokens_of_an_expert(tally: _Tally, job: _Job) -> None:
    """Expert tensor parallelism: the same for the parts of experts, with the weights and choices of tokens."""
    num_tokens, times = job.num_tokens * job.degrees.etp, job.step.num_microbatches
    for layer in job.layers():
        moe, num_forward = layer.spec.feed_forward, layer.num_exchanges * times
        if not isinstance(moe, MoE):
            continue
        tokens, slots = num_tokens * job.token_bytes, num_tokens * moe.top_k
        num_backward = layer.flow.feed_forward * times
        tally.add_gather(EXPERT_TENSOR, "tokens of an expert", tokens, num_forward, num_backward)
        tally.add_gather(EXPERT_TENSOR, "weights of rows", slots * _FLOAT32, num_forward, num_backward)
        tally.add("all-gather", EXPERT_TENSOR, "choices of experts", [slots * _INT64] * num_forward)
        num_sums = times if job.step.stops_early else num_forward
        tally.add_sum(EXPERT_TENSOR, "sums of an expert's parts", tokens, num_sums, layer.flow.output * times)


def _norms_of_rows(tally: _Tally, job: _Job, parameters: Sequence[LocalParameter]) -> None:
    """DoRA: of a module whose inputs are split, the squares of its rows are added up in every forward pass."""
    layers = dict(zip(job.part.layers, job.layers(), strict=True))
    for parameter in parameters:
        module, name = parameter.name.split(".")[-2:]
        if not (name == "down_lora_magnitude" or (name == "lora_magnitude" and module in ("o_proj", "down_proj"))):
            continue
        layer = layers[int(parameter.name.split(".")[1])]
        num_forward = (layer.num_exchanges + layer.num_agreements - 1) * job.step.num_microbatches
        norms = [math.prod(parameter.shape) * _FLOAT32] * num_forward
        tally.add("all-reduce", parameter.addends, "norms of rows", norms)


def _words(tally: _Tally, job: _Job) -> None:
    """Tensor parallelism of embedding, output and loss. The loss takes the tokens in one chunk, or in some."""
    num_tokens, times = job.num_tokens * job.degrees.tp, job.step.num_microbatches
    hidden = num_tokens * job.token_bytes
    if job.part.embeds:
        tally.add_sum(TENSOR, "embedded tokens", hidden, times, job.flows[0].attention * times)
    if job.part.projects:
        tally.add_gather(TENSOR, "last hidden states", hidden, times, times)
        tally.add("all-gather", TENSOR, "logits' sums", [2 * num_tokens * _FLOAT32 * job.degrees.tp] * times)


def _hidden_states(tally: _Tally, job: _Job, stages: Stages) -> None:
    """Pipeline: to the rank of the next stage, and gradients to that of the one before, if these are others."""
    place, hidden = tally.place(PIPELINE), job.num_tokens * job.token_bytes
    messages = [hidden] * job.step.num_microbatches
    for stage in stages.of(place):
        for other, what in ((stage + 1, "hidden states"), (stage - 1, "gradients of hidden states")):
            if 0 <= other < len(stages.ranks) and stages.ranks[other] != place:
                tally.add("send", PIPELINE, what, messages)


# ---- a few numbers -------------------------------------------------------------------------------------------------


def _agreements(tally: _Tally, job: _Job) -> None:
    """What ranks agree on: it costs time to wait for, not to send."""
    tally.add("all-reduce", WORLD, "tokens and stops, on the hosts", [3 * _INT64])
    tally.add("all-reduce", WORLD, "loss", [_FLOAT32])
    moes = [layer.feed_forward for layer in job.spec.layers if isinstance(layer.feed_forward, MoE)]
    if job.step.sums_counts and moes:
        counts = 2 * sum(moe.num_experts for moe in moes)
        tally.add("all-reduce", WORLD, "tokens of every expert", [counts * _INT64])
    if job.step.has_balance_loss:
        for layer in job.layers():
            moe, num_calls = layer.spec.feed_forward, layer.num_exchanges * job.step.num_microbatches
            if isinstance(moe, MoE):
                message = job.step.batch * moe.num_experts * _FLOAT32
                tally.add("all-reduce", PARTS, "balance loss", [message] * num_calls)
