"""Where it runs: how the model is spread over ranks, what is recomputed, what is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key

_FUSED = "the loss is computed with the output projection, so whole logits never exist"
_ONE_AT_A_TIME = "a rank computes one microbatch at a time"
_BALANCED = "ranks exchange tokens for heads, which gives all the same work"


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

    pipeline_parallel_degree: int = key(1, at_least=1)
    """Ranks over which the layers are dealt, in stages that a microbatch goes through one after another."""

    module_fqns_per_model_part: tuple[tuple[str, ...], ...] | None = None
    """Names of the modules in each pipeline stage: `tok_embeddings`, `layers.0`, ..., `norm`, `output`. Without it,
    stages are balanced by counted FLOPs, unless one of the next three keys is changed."""

    pipeline_parallel_first_stage_less_layers: int = key(1, at_least=0)
    """Layers that the first stage has fewer, as it also has the embedding."""

    pipeline_parallel_last_stage_less_layers: int = key(1, at_least=0)
    """Layers that the last stage has fewer, as it also has the output projection."""

    pipeline_parallel_layers_per_stage: int | None = key(None, at_least=1)
    """Layers per pipeline stage. The number of stages must fit the schedule."""

    pipeline_parallel_schedule: str = "1F1B"
    """Order in which microbatches pass through the stages: `GPipe` or `1F1B`, with a stage per rank; `LoopedBFS`,
    `Interleaved1F1B` or `InterleavedZeroBubble`, with two or more; `ZBVZeroBubble` or `DualPipeV`, with two."""

    pipeline_parallel_schedule_csv: str | None = ""
    """File with a schedule of the user's own: a row for each rank, with cells such as 3F0, the forward pass of
    microbatch 0 through stage 3 (B: backward, I and W: backward for inputs and for weights)."""

    pipeline_parallel_microbatch_size: int = key(1, at_least=1)
    """Sequences per microbatch of a pipeline. It must divide `training.local_batch_size`."""

    pipeline_parallel_expert_parallel_overlap: bool = key(True, inert=_ONE_AT_A_TIME)
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

    mode: Literal["none", "selective", "full", "moe", "memory_budget"] = "selective"
    """`none` keeps everything, `full` only the input of each layer, `moe` everything but the results of norms and
    activation functions. `selective` follows `selective_ac_option`. `memory_budget` leaves it to torch.compile."""

    selective_ac_option: str = "2"
    """With `selective`: `op` recomputes cheap operations and keeps the results of costly ones; a whole number n
    recomputes every n-th layer."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: tuple[str, ...] = ("moe.router.gate",)
    """With `op`: ends of the paths of linear modules whose products are recomputed all the same, as are all products
    with a weight of the same shape."""

    early_stop: bool = False
    """Stop recomputing a layer once all that its backward pass needs is there."""

    memory_budget: float = key(0.5, at_least=0, at_most=1)
    """With `memory_budget`: 0 keeps only the inputs of each compiled graph, 1 as much as the compiler would."""

    visualize_memory_budget_pareto: bool = key(False, inert="no picture is drawn")
    """With `memory_budget`: draw memory against run time."""

    preserve_rng_state: bool = True
    """Restore the random state for recomputation."""

    determinism_check: Literal["default", "none"] = "default"
    """How recomputed tensors are compared with the first ones: `default` compares shapes, types and devices."""

    debug: bool = key(False, later="tracing recomputation")
    """Record what was computed in the forward pass and in recomputation."""


@dataclass(frozen=True, kw_only=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile each kind of layer once; equal layers share the result."""

    components: tuple[Literal["model", "loss"], ...] = ("model", "loss")
    """What is compiled."""

    backend: str = "inductor"
    """Backend of torch.compile."""
