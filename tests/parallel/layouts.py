"""Training steps of a small model on any layout of ranks, to compare with one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import full_tensor, run_ranks
from titanmoe.config.errors import ConfigError
from titanmoe.config.resolve import load_config
from titanmoe.config.sections.machine import ActivationCheckpoint, Parallelism
from titanmoe.config.sizes import Degrees
from titanmoe.converters.apply import convert
from titanmoe.data.packing import Batch
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.fsdp import init_magnitudes
from titanmoe.parallel.limits import check_model_can_be_split
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.pipeline import Pipeline
from titanmoe.parallel.stages import plan_stages
from titanmoe.training.gradients import clip_gradients
from titanmoe.training.step import PipelinedStep, PlainStep

GLOBAL_BATCH, SEQ_LEN, NUM_STEPS = 4, 36, 3
_LEARNING_RATE = 1.0  # so that each step meets another model: the norm of an update is about 1
_DOCUMENT = 11  # tokens of the first document of each row; its end is in no part's border, window or chunk
Change = Callable[[Decoder], None]


def freeze_experts(model: Decoder) -> None:
    for _, layer in model.moe_layers():
        layer.experts.requires_grad_(False)


def all_to_one(model: Decoder) -> None:
    """Every token chooses the last expert first, and its neighbours."""
    for _, layer in model.moe_layers():
        bias_E = torch.zeros(layer.spec.num_experts)
        bias_E[-3:] = torch.tensor([50.0, 50.0, 100.0])
        layer.router.expert_bias = bias_E


def balance_sequences(model: Decoder) -> None:
    for _, layer in model.moe_layers():
        layer.router.aux_loss_weight = 0.1


SITUATIONS: dict[str, Change | None] = {
    "all learn": balance_sequences,
    "frozen experts": freeze_experts,
    "one expert": all_to_one,
}


@dataclass(frozen=True)
class Layout(Degrees):
    """Degrees of parallelism, and what does not change the mesh but meets it."""

    recompute: str = "none"
    reshard: str = "default"
    offload: bool = False
    compiled: bool = False
    accumulates: bool = False
    """Microbatches of one row, as a pipeline always has them."""

    @property
    def degrees(self) -> Degrees:
        return Degrees(**{field.name: getattr(self, field.name) for field in fields(Degrees)})

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in self.degrees.named().items() if size > 1]
        return ", ".join(named) or "one process"


@dataclass(frozen=True)
class Step:
    """The loss of a global batch, every whole gradient, and their norm."""

    loss: float
    grads: dict[str, Tensor]
    norm: float


@dataclass(frozen=True)
class Errors:
    """The largest over some steps, relative to one process.

    A gradient's is relative to its largest element; or, if that is less, to 1e-5 of the norm of all gradients. Where a
    router is sure of its choice, what is left of its gradient after cancelling is rounding, whatever the layout.

    Attributes:
        gradient, worst: the largest error of an element of a gradient, and whose it is.
        noise, noisiest: the largest error of a gradient as a whole, relative to its norm, and whose it is. Where values
            are rounded to few bits, single ones may go either way.
    """

    loss: float
    norm: float
    gradient: float
    worst: str
    noise: float
    noisiest: str

    @classmethod
    def of(cls, steps: Sequence[Step], references: Sequence[Step]) -> Errors:
        pairs = list(zip(steps, references, strict=True))
        assert all(step.grads.keys() == reference.grads.keys() for step, reference in pairs)
        gradients, noises = [], []
        for step, reference in pairs:
            least = 1e-5 * reference.norm
            for name, grad in reference.grads.items():
                error = step.grads[name] - grad
                gradients.append((float(error.abs().max() / grad.abs().max().clamp_min(least)), name))
                noises.append((float(error.norm() / grad.norm().clamp_min(least)), name))
        return cls(
            max(abs(step.loss - reference.loss) / reference.loss for step, reference in pairs),
            max(abs(step.norm - reference.norm) / reference.norm for step, reference in pairs),
            *max(gradients),
            *max(noises),
        )

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.gradient)


EMULATED = ("quantize.linear.", "quantize.grouped_mm.")
"""Converters that can be, begin with these."""


@dataclass(frozen=True)
class Precision:
    """What products are computed in, and everything else.

    Attributes:
        converters: applied before the model is distributed, and emulated.
        settings: of theirs, as flags of the job config.
        dtype: of the parameters as they are computed with.
        stored: of the parameters as they are stored, but adapters.
        noise: that is allowed in a gradient, see `Errors`; None: nothing but the last bits of float32.
    """

    converters: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    noise: float | None = None

    def apply(self, model: Decoder) -> None:
        if self.converters:
            emulated = [f"{name}.emulate" for name in self.converters if name.startswith(EMULATED)]
            flags = [f"model.converters={','.join(self.converters)}", *emulated]
            config = load_config(None, [f"--{flag}" for flag in (*flags, *self.settings)])
            convert(model, self.converters, config, torch.device("cpu"))

    def allows(self, errors: Errors) -> bool:
        if self.noise is None:
            return errors.largest < 1e-5
        return errors.noise < self.noise and errors.norm < self.noise / 10 and errors.loss < self.noise / 100


_FP8 = ("quantize.linear.float8", "quantize.grouped_mm.float8")
_MX = ("quantize.linear.mx", "quantize.grouped_mm.mx")
PRECISIONS = {
    "plain": Precision(),
    "fp8": Precision(_FP8, ("quantize.linear.float8.recipe_name=rowwise",), noise=0.025),
    "fp8-tensorwise": Precision(_FP8, ("quantize.linear.float8.recipe_name=tensorwise",), noise=0.04),
    "mxfp8": Precision(_MX, ("quantize.linear.mx.recipe_name=mxfp8_cublas_rceil",), noise=0.025),
    "mxfp8-down": Precision(_MX, ("quantize.linear.mx.recipe_name=mxfp8_cublas",), noise=0.06),
}
"""Where noise comes from, and how much there is: `test_low_precision`."""


def why_not(spec: DecoderSpec, layout: Layout, schedule: str = "1F1B") -> str:
    """Why a layout is not for a model, or for so small a batch; "" if it is."""
    if GLOBAL_BATCH % layout.num_data_ranks:
        return f"{GLOBAL_BATCH} rows cannot be dealt to {layout.num_data_ranks} groups of ranks"
    if (num_rows := GLOBAL_BATCH // layout.num_data_ranks) < layout.pp:
        return f"1F1B needs as many microbatches as stages: {num_rows} are fewer than {layout.pp}"
    try:
        check_model_can_be_split(spec, layout.degrees)
        if layout.pp > 1:
            options = Parallelism(pipeline_parallel_degree=layout.pp, pipeline_parallel_schedule=schedule)
            plan_stages(spec, options, SEQ_LEN)
    except ConfigError as error:
        return error.what
    return ""


def one_process(
    spec: DecoderSpec, change: Change | None = None, num_steps: int = NUM_STEPS, precision: Precision = Precision()
) -> list[Step]:
    if precision.dtype != precision.stored:
        # Parameters that are computed with in another dtype are sharded, over one rank.
        return run_ranks(on_rank, 1, spec, Layout(), change, num_steps, {}, precision)[0]
    model = build_model(spec, dtype=precision.stored)
    precision.apply(model)
    init_weights(materialize(model, "cpu"), seed=3)
    init_magnitudes(model)
    if change is not None:
        change(model)
    step = PlainStep(model, torch.device("cpu"))
    return [_take(model, step, [_batch(index)]) for index in range(num_steps)]


def compare(
    spec: DecoderSpec,
    layout: Layout,
    change: Change | None = None,
    reference: Sequence[Step] | None = None,
    precision: Precision = Precision(),
    **section: object,
) -> Errors:
    """The errors of the rank that has the largest.

    Args:
        section: keys of [parallelism], for a pipeline.
    """
    reference = reference or one_process(spec, change, precision=precision)
    steps_of_ranks = run_ranks(on_rank, layout.num_ranks, spec, layout, change, len(reference), section, precision)
    return max((Errors.of(steps, reference) for steps in steps_of_ranks), key=lambda each: each.largest)


def on_rank(
    spec: DecoderSpec,
    layout: Layout,
    change: Change | None,
    num_steps: int,
    section: Mapping[str, object] = {},
    precision: Precision = Precision(),
) -> list[Step]:
    """What one rank finds, with the whole gradients of all ranks."""
    model, mesh, step, rows = build(spec, layout, change, section, precision)
    return steps_on_mesh(model, mesh, step, num_steps, rows)


def build(
    spec: DecoderSpec,
    layout: Layout,
    change: Change | None = None,
    section: Mapping[str, object] = {},
    precision: Precision = Precision(),
) -> tuple[Decoder, Mesh, PlainStep | PipelinedStep, int]:
    """A model on this rank, its mesh, its steps, and how many rows a microbatch has."""
    # full_tensor() of a tensor that is sharded twice along a dim says how it goes about it.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device = torch.device("cpu")
    mesh = Mesh.build(device, layout.degrees)
    options = Parallelism(**{"pipeline_parallel_degree": layout.pp, **section})
    stages = plan_stages(spec, options, SEQ_LEN) if layout.pp > 1 else None
    model = build_model(spec, dtype=precision.stored, part=stages.on(mesh.pipeline_rank) if stages else None)
    precision.apply(model)
    parts = parallelize(
        model,
        mesh,
        param_dtype=precision.dtype,
        reduce_dtype=torch.float32,
        accumulates=layout.accumulates,
        reshard_after_forward=layout.reshard,
        recompute=ActivationCheckpoint(mode=layout.recompute, selective_ac_option="op"),
        compile_backend="aot_eager" if layout.compiled else None,
        cpu_offload=layout.offload,
        parts=[stages.parts[stage] for stage in stages.of(mesh.pipeline_rank)] if stages else [],
    )
    init_weights(materialize(model, "cpu"), seed=3)
    init_magnitudes(model)
    if change is not None:
        change(model)
    num_rows = GLOBAL_BATCH // layout.num_data_ranks
    if stages is None:
        return model, mesh, PlainStep(model, device), 1 if layout.accumulates else num_rows
    pipeline: Pipeline[Batch] = Pipeline(
        parts,
        stages,
        mesh.pipeline.get_group(),
        schedule=options.pipeline_parallel_schedule,
        file=options.pipeline_parallel_schedule_csv or "",
        num_microbatches=num_rows,
        hidden_shape=(1, SEQ_LEN // (layout.cp * layout.tp), spec.dim),
        dtype=precision.dtype,
        device=device,
    )
    return model, mesh, PipelinedStep(model, pipeline, device, num_parts=layout.tp), 1


def steps_on_mesh(model: Decoder, mesh: Mesh, step: PlainStep | PipelinedStep, num_steps: int, rows: int) -> list[Step]:
    """Take some steps, each in microbatches of this many rows."""
    pipeline = mesh.pipeline.get_group() if mesh.degrees.pp > 1 else None
    return [_take(model, step, own_batches(mesh, index, rows), pipeline) for index in range(num_steps)]


def own_batches(mesh: Mesh, index: int, rows: int) -> list[Batch]:
    """This rank's microbatches of a step."""
    num_rows = GLOBAL_BATCH // mesh.degrees.num_data_ranks
    first = mesh.data_rank * num_rows
    batches = [_batch(index, row, rows) for row in range(first, first + num_rows, rows)]
    return [batch.part(mesh.context_rank, mesh.degrees.cp) for batch in batches]


def _batch(step: int, first_row: int = 0, num_rows: int = GLOBAL_BATCH) -> Batch:
    """Rows of the global batch of a step, each of two documents."""
    tokens = torch.randint(100, (GLOBAL_BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(step))
    rows = slice(first_row, first_row + num_rows)
    borders = [row * SEQ_LEN + begin for row in range(num_rows) for begin in (0, _DOCUMENT)]
    positions = torch.cat([torch.arange(_DOCUMENT), torch.arange(SEQ_LEN - _DOCUMENT)])
    return Batch(
        tokens[rows],
        tokens.roll(-1, dims=1)[rows],
        positions.expand(num_rows, -1),
        torch.tensor([*borders, num_rows * SEQ_LEN], dtype=torch.int32),
    )


def _take(
    model: Decoder, step: PlainStep | PipelinedStep, batches: list[Batch], pipeline: dist.ProcessGroup | None = None
) -> Step:
    """One step of plain gradient descent: the next one meets what the update made of sharded parameters."""
    num_tokens = GLOBAL_BATCH * SEQ_LEN
    before = step.loss_sums(batches) / num_tokens
    loss = step.accumulate(batches, num_tokens)
    torch.testing.assert_close(before, loss.double(), rtol=1e-5, atol=1e-9, msg="evaluation differs from training")
    norm = clip_gradients(model.parameters(), 0, pipeline, model.copied_parameters())
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    grads = {name: full_tensor(parameter.grad).clone() for name, parameter in parameters.items()}
    if dist.is_initialized():
        dist.all_reduce(loss)
        of_ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, grads if pipeline is not None else {})
        for name, grad in (item for of_rank in of_ranks for item in of_rank.items()):
            assert torch.equal(grads.setdefault(name, grad), grad), f"ranks have different gradients of {name}"
    for parameter in parameters.values():
        local_tensor(parameter.detach()).sub_(local_tensor(parameter.grad), alpha=_LEARNING_RATE)
        parameter.grad = None
    return Step(loss.item(), grads, norm.item())
