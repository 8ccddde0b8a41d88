"""The dense SwiGLU feed-forward, also used for shared experts.

Shape suffixes: D model dim, H hidden dim; `...` is any leading shape.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.linear import Linear
from titanmoe.models.spec import Dense


class FeedForward(nn.Module):
    def __init__(self, dim: int, spec: Dense) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, spec.hidden_dim, bias=False)
        self.up_proj = Linear(dim, spec.hidden_dim, bias=False)
        self.down_proj = Linear(spec.hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
