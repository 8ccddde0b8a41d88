"""Every layout gives the loss and the gradients of one process. `python -m tests.parallel` runs them all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.models.kinds import KINDS
from tests.parallel.layouts import Change, Layout, Step, on_ranks, one_process, step_on_mesh
from tests.ranks import run_ranks
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

SPEC = KINDS["grouped-query"]


def _all_to_one(model: Decoder) -> None:
    """Every token chooses the last expert first, and its group's neighbours."""
    for _, layer in model.moe_layers():
        assert layer.router.expert_bias is not None
        layer.router.expert_bias[-1] = 100.0
        layer.router.expert_bias[-3:-1] = 50.0


def _aux_loss(model: Decoder) -> None:
    for _, layer in model.moe_layers():
        layer.router.aux_loss_weight = 0.1


def _freeze_experts(model: Decoder) -> None:
    for _, layer in model.moe_layers():
        layer.experts.requires_grad_(False)


def _compare(spec: DecoderSpec, layout: Layout, change: Change | None = None) -> None:
    reference = one_process(spec, change)
    for step in on_ranks(spec, layout, change):
        assert step.loss == pytest.approx(reference.loss, rel=1e-6)
        assert step.norm == pytest.approx(reference.norm, rel=1e-6)
        for name, error in step.gradient_errors(reference).items():
            assert error < 1e-5, f"{name}: relative error {error:.2e}"


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
@pytest.mark.parametrize("kind", KINDS)
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
    _compare(KINDS[kind], layout, _aux_loss)


@pytest.mark.parametrize("change", [_all_to_one, _freeze_experts])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, ep=2, recompute="full"),
        Layout(dp_shard=4, ep=2),
        Layout(dp_shard=2, cp=2, ep=4, recompute="selective"),
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
    return step_on_mesh(model, mesh), {parameter.grad.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_compute_keeps_the_stored_dtype(world_size: int, dtype: torch.dtype) -> None:
    """float32 masters keep float32 gradients; the loss stays within bfloat16's rounding of the float32 one."""
    reference = one_process(SPEC)
    for step, dtypes in run_ranks(_mixed, world_size, dtype, torch.bfloat16):
        assert step.loss == pytest.approx(reference.loss, rel=2e-2)
        assert dtypes == {dtype}
