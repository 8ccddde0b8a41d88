"""Norms and clipping against one process in float64, on plain tensors and on several meshes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.ranks import run_ranks
from titanmoe.training.gradients import clip_gradients, count_nonfinite


def with_gradients(*grads: Tensor | None) -> list[nn.Parameter]:
    parameters = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(3) if grad is None else torch.zeros_like(grad))
        parameter.grad = None if grad is None else grad.clone()
        parameters.append(parameter)
    return parameters


def exact_norm(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


def random_gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 5), (11,), (3, 4, 2), (0, 5))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clips_to_the_global_norm(dtype: torch.dtype) -> None:
    grads = random_gradients(dtype)
    parameters = with_gradients(*grads, None)
    norm = clip_gradients(parameters, 0.5)
    assert norm.dtype == torch.float32 and norm.shape == ()
    assert float(norm) == pytest.approx(exact_norm(grads), rel=1e-6)
    factor = 0.5 / (exact_norm(grads) + 1e-6)
    for parameter, grad in zip(parameters, grads, strict=False):
        torch.testing.assert_close(
            parameter.grad, (grad.double() * factor).to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=0
        )
    assert parameters[-1].grad is None


def test_a_copy_is_scaled_and_not_counted() -> None:
    grads = random_gradients()
    parameters = with_gradients(*grads)
    norm = clip_gradients(parameters, 0.5, copies=parameters[1:2])
    counted = exact_norm([*grads[:1], *grads[2:]])
    assert float(norm) == pytest.approx(counted, rel=1e-6)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad * (0.5 / (counted + 1e-6)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, 1e3])
def test_only_measures(max_norm: float) -> None:
    grads = random_gradients()
    parameters = with_gradients(*grads)
    assert float(clip_gradients(parameters, max_norm)) == pytest.approx(exact_norm(grads), rel=1e-6)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, grads, strict=True))


def test_nothing_to_clip() -> None:
    assert clip_gradients([], 1.0).item() == 0
    assert clip_gradients(with_gradients(None), 1.0).item() == 0


def test_the_norm_of_many_elements_is_exact() -> None:
    """A plain float32 reduction on a CPU is off by 3e-4 here."""
    grad = torch.rand(6_000_000, generator=torch.Generator().manual_seed(0))
    want = exact_norm([grad])
    assert float(clip_gradients(with_gradients(grad), 0)) == pytest.approx(want, rel=1e-6)
    assert float(clip_gradients(with_gradients(grad.bfloat16()), 0)) == pytest.approx(
        exact_norm([grad.bfloat16()]), rel=1e-5
    )


def test_a_sum_of_squares_beyond_float32() -> None:
    grads = [torch.tensor([1e19]) for _ in range(4)]
    assert float(clip_gradients(with_gradients(*grads), 0)) == pytest.approx(2e19)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite(bad: float) -> None:
    grads = random_gradients()
    grads[1][4] = bad
    parameters = with_gradients(*grads)
    named = list(zip(["a", "b", "c", "d"], parameters, strict=True))
    assert count_nonfinite(named) == ["b"]
    assert not math.isfinite(float(clip_gradients(parameters, 1.0)))


def _clip_on_four_ranks() -> tuple[float, list[Tensor], list[str]]:
    """Dense weights on a 2x2 HSDP mesh and on a flat one, experts on a 2-D sharded mesh, a partial and a plain one."""
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    grads = random_gradients()
    placed = [
        distribute_tensor(grads[0], flat, [Shard(0)]),  # 7 rows over 4 ranks
        distribute_tensor(grads[0] * 2, grid, [Replicate(), Shard(0)]),
        distribute_tensor(grads[1], grid, [Replicate(), Replicate()]),
        distribute_tensor(grads[2], experts, [Shard(0), Shard(1)]),
        DTensor.from_local(grads[2] / 4, flat, [Partial()], run_check=False),
    ]
    parameters = []
    for grad in placed:
        replicated = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
        parameter = nn.Parameter(grad.detach().redistribute(placements=replicated))
        parameter.grad = grad
        parameters.append(parameter)
    idle = nn.Parameter(distribute_tensor(grads[0], flat, [Shard(1)]))
    parameters += [idle, *with_gradients(grads[1] * 3)]
    norm = clip_gradients(parameters, 1.0)
    clipped = [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None
    ]
    parameters[0].grad.to_local().fill_(math.nan)
    names = count_nonfinite([(str(index), parameter) for index, parameter in enumerate(parameters)])
    return float(norm), clipped, names


def test_meshes_are_combined_and_replicas_count_once() -> None:
    first, vector, cube, _ = random_gradients()
    whole = [first, first * 2, vector, cube, cube, vector * 3]
    want = exact_norm(whole)
    for norm, clipped, names in run_ranks(_clip_on_four_ranks, 4):
        assert norm == pytest.approx(want, rel=1e-6)
        assert names == ["0"]
        for got, grad in zip(clipped, whole, strict=True):
            torch.testing.assert_close(got, grad / (want + 1e-6), rtol=1e-5, atol=0)


def _clip_in_a_pipeline() -> tuple[float, list[Tensor]]:
    """Two stages of two ranks: one with a dense weight, one with experts, a replica and what has no gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    shards = mesh["fsdp"]
    grads = random_gradients()
    if mesh.get_local_rank("pp") == 0:
        placed = [distribute_tensor(grads[0], shards, [Shard(0)])]
    else:
        placed = [distribute_tensor(grads[2], shards, [Shard(1)]), distribute_tensor(grads[1], shards, [Replicate()])]
    parameters = [nn.Parameter(grad.detach().clone()) for grad in placed]
    for parameter, grad in zip(parameters, placed, strict=True):
        parameter.grad = grad
    if mesh.get_local_rank("pp") == 1:
        parameters.append(nn.Parameter(distribute_tensor(grads[0], shards, [Shard(0)])))
    norm = clip_gradients(parameters, 1.0, mesh["pp"].get_group())
    return float(norm), [grad.full_tensor() for grad in placed]


def test_a_pipelines_stages_have_one_norm() -> None:
    first, vector, cube, _ = random_gradients()
    want = exact_norm([first, vector, cube])
    for rank, (norm, clipped) in enumerate(run_ranks(_clip_in_a_pipeline, 4)):
        assert norm == pytest.approx(want, rel=1e-6)
        for got, grad in zip(clipped, [first] if rank < 2 else [cube, vector], strict=True):
            torch.testing.assert_close(got, grad / (want + 1e-6), rtol=1e-5, atol=0)
