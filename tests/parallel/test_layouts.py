"""Every layout gives the loss and the gradients of one process. `python -m tests.parallel` runs them all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models.kinds import KINDS, deep
from tests.parallel.layouts import (
    Change,
    Layout,
    Step,
    all_to_one,
    balance_sequences,
    compare,
    freeze_experts,
    one_process,
    steps_on_mesh,
    why_not,
)
from tests.ranks import run_ranks
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.spec import DecoderSpec, MoE
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.training.step import PlainStep

SPEC = KINDS["grouped-query"]


def _compare(spec: DecoderSpec, layout: Layout, change: Change | None = None) -> None:
    errors = compare(spec, layout, change)
    assert errors.loss < 1e-6 and errors.norm < 1e-6
    assert errors.gradient < 1e-5, errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2),
        Layout(dp_replicate=2),
        Layout(dp_shard=4, recompute="full", reshard="always"),
        Layout(dp_replicate=2, dp_shard=2, recompute="selective", reshard="never"),
        Layout(dp_replicate=4, recompute="full"),
    ],
    ids=str,
)
def test_layout_equals_one_process(layout: Layout, tied: bool) -> None:
    _compare(replace(SPEC, tie_embeddings=tied), layout)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped-query"])
def test_every_kind_of_layer_shards_and_recomputes(kind: str, recompute: str) -> None:
    _compare(KINDS[kind], Layout(dp_shard=2, recompute=recompute, reshard="always"))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, ep=2),
        Layout(dp_shard=4, ep=2, recompute="full", reshard="always"),
        Layout(dp_replicate=2, dp_shard=2, ep=2, recompute="selective"),
        Layout(dp_shard=2, ep=2, recompute="selective", reshard="never"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_experts_on_several_ranks(kind: str, layout: Layout) -> None:
    _compare(KINDS[kind], layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(cp=2),
        Layout(cp=4, recompute="selective"),
        Layout(dp_shard=2, cp=2, ep=2, recompute="full"),
        Layout(dp_replicate=2, cp=2, ep=2, recompute="selective"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_on_several_ranks(kind: str, layout: Layout) -> None:
    """With fewer key heads than ranks, and with documents, windows and chunks that cross the parts."""
    _compare(KINDS[kind], layout, balance_sequences)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2),
        Layout(tp=4, ep=2, recompute="full"),
        Layout(dp_shard=2, tp=2, ep=2, etp=2, recompute="selective"),
        Layout(dp_replicate=2, tp=2, etp=2, reshard="never"),
        Layout(cp=2, tp=2, ep=2, recompute="selective"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_several_ranks(kind: str, layout: Layout) -> None:
    """With fewer key heads than ranks too; sinks, biases and norms are replicated."""
    if reason := why_not(KINDS[kind], layout):
        assert kind == "dense" and "no experts" in reason
        layout = replace(layout, ep=1)
    _compare(KINDS[kind], layout, balance_sequences)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, dp_shard=2, tp=2, ep=2, etp=2),
        Layout(pp=2, cp=2, tp=2, ep=4, recompute="full"),
        Layout(dp_replicate=2, cp=2, tp=2, ep=4, recompute="selective"),
        Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2, etp=2),
        Layout(pp=4, tp=2, ep=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["latent", "sinks and windows"])
def test_eight_ranks(kind: str, layout: Layout) -> None:
    spec = deep(KINDS[kind], 4)
    if reason := why_not(spec, layout):
        assert "6 experts" in reason
        layout = replace(layout, ep=2)
    _compare(spec, layout, balance_sequences)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp_shard=2, tp=2, ep=4)], ids=str)
def test_a_tied_embedding_on_several_ranks(layout: Layout) -> None:
    _compare(replace(KINDS["latent"], tie_embeddings=True), layout)


def _logits(layout: Layout) -> tuple[Tensor, int]:
    mesh = Mesh.build(torch.device("cpu"), layout.degrees)
    model = build_model(SPEC)
    parallelize(model, mesh, param_dtype=torch.float32, reduce_dtype=torch.float32)
    init_weights(materialize(model, "cpu"), seed=3)
    return model(_tokens()).detach(), dist.get_rank()


def _tokens() -> Tensor:
    return torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(1))


def test_one_expert_on_each_rank() -> None:
    """Rows that arrive are in the expert's order already."""
    layer = SPEC.layers[1]
    assert isinstance(layer.feed_forward, MoE)
    few = replace(layer, feed_forward=replace(layer.feed_forward, num_experts=4))
    _compare(replace(SPEC, layers=(SPEC.layers[0], few)), Layout(dp_shard=4, ep=4), balance_sequences)


@pytest.mark.parametrize("tp", [2, 4])
def test_logits_of_every_rank_are_of_its_own_tokens(tp: int) -> None:
    model = build_model(SPEC, device="cpu")
    init_weights(model, seed=3)
    expected = model(_tokens()).detach().chunk(tp, dim=1)
    for logits, rank in run_ranks(_logits, tp, Layout(tp=tp)):
        torch.testing.assert_close(logits, expected[rank], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [all_to_one, freeze_experts])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, ep=2, recompute="full"),
        Layout(dp_shard=4, ep=2),
        Layout(dp_shard=2, cp=2, ep=4, recompute="selective"),
        Layout(dp_shard=2, tp=2, ep=2, etp=2),
        Layout(tp=4, ep=4, recompute="full"),
    ],
    ids=str,
)
def test_experts_that_get_all_or_learn_nothing(layout: Layout, change: Change) -> None:
    """Ranks that no token comes to, and experts without gradients."""
    _compare(KINDS["latent"], layout, change)


def _mixed(dtype: torch.dtype, param_dtype: torch.dtype) -> tuple[Step, set]:
    mesh = Mesh.build(torch.device("cpu"), Degrees(dp_shard=dist.get_world_size()))
    model = build_model(SPEC, dtype=dtype)
    parallelize(model, mesh, param_dtype=param_dtype, reduce_dtype=torch.float32)
    materialize(model, "cpu")
    init_weights(model, seed=3)
    (step,) = steps_on_mesh(model, mesh, PlainStep(model, torch.device("cpu")), num_steps=1, rows=1)
    return step, {grad.dtype for grad in step.grads.values()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_compute_keeps_the_stored_dtype(world_size: int, dtype: torch.dtype) -> None:
    """float32 masters keep float32 gradients; the loss stays within bfloat16's rounding of the float32 one."""
    (reference,) = one_process(SPEC, num_steps=1)
    for step, dtypes in run_ranks(_mixed, world_size, dtype, torch.bfloat16):
        assert step.loss == pytest.approx(reference.loss, rel=2e-2)
        assert dtypes == {dtype}
