"""The experts: stacked SwiGLU feed-forwards over rows that are sorted by expert.

Shape suffixes: R rows, E experts, D model dim, H hidden dim.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from titanmoe.models.spec import MoE
from titanmoe.ops.grouped_mm import grouped_mm
from titanmoe.ops.swiglu import swiglu


class Experts(nn.Module):
    """Attributes:
    gate_up: (E, 2, H, D), gate and up of every expert; one product computes both.
    down: (E, D, H).
    """

    def __init__(self, dim: int, spec: MoE) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(spec.num_experts, 2, spec.hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(spec.num_experts, dim, spec.hidden_dim))

    def forward(self, x_RD: Tensor, weights_R: Tensor, offsets_E: Tensor) -> Tensor:
        """y_RD: each row through its expert, times its router weight."""
        gate_up_R2H = grouped_mm(x_RD, self.gate_up.flatten(1, 2), offsets_E)
        return grouped_mm(swiglu(gate_up_R2H, weights_R), self.down, offsets_E)
