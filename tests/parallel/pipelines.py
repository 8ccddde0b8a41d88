"""Training steps of a small model in a pipeline, to compare with one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from tests.parallel.layouts import GLOBAL_BATCH, SEQ_LEN, Change, Errors, Layout, Step, _batch, one_process
from tests.ranks import full_tensor, run_ranks
from titanmoe.config.sections.machine import Parallelism
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.pipeline import Pipeline
from titanmoe.parallel.stages import plan_stages
from titanmoe.training.gradients import clip_gradients
from titanmoe.training.step import PipelinedStep

_LEARNING_RATE = 1.0


def deep(spec: DecoderSpec, num_layers: int, *, dense_first: bool = False) -> DecoderSpec:
    """The layers of `spec` by turns; or first half the dense ones, then the others, so that ranks have only these."""
    layers = tuple(spec.layers[index % len(spec.layers)] for index in range(num_layers))
    return replace(
        spec, layers=tuple(sorted(layers, key=lambda layer: "MoE" in repr(layer))) if dense_first else layers
    )


def compare_pipeline(
    spec: DecoderSpec,
    layout: Layout,
    change: Change | None = None,
    reference: Sequence[Step] | None = None,
    **section: object,
) -> Errors:
    """As `layouts.compare`; `section` has keys of [parallelism]. The model needs a layer for every stage."""
    reference = reference or one_process(spec, change, num_steps=2)
    section = {"pipeline_parallel_degree": layout.pp, **section}
    steps_of_ranks = run_ranks(_on_rank, layout.num_ranks, spec, layout, change, len(reference), section)
    return max((Errors.of(steps, reference) for steps in steps_of_ranks), key=lambda each: each.largest)


def _on_rank(
    spec: DecoderSpec, layout: Layout, change: Change | None, num_steps: int, section: dict[str, object]
) -> list[Step]:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh, device = Mesh.build(torch.device("cpu"), layout.degrees), torch.device("cpu")
    stages, rank = plan_stages(spec, Parallelism(**section), SEQ_LEN), mesh.pipeline_rank
    model = build_model(spec, part=stages.on(rank))
    parts = parallelize(
        model,
        mesh,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=layout.reshard,
        checkpoint_mode=layout.recompute,
        parts=[stages.parts[stage] for stage in stages.of(rank)],
    )
    init_weights(materialize(model, "cpu"), seed=3)
    if change is not None:
        change(model)
    num_rows = GLOBAL_BATCH // mesh.degrees.num_data_ranks
    pipeline = Pipeline(
        parts,
        stages,
        mesh.pipeline.get_group(),
        schedule=str(section.get("pipeline_parallel_schedule", "1F1B")),
        file=str(section.get("pipeline_parallel_schedule_csv", "")),
        num_microbatches=num_rows,
        hidden_shape=(1, SEQ_LEN // (layout.cp * layout.tp), spec.dim),
        dtype=torch.float32,
        device=device,
    )
    compute = PipelinedStep(model, pipeline, device, num_parts=layout.tp)
    steps = []
    for step in range(num_steps):
        rows = range(mesh.data_rank * num_rows, (mesh.data_rank + 1) * num_rows)
        batches = [_batch(step, row, 1).part(mesh.context_rank, layout.cp) for row in rows]
        before = compute.loss_sums(batches)
        loss = compute.accumulate(batches, GLOBAL_BATCH * SEQ_LEN)
        torch.testing.assert_close(before / (GLOBAL_BATCH * SEQ_LEN), loss.double(), rtol=1e-6, atol=1e-9)
        dist.all_reduce(loss)
        norm = clip_gradients(model.parameters(), 0, mesh.pipeline.get_group())
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
        mine = {name: full_tensor(parameter.grad).clone() for name, parameter in parameters.items()}
        of_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
        grads = {name: grad for of_rank in of_ranks for name, grad in of_rank.items()}
        for parameter in parameters.values():
            local_tensor(parameter.detach()).sub_(local_tensor(parameter.grad), alpha=_LEARNING_RATE)
            parameter.grad = None
        received = [info for run in pipeline._runs for infos in run.args_recv_info.values() for info in infos]
        received += [info for run in pipeline._runs for infos in run.grad_recv_info.values() for info in infos]
        assert all(info.buffer.numel() == 0 for info in received), "what was received is freed when it was used"
        steps.append(Step(loss.item(), grads, norm.item()))
    return steps
