"""Pipeline parallelism: the layers are dealt to ranks, and microbatches go through them one after another.

The order of forward and backward passes, and what is sent when, is that of `torch.distributed.pipelining`. Its classes
are used below their public interface, which cuts batches itself (it cannot cut `cu_seqlens`), runs a first batch to
learn shapes, and has a loss apart from the model. All that is private is in this file; checked against torch 2.11 and
2.13.

Shape suffixes: B sequences of a microbatch, P tokens of a sequence that this rank has between layers, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from titanmoe.config.errors import ConfigError
from titanmoe.models.decoder import Decoder
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.stages import Stages

Microbatch = TypeVar("Microbatch")
Compute = Callable[[Decoder, "Tensor | None", Any], Tensor]
"""(a stage's part of the model, what the stage before it returned or None in the first, the microbatch) -> hidden
states (B, P, D), or in the last stage the loss (a float32 scalar)."""


class Pipeline(Generic[Microbatch]):
    """This rank's stages.

    Args:
        parts: the parts of the model in them, in order, as FSDP wraps them.
        stages: of the whole pipeline.
        group: the ranks of the pipeline.
        schedule: its name.
        file: with a schedule of the user's own, in place of one with a name.
        num_microbatches: of an optimizer step.
        hidden_shape: (B, P, D) of what goes from stage to stage in training.
        dtype: of the same.

    Raises:
        ConfigError: the file is not a schedule of this many microbatches.
    """

    def __init__(
        self,
        parts: Sequence[Decoder],
        stages: Stages,
        group: dist.ProcessGroup,
        *,
        schedule: str,
        file: str = "",
        num_microbatches: int,
        hidden_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._parts = dict(zip(stages.of(group.rank()), parts, strict=True))
        self._stages, self._group, self._device, self._dtype = stages, group, device, dtype
        meta_BPD = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        num_stages = len(stages.parts)
        self._runs = [
            _Stage(
                part,
                stage,
                num_stages,
                device,
                input_args=() if stage == 0 else (meta_BPD,),
                output_args=(loss if stage == num_stages - 1 else meta_BPD,),
                group=group,
            )
            for stage, part in self._parts.items()
        ]
        for run in self._runs:
            run.hidden_shape, run.hidden_dtype = hidden_shape, dtype
        self._schedule = _build_schedule(schedule, file, self._runs, num_microbatches)

    def run(self, microbatches: Sequence[Microbatch], compute: Compute) -> list[Tensor]:
        """Forward and backward of all microbatches; gradients are added to `.grad`, and reduced over FSDP's ranks.

        Returns:
            The losses, on the rank that has the last stage; nothing on the others.
        """
        losses: list[Tensor] = []
        for stage in self._runs:
            stage.compute, stage.microbatches = compute, microbatches
            stage.has_backward = True
            stage.clear_runtime_states()
        targets: list[None] = [None] * len(microbatches)
        self._schedule._step_microbatches(target_mbs=targets, losses=losses, return_outputs=False)
        for stage in self._runs:
            stage.clear_runtime_states()
            stage.microbatches = ()
        return [loss.detach() for loss in losses]

    @torch.no_grad()
    def add_tied_gradients(self) -> None:
        """Add up the gradients of a tied embedding, of which the first and the last rank have copies.

        To be called on all ranks after the last backward pass of a step. Each of the two sends its shard to the other,
        in float32. a + b is b + a, so what is equal on both stays so to the last bit.
        """
        first, last = self._stages.ranks[0], self._stages.ranks[-1]
        ends = {0: last, len(self._stages.ranks) - 1: first}
        for stage in self._parts.keys() & ends.keys():
            part, other = self._parts[stage], ends[stage]
            embedding = part.tok_embeddings
            if not part.spec.tie_embeddings or embedding is None or not embedding.weight.requires_grad:
                continue
            assert embedding.weight.grad is not None, "both ends took part in the step"
            grad = local_tensor(embedding.weight.grad)
            if grad.numel():
                own = grad.float()
                others = torch.empty_like(own)
                messages = [
                    dist.P2POp(dist.isend, own, group=self._group, group_peer=other),
                    dist.P2POp(dist.irecv, others, group=self._group, group_peer=other),
                ]
                for work in dist.batch_isend_irecv(messages):
                    work.wait()
                grad.copy_(own + others)

    @torch.no_grad()
    def run_forward(
        self, microbatches: Sequence[Microbatch], compute: Compute, hidden_shape: tuple[int, int, int]
    ) -> list[Tensor]:
        """Forward of any number of microbatches, whose hidden states have this shape. Returns as `run`."""
        ranks = self._stages.ranks
        outputs: list[Tensor] = []
        works: list[dist.Work | None] = []
        for stage, part in self._parts.items():
            is_local = stage > 0 and ranks[stage - 1] == ranks[stage]
            inputs, outputs = outputs, []
            for index, microbatch in enumerate(microbatches):
                x_BPD = inputs[index] if is_local else self._receive(stage, hidden_shape)
                outputs.append(compute(part, x_BPD, microbatch))
                # Between two ranks each must send while the other one receives, so nothing is sent to the rank that
                # this stage still receives from.
                if not self._sends_back(stage):
                    works.append(self._send(stage, outputs[-1]))
            if self._sends_back(stage):
                works += [self._send(stage, output) for output in outputs]
        for work in works:
            if work is not None:
                work.wait()
        for part in self._parts.values():
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return outputs if len(ranks) - 1 in self._parts else []

    def _receive(self, stage: int, shape: tuple[int, int, int]) -> Tensor | None:
        if stage == 0:
            return None
        x_BPD = torch.empty(shape, dtype=self._dtype, device=self._device)
        dist.recv(x_BPD, group=self._group, group_src=self._stages.ranks[stage - 1])
        return x_BPD

    def _send(self, stage: int, x_BPD: Tensor) -> dist.Work | None:
        ranks = self._stages.ranks
        if stage + 1 == len(ranks) or ranks[stage + 1] == ranks[stage]:
            return None
        return dist.isend(x_BPD, group=self._group, group_dst=ranks[stage + 1])

    def _sends_back(self, stage: int) -> bool:
        ranks = self._stages.ranks
        return 0 < stage < len(ranks) - 1 and ranks[stage - 1] == ranks[stage + 1]


class _Stage(PipelineStage):
    """A stage whose caller says what is computed, with the microbatch at hand.

    What it receives is in memory from when it is asked for until it is used. PipelineStage would keep room for the
    hidden states and gradients of all microbatches, from the first step to the end of the job.
    """

    compute: Compute
    microbatches: Sequence[Any] = ()
    hidden_shape: tuple[int, int, int]
    hidden_dtype: torch.dtype
    _index: int

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            self._release(infos)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            self._release(infos)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id], requires_grad=True)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info[bwd_chunk_id], requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._index = fwd_chunk_id
        result = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._release(self.args_recv_info[fwd_chunk_id])
        return result

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._release(self.grad_recv_info[bwd_chunk_id])

    def _allocate(self, infos: Sequence[Any], *, requires_grad: bool) -> None:
        for info in infos:
            info.buffer = torch.empty(
                self.hidden_shape, dtype=self.hidden_dtype, device=self.device, requires_grad=requires_grad
            )

    def _release(self, infos: Sequence[Any]) -> None:
        for info in infos:
            info.buffer = torch.empty(0, device=self.device)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs_BPD = args[0] if args else None
        return self.compute(cast(Decoder, self.submod), inputs_BPD, self.microbatches[self._index])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        # Gradients of weights came without FSDP's hooks: have it add them up in the dtype that it reduces them in.
        for module in self.submod.modules():
            state = _get_module_fsdp_state(module)
            for group in _param_groups(state) if state is not None else ():
                group.post_backward()


def _param_groups(state: Any) -> Sequence[Any]:
    """One of torch 2.11's, if any; those of torch 2.13's."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _build_schedule(name: str, file: str, stages: Sequence[_Stage], num_microbatches: int) -> Any:
    options: dict[str, Any] = {"n_microbatches": num_microbatches, "loss_fn": _loss, "scale_grads": False}
    if file:
        custom = _PipelineScheduleRuntime(list(stages), **options)
        try:
            custom._load_csv(file)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{file} is not a schedule of {num_microbatches} microbatches: {error}",
                where="parallelism.pipeline_parallel_schedule_csv",
            ) from error
        return custom
    kind = get_schedule_class(name)
    if issubclass(kind, PipelineScheduleSingle):
        (stage,) = stages
        return kind(stage, **options)
    assert issubclass(kind, PipelineScheduleMulti)
    return kind(list(stages), **options)


def _loss(loss: Tensor, target: None) -> Tensor:
    """The last stage computes it itself."""
    return loss
