"""A linear projection that may hold a part of its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.sharding import local_tensor

LinearProduct = Callable[[Tensor, Any, "Tensor | None"], Tensor]
"""As `F.linear`, with the weight as `Linear.read` gives it."""


class Linear(nn.Linear):
    """`nn.Linear` with what this process has of the weight: some of the outputs, or an addend of them.

    Attributes:
        product: what multiplies; replaced to change the precision, or to add to it.
        read: gives `product` the weight of a module; replaced where that is stored in another form.
        stored: the weight, if it is stored in another form and `weight` is None.
        feature_dims: of each parameter, the dim of its outputs and that of its inputs; None where it has none.
        num_addends: of how many processes' outputs the sum is taken; each of them adds that part of the bias.
        sum_addends: sums something over these processes; None if this is the only one.
        adapter_init: how the first values of its adapters are drawn, see `init_adapters`.
    """

    num_addends = 1
    sum_addends: Callable[[Tensor], Tensor] | None = None
    adapter_init = "kaiming"

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product: LinearProduct = F.linear
        self.read: Callable[[Linear], Any] = read_weight
        self.stored: dict[str, Stored] = {}
        self.feature_dims: dict[str, tuple[int | None, int | None]] = {"weight": (0, 1), "bias": (0, None)}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local_tensor(self.bias)
        if bias is not None and self.num_addends > 1:
            bias = bias / self.num_addends
        return self.product(x, self.read(self), bias)


def read_weight(module: Linear) -> Tensor:
    return local_tensor(module.weight)
