"""One training step of a small model on any layout of ranks, to compare with one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from titanmoe.config.errors import ConfigError
from titanmoe.config.sizes import Degrees
from titanmoe.data.packing import Batch
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.parallel.limits import check_model_can_be_split
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.tensor import finish_gradients
from titanmoe.training.gradients import clip_gradients
from titanmoe.training.loss import loss_sum

GLOBAL_BATCH, SEQ_LEN = 4, 36
_DOCUMENT = 11  # tokens of the first document of each row; its end is in no part's border, window or chunk
Change = Callable[[Decoder], None]


@dataclass(frozen=True)
class Layout(Degrees):
    """Degrees of parallelism, and what does not change the mesh but meets it."""

    recompute: str = "none"
    reshard: str = "default"

    @property
    def degrees(self) -> Degrees:
        return Degrees(**{field.name: getattr(self, field.name) for field in fields(Degrees)})

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in self.degrees.named().items() if size > 1]
        return ", ".join(named) or "one process"


@dataclass(frozen=True)
class Step:
    """The loss of the global batch, every whole gradient, and their norm."""

    loss: float
    grads: dict[str, Tensor]
    norm: float

    def gradient_errors(self, reference: Step) -> dict[str, float]:
        """Largest difference of each gradient, relative to its largest element."""
        assert self.grads.keys() == reference.grads.keys()
        return {
            name: float((self.grads[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-30))
            for name, grad in reference.grads.items()
        }


def why_not(spec: DecoderSpec, layout: Layout) -> str:
    """Why a layout is not for a model; "" if it is."""
    try:
        check_model_can_be_split(spec, layout.degrees)
    except ConfigError as error:
        return error.what
    return ""


def one_process(spec: DecoderSpec, change: Change | None = None) -> Step:
    model = build_model(spec, device="cpu")
    init_weights(model, seed=3)
    if change is not None:
        change(model)
    return _step(model, _batch())


def on_ranks(spec: DecoderSpec, layout: Layout, change: Change | None = None) -> list[Step]:
    """What each rank found."""
    return run_ranks(_on_rank, layout.num_ranks, spec, layout, change)


def step_on_mesh(model: Decoder, mesh: Mesh) -> Step:
    """This rank's part of the step, with whole gradients all the same."""
    rows = GLOBAL_BATCH // mesh.degrees.num_data_ranks
    return _step(model, _batch(mesh.data_rank * rows, rows).part(mesh.context_rank, mesh.degrees.cp))


def _on_rank(spec: DecoderSpec, layout: Layout, change: Change | None) -> Step:
    mesh = Mesh.build(torch.device("cpu"), layout.degrees)
    model = build_model(spec)
    parallelize(
        model,
        mesh,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=layout.reshard,
        checkpoint_mode=layout.recompute,
    )
    materialize(model, "cpu")
    init_weights(model, seed=3)
    if change is not None:
        change(model)
    return step_on_mesh(model, mesh)


def _batch(first_row: int = 0, num_rows: int = GLOBAL_BATCH) -> Batch:
    """Rows of the global batch, each of two documents."""
    tokens = torch.randint(97, (GLOBAL_BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    rows = slice(first_row, first_row + num_rows)
    borders = [row * SEQ_LEN + begin for row in range(num_rows) for begin in (0, _DOCUMENT)]
    positions = torch.cat([torch.arange(_DOCUMENT), torch.arange(SEQ_LEN - _DOCUMENT)])
    return Batch(
        tokens[rows],
        tokens.roll(-1, dims=1)[rows],
        positions.expand(num_rows, -1),
        torch.tensor([*borders, num_rows * SEQ_LEN], dtype=torch.int32),
    )


def _step(model: Decoder, batch: Batch) -> Step:
    loss = loss_sum(model, batch) / (GLOBAL_BATCH * SEQ_LEN)
    loss.backward()
    finish_gradients(model)
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    norm = clip_gradients(model.parameters(), max_norm=0)
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            assert not parameter.requires_grad, name
        else:
            grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return Step(total.item(), grads, norm.item())
