"""Activation checkpointing: forget what a block computed, and compute it again in backward.

The router's choice is always kept, never made again: rounding may differ the second time, and a token that went
elsewhere would mix the gradients of two experts. Nor are ranks asked again how many rows they send.

Modes "full" and "selective" run a block, or what of it is not kept, a second time (`torch.utils.checkpoint`). Mode
"moe" runs nothing twice but single operations: a saved tensor that is the result of a norm or of an activation is
replaced by the node of the graph that made it, which keeps its own inputs anyway, and is computed from them when a
backward asks for it. An operation of ours that is cheap enough says so by leaving `ctx.recompute`, a function of its
saved tensors, on its node; torch's are named here. There are no hooks on operations, so it costs what it recomputes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder
from titanmoe.ops.frozen_native import block_scaled_mm  # noqa: F401 - defines an operator named below
from titanmoe.ops.low_rank import linear_low_rank  # noqa: F401 - so does this
from titanmoe.ops.low_rank_rows import add_low_rank  # noqa: F401 - and this
from titanmoe.ops.native_float8 import scaled_rows_times_weights  # noqa: F401 - and so does this
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.expert import exchanging_dispatcher

Result = TypeVar("Result")
Mode = Literal["none", "full", "selective", "moe", "memory_budget"]

_MATMULS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten._scaled_mm.default: 1,
    torch.ops.titanmoe.linear_low_rank.default: 1,
}
"""Products, and which of their arguments is the weight, transposed."""

_COSTLY = {
    *_MATMULS,
    torch.ops.aten.topk.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.titanmoe.rows_times_weights.default,
    torch.ops.titanmoe.rows_times_frozen.default,
    torch.ops.titanmoe.add_low_rank.default,
    torch.ops.titanmoe.scaled_rows_times_weights.default,
    torch.ops.titanmoe.block_scaled_mm.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}
"""What selective checkpointing by op keeps: products, attention, the router's choice, and what came from other ranks.
Norms, activations and moves within the rank are recomputed."""

_MARKS = (
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
)
"""What FSDP puts around the gathering of its parameters. That of experts is inside a block, and is not the same the
second time; with these two ignored, selective checkpointing does not mind."""


def recomputed_blocks(num_layers: int, mode: Mode, option: str) -> list[bool]:
    """Which blocks are recomputed whole: all ("full"), every n-th ("selective" with option n), or none."""
    if mode == "full":
        return [True] * num_layers
    if mode == "selective" and option != "op":
        return [(index + 1) % int(option) == 0 for index in range(num_layers)]
    return [False] * num_layers


def apply_activation_checkpoint(
    model: Decoder,
    *,
    mode: Mode,
    option: str = "op",
    preserve_rng_state: bool = True,
    early_stop: bool = True,
    determinism_check: str = "default",
    recomputed_products: Sequence[str] = (),
    memory_budget: float = 1.0,
    is_compiled: bool = False,
) -> None:
    """Wrap the forward of the blocks that `mode` asks for. Names of modules and parameters do not change.

    Args:
        option: of mode "selective": "op", or a number n for every n-th block.
        recomputed_products: with option "op", names of linear modules, see `_weight_shapes`. Every product with a
            weight of the shape of theirs is recomputed, as in torchtitan.
        memory_budget: of mode "memory_budget"; what the compiler may keep, as a share of what it would.
        is_compiled: the blocks' forwards are compiled already. With "moe" and "op" it is then the compiler that is told
            to recompute what it can fuse: norms, activations, moves within the rank.

    Raises:
        ConfigError: `recomputed_products` names something that is not a linear module.
    """
    is_by_op = mode == "selective" and option == "op"
    # For whatever is compiled from now on; so both are set in every mode. Checked against torch 2.11 and 2.13.
    torch._functorch.config.activation_memory_budget = memory_budget if mode == "memory_budget" else 1.0
    torch._functorch.config.ban_recompute_materialized_backward = not (is_by_op or mode == "moe")
    if hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):  # not in torch 2.11
        # A group of ranks that a graph is given has no size that a budget could count.
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True
    shapes = _weight_shapes(model, recomputed_products) if is_by_op else frozenset()
    if is_compiled and (mode == "moe" or is_by_op):
        return
    SAC_IGNORED_OPS.update(_MARKS)
    policy = functools.partial(_policy, shapes)
    outside_graphs = torch.compiler.disable(_call) if is_compiled else _call
    if is_compiled:
        # Of several graphs that fit, both forwards of a layer must take the same: the oldest, and not the last used,
        # which other layers change in between. There is no public way; checked against torch 2.11 and 2.13.
        torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    whole = recomputed_blocks(len(model.spec.layers), mode, option)
    for block, is_whole in zip(model.blocks(), (whole[int(index)] for index in model.layers), strict=True):
        if mode == "moe":
            block.forward = functools.partial(_without_cheap_results, block.forward)  # type: ignore[method-assign]
        elif is_whole or is_by_op:
            contexts: Callable[[], Any] = noop_context_fn
            if is_by_op:
                contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            elif block.moe is not None:
                decisions = _Decisions()
                router, exchanging = block.moe.router, exchanging_dispatcher(block.moe)
                router.choose = functools.partial(  # type: ignore[method-assign]
                    outside_graphs, decisions.made_once(router.choose)
                )
                if exchanging is not None:
                    exchanging.exchange_numbers = functools.partial(  # type: ignore[method-assign]
                        outside_graphs, decisions.made_once(exchanging.exchange_numbers)
                    )
                contexts = decisions.contexts
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint,
                block.forward,
                use_reentrant=False,
                context_fn=contexts,
                preserve_rng_state=preserve_rng_state,
                early_stop=early_stop,
                determinism_check=determinism_check,
            )


def _call(function: Callable[[Tensor], Result], argument: Tensor) -> Result:
    return function(argument)


class _Decisions:
    """Where a layer's tokens go. A second forward is given what the first one decided, in the same order."""

    def __init__(self) -> None:
        self.made: list[Any] | None = None
        self.again: Iterator[Any] | None = None

    def made_once(self, decide: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
        def remembered(argument: Tensor) -> Result:
            if self.again is not None:
                decision: Result = next(self.again)
                return decision
            decision = decide(argument)
            if self.made is not None:
                self.made.append(decision)
            return decision

        return remembered

    def contexts(self) -> tuple[Any, Any]:
        """For one forward of the layer, and for its recomputation."""
        made: list[Any] = []
        return self._first(made), self._second(made)

    @contextlib.contextmanager
    def _first(self, made: list[Any]) -> Iterator[None]:
        self.made = made
        try:
            yield
        finally:
            self.made = None

    @contextlib.contextmanager
    def _second(self, made: list[Any]) -> Iterator[None]:
        self.again = iter(made)
        try:
            yield
        finally:
            self.again = None


def _policy(shapes: Collection[torch.Size], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op not in _COSTLY or (op in _MATMULS and args[_MATMULS[op]].shape in shapes):
        return CheckpointPolicy.PREFER_RECOMPUTE
    if op is torch.ops.titanmoe.add_low_rank.default and args[5] is None:
        return CheckpointPolicy.PREFER_RECOMPUTE  # what is wide is kept, and the factors are narrow
    return CheckpointPolicy.MUST_SAVE


def _weight_shapes(model: Decoder, names: Sequence[str]) -> frozenset[torch.Size]:
    """Shapes (in, out) of the weights, as this rank has them, of the modules whose path ends with one of the names.

    Raises:
        ConfigError: a module that is not linear, or a name that matches nothing. Names of parts of an MoE layer may be
            given for a dense model, too.
    """
    shapes: set[torch.Size] = set()
    whole = build_model(model.spec)  # of which this may be a part
    for name in names:
        found = [module for path, module in whole.named_modules() if f".{path}".endswith(f".{name}")]
        if not all(isinstance(module, nn.Linear) for module in found) or not (found or name.startswith("moe.")):
            raise ConfigError(
                f'"{name}" is not a linear module of this model',
                where="activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
                mend='Name modules by the end of their path, such as "moe.router.gate" or "attention.o_proj".',
            )
        here = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        plain = [module for module in here if isinstance(module, nn.Linear) and module.weight is not None]
        shapes.update(local_tensor(module.weight).t().shape for module in plain)
    return frozenset(shapes)


# Mode "moe"

_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "FusedRmsNormBackward0": lambda node: F.rms_norm(
        node._saved_input, node._saved_normalized_shape, node._saved_weight, node.metadata["eps"]
    ),
}
"""How the result of a node of torch's follows from what it saves, as torch 2.11 to 2.13 name both."""

_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


class _Result:
    """The result of a node, computed when it is first taken and forgotten when all who saved it have taken it."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.num_saved = self.num_taken = 0
        self.value: Tensor | None = None

    @torch.no_grad()
    def take(self) -> Tensor:
        value = self.value
        if value is None:
            node = self.node
            # Reading what a node saved calls `_unpack` where that is a cheap result, too.
            value = node.recompute(*node.saved_tensors) if hasattr(node, "recompute") else _AGAIN[node.name()](node)
        self.num_taken += 1
        self.value = value if self.num_taken % self.num_saved else None
        return value


def _without_cheap_results(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    results: dict[Node, _Result] = {}
    with saved_tensors_hooks(functools.partial(_pack, results), _unpack):
        return forward(*args)


def _pack(results: dict[Node, _Result], tensor: Tensor) -> Tensor | tuple[_Result, torch.dtype, torch.Size]:
    node, num_casts = tensor.grad_fn, 0
    while node is not None and (node.name() in _RESHAPES or (node.name() == "ToCopyBackward0" and num_casts == 0)):
        num_casts += node.name() == "ToCopyBackward0"
        node = node.next_functions[0][0]
    if node is None or not _is_cheap(node):
        return tensor
    result = results.setdefault(node, _Result(node))
    result.num_saved += 1
    return result, tensor.dtype, tensor.shape


def _unpack(packed: Tensor | tuple[_Result, torch.dtype, torch.Size]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    result, dtype, shape = packed
    return result.take().to(dtype).view(shape)


def _is_cheap(node: Any) -> bool:
    if node.name() == "MulBackward0":  # it saves a factor if the other one has a gradient
        return all(function is not None for function, _ in node.next_functions)
    if node.name() == "FusedRmsNormBackward0":
        return "eps" in node.metadata
    return hasattr(node, "recompute") or node.name() in _AGAIN
