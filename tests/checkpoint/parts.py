"""One model dealt to ranks in several ways: layers to some, parts of parameters to others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tests.checkpoint.small_models import build
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router

_ATTENTION = GroupedQuery(4, 2, 16, Rope(8, 1e4), qkv_bias=True)
_EXPERTS = MoE(4, 2, 64, Router(score="sigmoid", selection_bias=True), shared=Dense(64))
# Experts are large enough for optimizer states of 8 bits, also when they are cut in four.
SPEC = DecoderSpec(
    dim=64,
    vocab_size=98,
    layers=(LayerSpec(_ATTENTION, Dense(56)), *[LayerSpec(_ATTENTION, _EXPERTS)] * 2),
    norm_eps=1e-5,
    family="glm4_moe",
)

# Sizes of (stages, fsdp, tp) and of (stages, fsdp, ep, etp) for experts, and the layers of each stage.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[str]]] = {
    "whole": ((1, 1, 1), (1, 1, 1, 1), ["012"]),
    "2 stages": ((2, 1, 1), (2, 1, 1, 1), ["01", "2"]),
    "2 stages by turns": ((2, 1, 1), (2, 1, 1, 1), ["02", "1"]),
    "2 stages x fsdp 2": ((2, 2, 1), (2, 2, 1, 1), ["0", "12"]),
    "2 stages x tp 2, ep 2": ((2, 1, 2), (2, 1, 2, 1), ["02", "1"]),
    "fsdp 2 x tp 2, etp 2": ((1, 2, 2), (1, 2, 1, 2), ["012"]),
    "fsdp 2 x tp 2, ep 2": ((1, 2, 2), (1, 2, 2, 1), ["012"]),
    "fsdp 4, ep 2 x etp 2": ((1, 4, 1), (1, 1, 2, 2), ["012"]),
}


def num_ranks(layout: str) -> int:
    stages, fsdp, tp = LAYOUTS[layout][0]
    return stages * fsdp * tp


def build_part(layout: str, spec: DecoderSpec = SPEC, layers: list[str] | None = None) -> Decoder:
    """What this rank has of the model, with its values; `layers` are those of each stage."""
    sizes, sizes_of_experts, usual_layers = LAYOUTS[layout]
    layers = layers or usual_layers
    model = build(spec)
    for index, (_, moe) in enumerate(model.moe_layers()):
        moe.router.expert_bias.copy_(torch.arange(4.0) + index)
    if layout == "whole":
        return model
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "fsdp", "tp"))
    experts = init_device_mesh("cpu", sizes_of_experts, mesh_dim_names=("pp", "fsdp", "ep", "etp"))
    stage, num_stages = mesh.get_local_rank("pp"), sizes[0]
    for index in list(model.layers):
        if index not in layers[stage]:
            del model.layers[index]
    if stage > 0 and not (spec.tie_embeddings and stage == num_stages - 1):
        model.tok_embeddings = None
    if stage < num_stages - 1:
        model.norm = model.output = None
    for name, parameter in list(model.named_parameters()):
        if ".moe.experts." in name and experts["ep", "etp"].size() > 1:
            _distribute(model, name, parameter, experts["ep", "etp"], [Shard(0), Shard(2)])
        elif ".moe.experts." not in name and mesh["tp"].size() > 1:
            _distribute(model, name, parameter, mesh["tp"], [_placement(name)])
    for block in model.blocks():
        if block.moe is not None:
            fully_shard(block.moe.experts, mesh=experts["fsdp"])
        fully_shard(block, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def _placement(name: str) -> Placement:
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return Shard(1)
    return Replicate() if "norm" in name or "router" in name else Shard(0)


def _distribute(model: nn.Module, name: str, whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> None:
    owner, _, own_name = name.rpartition(".")
    sharded = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
    setattr(model.get_submodule(owner), own_name, nn.Parameter(sharded))


def forget_values(model: nn.Module) -> None:
    """So that an element which is not written shows."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))


def merged(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks have together; what several have must be equal."""
    found: dict[str, Any] = {}
    for of_rank in of_ranks:
        for name, tensor in of_rank.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1
