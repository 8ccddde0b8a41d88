"""Where it runs: how the model is spread over ranks, what is recomputed, what is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key

_FUSED = "the loss is computed with the output projection, so whole logits never exist"
_NO_PIPELINE = "parallelism.pipeline_parallel_degree is 1"
_BALANCED = "ranks exchange tokens for heads, which gives all the same work"
_NO_BUDGET = 'activation_checkpoint.mode is not "memory_budget"'


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """The mesh. data_parallel_replicate_degree * data_parallel_shard_degree * tensor_parallel_degree *
    pipeline_parallel_degree * context_parallel_degree must equal the number of ranks."""

    data_parallel_replicate_degree: int = key(1, at_least=1)
    """Copies of the model, each with its own part of the batch. With shards as well, this is HSDP."""

    data_parallel_shard_degree: int = key(-1, at_least=1, also=(-1,))
    """Ranks over which parameters, gradients and optimizer state are sharded (FSDP2), each with its own part of the
    batch; -1 takes all ranks that the other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether gathered parameters are freed after the forward pass and gathered again for the backward pass. `default`
    is `always`, except with pipeline parallelism."""

    tensor_parallel_degree: int = key(1, at_least=1)
    """Ranks over which each layer is split: attention by heads, feed-forwards by hidden units, embedding and output by
    words. Between them each rank has a part of the tokens, so it must divide the sequence length too."""

    disable_loss_parallel: bool = key(False, inert=_FUSED)
    """Compute the loss on whole logits although tensor parallelism splits the vocabulary."""

    enable_async_tensor_parallel: bool = key(False, later="overlapping tensor parallelism with its products")
    """Overlap the communication of tensor parallelism with its products."""

    pipeline_parallel_degree: int = key(1, at_least=1, later="pipeline parallelism")
    """Ranks over which the layers are dealt."""

    module_fqns_per_model_part: tuple[tuple[str, ...], ...] | None = key(None, inert=_NO_PIPELINE)
    """Names of the modules in each pipeline stage."""

    pipeline_parallel_first_stage_less_layers: int = key(1, at_least=0, inert=_NO_PIPELINE)
    """Layers that the first stage has fewer, as it also has the embedding."""

    pipeline_parallel_last_stage_less_layers: int = key(1, at_least=0, inert=_NO_PIPELINE)
    """Layers that the last stage has fewer, as it also has the output projection."""

    pipeline_parallel_layers_per_stage: int | None = key(None, at_least=1, inert=_NO_PIPELINE)
    """Layers per pipeline stage."""

    pipeline_parallel_schedule: str = key("1F1B", inert=_NO_PIPELINE)
    """Order in which microbatches pass through the stages."""

    pipeline_parallel_schedule_csv: str | None = key("", inert=_NO_PIPELINE)
    """File with a schedule of the user's own."""

    pipeline_parallel_microbatch_size: int = key(1, at_least=1, inert=_NO_PIPELINE)
    """Sequences per microbatch."""

    pipeline_parallel_expert_parallel_overlap: bool = key(True, inert=_NO_PIPELINE)
    """Overlap the expert communication of one microbatch with the computation of another (DualPipeV)."""

    context_parallel_degree: int = key(1, at_least=1)
    """Ranks over which each sequence is split. It must divide the sequence length and the number of attention heads."""

    context_parallel_load_balancer: Literal["headtail", "ptrr"] | None = key("headtail", inert=_BALANCED)
    """How positions are dealt so that every rank has equal work under a causal mask."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = key("allgather", inert=_BALANCED)
    """How keys and values travel between ranks."""

    expert_parallel_degree: int = key(1, at_least=1)
    """Ranks over which the experts of each layer are dealt; tokens travel to their experts. Times
    `expert_tensor_parallel_degree` it must divide `data_parallel_shard_degree` x `context_parallel_degree` x
    `tensor_parallel_degree`: these ranks are among those, and not in addition to them."""

    expert_tensor_parallel_degree: int = key(1, at_least=1)
    """Ranks over which each expert is split: 1, or all of `tensor_parallel_degree`."""

    expert_parallel_comm_backend: Literal["standard", "deepep"] = key("standard", later="DeepEP")
    """What carries tokens to their experts."""


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpoint:
    """Which activations are computed again in the backward pass instead of being kept. Expert choices never are."""

    mode: Literal["none", "selective", "full"] = key("selective", later_values=("memory_budget",))
    """`none` keeps everything, `full` keeps only the input of each layer, `selective` lies between."""

    selective_ac_option: str = "2"
    """With `selective`: `op` recomputes cheap operations and keeps the results of costly ones; a whole number n
    recomputes every n-th layer."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: tuple[str, ...] = key(
        ("moe.router.gate",), inert='the operations kept by selective_ac_option = "op" are fixed'
    )
    """Modules whose products are recomputed, and all products of the same shapes."""

    early_stop: bool = False
    """Stop recomputing a layer once all that its backward pass needs is there."""

    memory_budget: float = key(0.5, at_least=0, at_most=1, inert=_NO_BUDGET)
    """With `memory_budget`: 0 keeps as little as `full`, 1 as much as the compiler would."""

    visualize_memory_budget_pareto: bool = key(False, inert=_NO_BUDGET)
    """With `memory_budget`: draw memory against run time."""

    preserve_rng_state: bool = True
    """Restore the random state for recomputation."""

    determinism_check: str = key("default", later="choosing the check of recomputed tensors")
    """How recomputed tensors are compared with the first ones: `default` compares shapes, types and devices."""

    debug: bool = key(False, later="tracing recomputation")
    """Record what was computed in the forward pass and in recomputation."""


@dataclass(frozen=True, kw_only=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile each layer once; equal layers share the result."""

    components: tuple[Literal["model", "loss"], ...] = ("model", "loss")
    """What is compiled."""

    backend: str = "inductor"
    """Backend of torch.compile."""
