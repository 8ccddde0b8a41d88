"""Adapters under every layout: loss, gradients and their norm are those of one process.

What is frozen has no gradient on any of them: the harness compares the names of gradients, too.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.kinds import KINDS, WIDE, deep
from tests.parallel.layouts import Errors, Layout, Precision, Step, compare, one_process
from tests.ranks import full_tensor, run_ranks
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.sharding import local_box, local_tensor
from titanmoe.parallel.fsdp import init_magnitudes
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

_LORA = Precision(("lora",), ("lora.rank=8", "lora.alpha=4"))
_DORA = Precision(("lora",), ("lora.rank=8", "lora.alpha=4", "lora.use_dora"))
_MIXED = Precision(("lora",), _DORA.settings, torch.bfloat16, torch.bfloat16, noise=0.03)
_QUANTISED = ("quantize.linear.float8", "quantize.grouped_mm.mx", "lora")
_FP8 = ("quantize.linear.float8.recipe_name=rowwise", *_LORA.settings)


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


@functools.cache
def _reference(kind: str, precision: Precision) -> list[Step]:
    return one_process(_spec(kind), adapt, precision=precision)


def _spec(kind: str) -> DecoderSpec:
    return WIDE if kind == "wide" else deep(KINDS[kind], 4) if kind.startswith("sinks") else KINDS[kind]


def _errors(kind: str, layout: Layout, precision: Precision, **section: Any) -> Errors:
    return compare(_spec(kind), layout, adapt, _reference(kind, precision), precision, **section)


@pytest.mark.parametrize(
    ("precision", "kind", "layout"),
    [
        (_DORA, "latent", Layout(dp_shard=2, recompute="full", reshard="always")),
        (_DORA, "grouped-query", Layout(dp_replicate=2, accumulates=True)),
        (_LORA, "sinks and windows", Layout(dp_shard=2, ep=2, recompute="selective")),
        (_DORA, "grouped-query", Layout(dp_shard=2, ep=2, recompute="moe")),
        (_DORA, "latent", Layout(tp=2)),
        (_LORA, "grouped-query", Layout(tp=2, etp=2, compiled=True)),
        (_DORA, "sinks and windows", Layout(tp=2, etp=2)),
        (_LORA, "sinks and windows", Layout(pp=2)),
        (_DORA, "chunks and temperature", Layout(cp=2)),
    ],
    ids=lambda value: "" if isinstance(value, Precision) else str(value),
)
def test_two_ranks_are_one_process(precision: Precision, kind: str, layout: Layout) -> None:
    assert precision.allows(errors := _errors(kind, layout, precision)), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("latent", Layout(dp_replicate=2, dp_shard=2, ep=2, recompute="full")),
        ("latent", Layout(dp_shard=2, tp=2, ep=2, etp=2)),
        ("sinks and windows", Layout(pp=2, tp=2, ep=2, recompute="full")),
        ("grouped-query", Layout(cp=2, tp=2, ep=2)),
        ("dense", Layout(tp=4)),
        ("sinks and windows", Layout(pp=4)),
        ("grouped-query", Layout(dp_shard=4, offload=True)),
    ],
    ids=str,
)
def test_four_ranks_are_one_process(kind: str, layout: Layout) -> None:
    assert _DORA.allows(errors := _errors(kind, layout, _DORA)), errors


def test_gradients_of_experts_that_wait_for_those_of_inputs() -> None:
    """A schedule whose backward pass is in two parts."""
    errors = _errors("sinks and windows", Layout(pp=2), _DORA, pipeline_parallel_schedule="InterleavedZeroBubble")
    assert _DORA.allows(errors), errors


def test_adapters_in_float32_beside_a_base_in_bfloat16() -> None:
    """In one step: after an update, rounding may send a token to another expert."""
    spec, layout = KINDS["grouped-query"], Layout(dp_shard=2)
    reference = one_process(spec, adapt, num_steps=1, precision=_MIXED)
    assert {grad.dtype for grad in reference[0].grads.values()} == {torch.float32}
    assert _MIXED.allows(errors := compare(spec, layout, adapt, reference, _MIXED)), errors


@pytest.mark.parametrize("layout", [Layout(dp_shard=2, ep=2), Layout(tp=2, etp=2)], ids=str)
def test_adapters_on_quantised_products(layout: Layout) -> None:
    precision = Precision(_QUANTISED, _FP8, noise=0.03)
    reference = one_process(WIDE, adapt, num_steps=1, precision=precision)
    assert precision.allows(errors := compare(WIDE, layout, adapt, reference, precision)), errors


@pytest.mark.parametrize(
    "layout", [Layout(dp_shard=2, ep=2), Layout(dp_shard=2, tp=2), Layout(tp=2, etp=2), Layout(dp_shard=3)], ids=str
)
def test_first_values_are_those_of_one_process(layout: Layout) -> None:
    spec = KINDS["sinks and windows"]
    expected = _first_values(spec, None)
    assert any(name.endswith("down_lora_magnitude") for name in expected)
    for of_rank in run_ranks(_first_values, layout.num_ranks, spec, layout):
        assert of_rank.keys() == expected.keys()
        for name, value in of_rank.items():
            exact = dict(rtol=1e-6, atol=0) if name.endswith("magnitude") else dict(rtol=0, atol=0)
            torch.testing.assert_close(value, expected[name], msg=name, **exact)


def _first_values(spec: DecoderSpec, layout: Layout | None) -> dict[str, Tensor]:
    """Of every adapter, whole."""
    model = build_model(spec)
    _DORA.apply(model)
    if layout is not None:
        mesh = Mesh.build(torch.device("cpu"), layout.degrees)
        parallelize(model, mesh, param_dtype=torch.float32, reduce_dtype=torch.float32)
    init_weights(materialize(model, "cpu"), seed=3)
    init_magnitudes(model)
    return {name: full_tensor(value).clone() for name, value in model.named_parameters() if "lora_" in name}
