"""A linear projection that may hold a part of its weight."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.sharding import local_tensor

LinearProduct = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""As `F.linear`."""


class Linear(nn.Linear):
    """`nn.Linear` with what this process has of the weight: some of the outputs, or an addend of them.

    Attributes:
        product: what multiplies; replaced to change the precision.
        num_addends: of how many processes' outputs the sum is taken; each of them adds that part of the bias.
    """

    num_addends = 1

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product: LinearProduct = F.linear

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local_tensor(self.bias)
        if bias is not None and self.num_addends > 1:
            bias = bias / self.num_addends
        return self.product(x, local_tensor(self.weight), bias)
