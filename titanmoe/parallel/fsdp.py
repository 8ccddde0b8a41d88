"""FSDP2, HSDP and replication: one call to `fully_shard` per block, on a mesh of one or two axes."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from titanmoe.models.adapters import row_norms
from titanmoe.models.decoder import Decoder
from titanmoe.ops.scaled_product import LowPrecisionProduct
from titanmoe.ops.sharding import local_box, local_tensor
from titanmoe.parallel.byte_shards import bytes_as_parameters, keep_bytes
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.shards import shard_dim

Reshard = Literal["default", "always", "never"]


def apply_fsdp(
    model: Decoder,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: Reshard = "default",
    cpu_offload: bool = False,
) -> None:
    """Shard `model` in place; its parameters become DTensors.

    Each block is gathered before it runs and freed after it; the last group (norm and output) is kept until backward
    unless `reshard_after_forward` is "always". Parameters are gathered in `param_dtype`; gradients are summed, not
    averaged, in `reduce_dtype`: the loss is already divided by the tokens of the global batch. With `cpu_offload` the
    shards and their gradients are in host memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    offload = CPUOffloadPolicy(pin_memory=mesh.fsdp.device_type != "cpu") if cpu_offload else OffloadPolicy()

    def shard(modules: nn.Module | list[nn.Module], over: DeviceMesh, *, frees: bool) -> None:
        with bytes_as_parameters():
            fully_shard(
                modules,
                mesh=over,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=frees,
                shard_placement_fn=lambda parameter: Shard(shard_dim(local_tensor(parameter).shape, over.size(-1))),
            )

    frees = reshard_after_forward != "never"
    for block in model.blocks():
        if mesh.degrees.shards_experts_apart and block.moe is not None:
            # A group of their own, since they are sharded over other ranks.
            shard(block.moe.experts, mesh.fsdp_of_experts, frees=frees)
        shard(block, mesh.fsdp, frees=frees)
    if not model.spec.tie_embeddings:  # a tied embedding is used at both ends, so it stays in the root's group
        if model.tok_embeddings is not None:
            shard(model.tok_embeddings, mesh.fsdp, frees=frees)
        if model.norm is not None and model.output is not None:
            shard([model.norm, model.output], mesh.fsdp, frees=reshard_after_forward == "always")
    shard(model, mesh.fsdp, frees=False)
    keep_bytes(model)
    for module in model.modules():
        for product in vars(module).values():
            product = getattr(product, "base", product)
            if isinstance(product, LowPrecisionProduct):
                product.keeps_frozen = False  # weights are gathered for each use
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


@torch.no_grad()
def init_magnitudes(model: Decoder) -> None:
    """Set magnitudes of adapters to the norms of weights, which are there; collective, layer by layer, if sharded."""
    if not any(name.endswith("lora_magnitude") for name, _ in model.named_parameters()):
        return
    for block in model.blocks():
        groups = [module for module in block.modules() if isinstance(module, FSDPModule)]
        for group in groups:
            group.unshard()
        found = [
            (module, name, norms, local_box(getattr(module, name)))
            for module in block.modules()
            for name, norms in row_norms(module)
        ]
        for group in groups:
            group.reshard()
        for module, name, norms, gathered in found:
            magnitude = getattr(module, name)
            box = local_box(magnitude)
            starts = [offset - first for offset, first in zip(box.offsets, gathered.offsets, strict=True)]
            own = tuple(slice(start, start + size) for start, size in zip(starts, box.sizes, strict=True))
            local_tensor(magnitude).copy_(norms.view(gathered.sizes)[own])


def set_gradient_sync(model: Decoder, enabled: bool) -> None:
    """Whether the next backward reduces gradients over ranks; off for all but the last microbatch of a step."""
    if isinstance(model, FSDPModule):
        cast(FSDPModule, model).set_requires_gradient_sync(enabled)
