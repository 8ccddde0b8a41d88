"""Adapters on any layout: beside one process, and what three steps of an optimizer move."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.layouts import (
    Change,
    Errors,
    Layout,
    Precision,
    Step,
    build,
    on_rank,
    one_process,
    own_batches,
)
from tests.ranks import full_tensor, run_ranks
from titanmoe.models.adapters import is_adapter
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import ClampedSwiGLU, DecoderSpec
from titanmoe.ops.sharding import local_box, local_tensor
from titanmoe.training.gradients import clip_gradients
from titanmoe.training.optimizer import build_optimizer

_RANKS = ("lora.rank=9", "lora.alpha=4.5")  # shards of it are uneven
_BASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "float32": ((), ()),
    "bfloat16": ((), ()),
    "float8": (("quantize.frozen.float8",), ("quantize.frozen.float8.recipe_name=channel",)),
    "mx": (("quantize.frozen.mx",), ()),
    # Groups of scales would have to be cut.
    "nf4": (
        ("quantize.frozen.nf4",),
        ("quantize.frozen.nf4.block_size=32", "quantize.frozen.nf4.double_quant=false"),
    ),
}


def _precision(kind: str, base: str) -> Precision:
    names, settings = _BASES[base]
    settings = (*_RANKS, *settings, *["lora.use_dora"] * (kind == "DoRA"))
    if base == "bfloat16":
        return Precision(("lora",), settings, torch.bfloat16, torch.bfloat16, noise=0.03)
    return Precision((*names, "lora"), settings)


ADAPTERS = {f"{kind} on {base}": _precision(kind, base) for base in _BASES for kind in ("LoRA", "DoRA")}
"""Computed in float32, but on a base in bfloat16."""


@torch.no_grad()
def adapt(model: Decoder) -> None:
    """Give B values, and magnitudes others than the norms of weights: the same on every layout."""
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b", "lora_magnitude")):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            box = local_box(parameter)
            own = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
            if name.endswith("lora_b"):
                local_tensor(parameter).copy_(0.1 * noise[own])
            else:
                local_tensor(parameter).mul_(1 + 0.1 * noise[own])


def change_for(name: str) -> Change:
    """What to do to a model that gets the adapters of a name.

    Where sums are rounded to bfloat16, a token may choose another expert, or a value be on the other side of a limit
    from which on it has no gradient: all tokens are given the same two experts, others per layer, and limits are far.
    """
    return adapt_and_smooth if name.endswith("bfloat16") else adapt


def adapt_and_smooth(model: Decoder) -> None:
    adapt(model)
    for index, layer in model.moe_layers():
        num_experts = layer.spec.num_experts
        bias_E = torch.zeros(num_experts)
        bias_E[[int(index) % num_experts, (int(index) + num_experts // 2) % num_experts]] = torch.tensor([50.0, 100.0])
        layer.router.expert_bias = bias_E
        if isinstance(activation := layer.experts.spec.activation, ClampedSwiGLU):
            layer.experts.spec = replace(layer.experts.spec, activation=replace(activation, limit=100.0))


def starve(model: Decoder) -> None:
    """No token chooses the first expert, nor the last but one; the others are chosen as before."""
    for _, layer in model.moe_layers():
        bias_E = torch.zeros(layer.spec.num_experts)
        bias_E[[0, -2]] = -100.0
        layer.router.expert_bias = bias_E


@functools.cache
def reference(spec: DecoderSpec, name: str) -> list[Step]:
    """Of one process: two steps if nothing is rounded."""
    num_steps = 2 if name.endswith("float32") else 1
    return one_process(spec, change_for(name), num_steps, ADAPTERS[name])


def errors_of(
    spec: DecoderSpec, layout: Layout, names: Sequence[str] = tuple(ADAPTERS), section: Mapping[str, object] = {}
) -> dict[str, Errors]:
    """Beside one process, with each kind of adapters: those of the rank that has the largest."""
    references = {name: reference(spec, name) for name in names}
    num_steps = {name: len(steps) for name, steps in references.items()}
    of_ranks = run_ranks(_steps_of_each, layout.num_ranks, spec, layout, num_steps, section)
    return {
        name: max((Errors.of(found[name], expected) for found in of_ranks), key=lambda each: each.largest)
        for name, expected in references.items()
    }


def _steps_of_each(
    spec: DecoderSpec, layout: Layout, num_steps: Mapping[str, int], section: Mapping[str, object]
) -> dict[str, list[Step]]:
    return {
        name: on_rank(spec, layout, change_for(name), number, section, ADAPTERS[name])
        for name, number in num_steps.items()
    }


def wrong_moves(spec: DecoderSpec, layout: Layout, name: str, section: Mapping[str, object] = {}) -> list[str]:
    """What an optimizer moved though it should not have, or did not move, in three equal steps.

    Frozen parameters stay. Of every tensor of adapters, the slice of an expert moves if the expert has tokens, and only
    then: B in the first step with tokens, A after B.
    """
    of_ranks = run_ranks(_wrong_moves, layout.num_ranks, spec, layout, section, ADAPTERS[name])
    return sorted({each for of_rank in of_ranks for each in of_rank})


def _wrong_moves(spec: DecoderSpec, layout: Layout, section: Mapping[str, object], precision: Precision) -> list[str]:
    model, mesh, step, rows = build(spec, layout, starve, section, precision)
    named = dict(model.named_parameters())
    before = {name: full_tensor(parameter).clone() for name, parameter in named.items()}
    options = dict(name="AdamW", lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, implementation="foreach")
    optimizer = build_optimizer(model, **options)  # type: ignore[arg-type]
    counts_by_step: list[dict[str, Tensor]] = []
    for _ in range(3):
        step.accumulate(own_batches(mesh, 0, rows), 100)
        clip_gradients(model.parameters(), 1.0, mesh.pipeline.get_group() if mesh.degrees.pp > 1 else None)
        optimizer.step()
        optimizer.zero_grad()
        counts_by_step.append(_take_counts(model))
    wrong = []
    for name, parameter in named.items():
        moved = full_tensor(parameter) != before[name]
        path, _, own_name = name.rpartition(".")
        if not is_adapter(own_name):
            wrong += [f"{name} moved"] * bool(moved.any())
        elif "_lora_" not in own_name:
            wrong += [f"{name} did not move"] * (not moved.any())
        else:
            counts = torch.stack([counts[path] for counts in counts_by_step])
            num_steps_E = (counts > 0).sum(0)
            assert (num_steps_E[[0, -2]] == 0).all() and num_steps_E.sum() > 0, "experts are not fed as they should be"
            expected_E = num_steps_E > (1 if own_name.endswith("lora_a") else 0)
            for expert in (moved.flatten(1).any(1) != expected_E).nonzero().flatten().tolist():
                wrong.append(f"expert {expert} of {name} {'did not move' if expected_E[expert] else 'moved'}")
    return wrong


def _take_counts(model: Decoder) -> dict[str, Tensor]:
    """Tokens of every expert over all ranks, by the path of the experts."""
    own = {}
    for index, layer in model.moe_layers():
        own[f"layers.{index}.moe.experts"] = layer.router.num_tokens_per_expert_E.clone()
        layer.router.num_tokens_per_expert_E.zero_()
    of_ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    return {path: torch.stack([each[path] for each in of_ranks if path in each]).sum(0) for path in own}
