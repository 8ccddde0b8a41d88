"""Sharded tensors come to rank 0 whole, whatever their layout."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tests.ranks import run_ranks
from titanmoe.checkpoint import gather
from titanmoe.checkpoint.gather import gather_each
from titanmoe.parallel.ranks import Ranks

_SHAPES = ((7, 6, 5), (3, 4), (1, 2), (6, 1))
_LAYOUTS: list[tuple[Placement, Placement]] = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (Replicate(), Replicate()),
    (Shard(0), Shard(0)),
]


def _values(index: int) -> Tensor:
    return torch.randn(_SHAPES[index], generator=torch.Generator().manual_seed(index))


def _gather_all_layouts() -> list[dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    gather._BYTES_AT_ONCE = 64  # several messages for a tensor
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    found = []
    for layout in _LAYOUTS:
        tensors = {str(i): distribute_tensor(_values(i), mesh, layout) for i in range(len(_SHAPES))}
        tensors["plain"] = torch.full((2, 3), 5.0)
        found.append({name: whole.clone() for name, whole in gather_each(tensors, ranks)})
    return found


def test_every_layout_on_four_ranks() -> None:
    first, *others = run_ranks(_gather_all_layouts, 4)
    for found in first:
        assert list(found) == ["0", "1", "2", "3", "plain"]
        assert all(torch.equal(found[str(i)], _values(i)) for i in range(len(_SHAPES)))
        assert torch.equal(found["plain"], torch.full((2, 3), 5.0))
    assert all(tensor.numel() == 0 for of_rank in others for found in of_rank for tensor in found.values())


def _gather_on_one_rank() -> bool:
    tensor = distribute_tensor(_values(0), init_device_mesh("cpu", (1,)), [Shard(0)])
    ((_, whole),) = gather_each({"a": tensor}, Ranks(0, 1, dist.group.WORLD))
    return type(whole) is Tensor and torch.equal(whole, _values(0))


def test_a_shard_that_is_all() -> None:
    assert run_ranks(_gather_on_one_rank, 1) == [True]


def test_on_one_rank_nothing_is_copied() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    ((name, whole),) = gather_each({"a": parameter}, Ranks(0, 1, None))
    assert name == "a" and whole.data_ptr() == parameter.data_ptr() and not whole.requires_grad
