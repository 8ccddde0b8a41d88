"""Backward passes that want only some of the gradients, as when those of weights are computed later."""

from __future__ import annotations

from typing import Any

import torch


def wants_gradient(ctx: Any, index: int) -> bool:
    """Whether this backward pass uses the gradient of a Function's `index`-th argument. Call it inside `backward`.

    `ctx.needs_input_grad` is of the forward pass, and the same for every backward pass through the graph. Of a leaf
    `torch.autograd.grad` does not tell; it is then assumed to be wanted. Give the Function `leaf.view_as(leaf)` where
    that matters. What torch.compile traces wants all.
    """
    if torch.compiler.is_compiling():
        return True
    node, _ = ctx.next_functions[index]
    if node is None or hasattr(node, "variable"):
        return node is not None
    # Private in torch 2.11 to 2.13, where torch.autograd.graph calls it, too.
    return torch._C._will_engine_execute_node(node)
