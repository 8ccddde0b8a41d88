"""Backward passes in two parts, for inputs and for weights, do each product once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titanmoe.ops.grouped_mm import grouped_mm
from titanmoe.ops.linear_cross_entropy import linear_cross_entropy


class Products(TorchDispatchMode):
    """Counts ours by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "titanmoe":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_grouped_product_computes_the_gradients_that_are_asked_for(is_leaf: bool) -> None:
    torch.manual_seed(0)
    leaf, weight = torch.randn(7, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    x_RK, w_ENK = leaf * 1.0, weight if is_leaf else weight * 1.0
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    whole = torch.autograd.grad(grouped_mm(x_RK, w_ENK, offsets).square().sum(), (leaf, weight))
    y_RN = grouped_mm(leaf * 1.0, weight if is_leaf else weight * 1.0, offsets)
    loss = y_RN.square().sum()
    with Products() as for_inputs:
        (dx,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    with Products() as for_weights:
        (dw,) = torch.autograd.grad(loss, weight)
    assert torch.equal(dx, whole[0]) and torch.equal(dw, whole[1])
    assert for_inputs.counts == {"rows_times_weights": 1} and for_weights.counts == {"rows_times_rows": 1}


def test_the_loss_gives_each_gradient_once() -> None:
    torch.manual_seed(0)
    leaf, weight, labels = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True), torch.arange(6)
    whole = torch.autograd.grad(linear_cross_entropy(leaf * 1.0, weight, labels) / 3, (leaf, weight))
    loss = linear_cross_entropy(leaf * 1.0, weight, labels) / 3
    (d_leaf,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (d_weight,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(d_leaf, whole[0]) and torch.equal(d_weight, whole[1])
    with pytest.raises(RuntimeError, match="gradients are gone"):
        torch.autograd.grad(loss, weight)
