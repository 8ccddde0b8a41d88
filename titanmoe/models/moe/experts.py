"""The experts: stacked SwiGLU feed-forwards over rows that are sorted by expert.

Shape suffixes: R rows, E experts, D model dim, H hidden dim.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from titanmoe.models.spec import MoE
from titanmoe.ops.clamped_swiglu import clamped_swiglu
from titanmoe.ops.expert_bias import add_expert_bias
from titanmoe.ops.grouped_mm import grouped_mm
from titanmoe.ops.sharding import local_tensor
from titanmoe.ops.swiglu import swiglu


class Experts(nn.Module):
    """Attributes:
    gate_up: (E, 2, H, D), gate and up of every expert; one product computes both.
    down: (E, D, H).
    gate_up_bias: (E, 2, H), or None.
    down_bias: (E, D), or None.
    num_addends: of how many processes' outputs the sum is taken; each of them adds that part of `down_bias`.
    """

    num_addends = 1

    def __init__(self, dim: int, spec: MoE) -> None:
        super().__init__()
        num_experts, hidden_dim = spec.num_experts, spec.hidden_dim
        self.spec = spec
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2, hidden_dim)) if spec.bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if spec.bias else None

    def forward(self, x_RD: Tensor, weights_R: Tensor, offsets_E: Tensor) -> Tensor:
        """y_RD: each row through its expert, with its router weight on the way in or out."""
        weights: Tensor | None = weights_R
        if self.spec.router.weight_on == "input":
            x_RD, weights = x_RD * weights_R.to(x_RD.dtype)[:, None], None
        # Local: of the experts in this process, which may not be all.
        gate_up_R2H = grouped_mm(x_RD, local_tensor(self.gate_up).flatten(1, 2), offsets_E)
        if self.gate_up_bias is not None:
            gate_up_R2H = add_expert_bias(gate_up_R2H, local_tensor(self.gate_up_bias).flatten(1, 2), offsets_E)
        activation = self.spec.activation
        if activation is None:
            h_RH = swiglu(gate_up_R2H, weights)
        else:
            h_RH = clamped_swiglu(gate_up_R2H, weights, activation.limit, activation.alpha)
        y_RD = grouped_mm(h_RH, local_tensor(self.down), offsets_E)
        if self.down_bias is None:
            return y_RD
        down_bias_ED = local_tensor(self.down_bias)
        if self.num_addends > 1:
            down_bias_ED = down_bias_ED / self.num_addends
        return add_expert_bias(y_RD, down_bias_ED, offsets_E, weights)
