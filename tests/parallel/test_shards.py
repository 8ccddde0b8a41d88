"""What the formulas say a rank has of every parameter, beside the tensors of a model that is spread over a mesh."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.models.kinds import KINDS, WIDE
from tests.parallel.layouts import Layout, Precision
from tests.ranks import pretend
from titanmoe.models.build import build_model
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.mesh import EXPERT_TENSOR, TENSOR, Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.shards import local_parameters
from titanmoe.parallel.volumes import axes_of

LAYOUTS = (
    Layout(dp_shard=3),
    Layout(dp_replicate=2, dp_shard=4),
    Layout(dp_shard=4, ep=2),
    Layout(dp_shard=2, tp=2, ep=2, etp=2),
    Layout(cp=2, tp=2, ep=2),
)
CASES = {
    "plain": (KINDS["grouped-query"], Precision()),
    "LoRA": (KINDS["latent"], Precision(("lora",), ("lora.rank=6",), stored=torch.bfloat16)),
    "DoRA on FP8": (
        KINDS["sinks and windows"],
        Precision(("quantize.frozen.float8", "lora"), ("lora.rank=6", "lora.use_dora")),
    ),
    "NF4": (WIDE, Precision(("quantize.frozen.nf4", "lora"), ("lora.rank=6", "quantize.frozen.nf4.block_size=4"))),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_rank_has_what_the_formulas_say(case: str, layout: Layout) -> None:
    spec, precision = CASES[case]
    for rank in (0, layout.num_ranks - 1):
        model = build_model(spec, dtype=precision.stored)
        precision.apply(model)
        formulas = local_parameters(model, layout.degrees)
        with pretend(rank, layout.num_ranks):
            mesh = Mesh.build(torch.device("cpu"), layout.degrees)
            parallelize(model, mesh, param_dtype=torch.float32, reduce_dtype=torch.float32)
            axes = axes_of(layout.degrees, rank)
            for formula, (name, parameter) in zip(formulas, model.named_parameters(), strict=True):
                shards = axes[formula.axis]
                assert formula.name == name
                numel = local_tensor(parameter).numel()
                assert numel == formula.num_owned(len(shards), shards.index(rank)), name
                assert (parameter.dtype, parameter.requires_grad) == (formula.dtype, formula.learns), name
                addends = {axis for axis in {formula.addends} - {""} if len(axes[axis]) > 1}
                assert _replicated_axes(parameter) == addends, name


def _replicated_axes(parameter: torch.Tensor) -> set[str]:
    """Those over which gradients are addends."""
    assert isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names is not None
    axes = zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)
    return {axis for axis, place in axes if axis in (TENSOR, EXPERT_TENSOR) and place.is_replicate()}
