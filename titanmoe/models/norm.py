"""RMSNorm as a module."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from titanmoe.ops.rms_norm import rms_norm
from titanmoe.ops.sharding import local_tensor


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over one dim with a weight, computed by our own product on the CPU."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, local_tensor(self.weight), self._eps)
