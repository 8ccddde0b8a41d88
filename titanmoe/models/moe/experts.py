"""The experts: stacked SwiGLU feed-forwards over rows that are sorted by expert.

Shape suffixes: R rows, E experts, D model dim, H hidden dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from titanmoe.models.spec import MoE
from titanmoe.ops.clamped_swiglu import clamped_swiglu
from titanmoe.ops.expert_bias import add_expert_bias
from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.grouped_mm import GroupedProduct, PlainGroupedProduct
from titanmoe.ops.low_rank import LowRankGroupedProduct
from titanmoe.ops.permute import Copies
from titanmoe.ops.sharding import local_tensor
from titanmoe.ops.swiglu import swiglu


class Experts(nn.Module):
    """Attributes:
    gate_up: (E, 2, H, D), gate and up of every expert; one product computes both.
    down: (E, D, H).
    gate_up_bias: (E, 2, H), or None.
    down_bias: (E, D), or None.
    gate_up_product, down_product: what multiplies rows with the weights; replaced to change the precision, or to add
        to it.
    read: gives a product the weight of a module that has a name, as (E, N, K); replaced where that is stored in
        another form.
    stored: by name, weights that are stored in another form; the parameter of that name is then None.
    hidden_dims: of each parameter, the dim of the hidden units, None where it has none. Dim 0 is that of experts.
    num_addends: of how many processes' outputs the sum is taken; each of them adds that part of `down_bias`.
    sum_addends: sums something over these processes; None if this is the only one.
    adapter_init: how the first values of their adapters are drawn, see `init_adapters`.
    """

    num_addends = 1
    sum_addends: Callable[[Tensor], Tensor] | None = None
    adapter_init = "kaiming"

    def __init__(self, dim: int, spec: MoE) -> None:
        super().__init__()
        num_experts, hidden_dim = spec.num_experts, spec.hidden_dim
        self.spec = spec
        self.dim = dim
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2, hidden_dim)) if spec.bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if spec.bias else None
        self.read: Callable[[Experts, str], Any] = read_expert_weight
        self.stored: dict[str, Stored] = {}
        self.hidden_dims: dict[str, int | None] = {"gate_up": 2, "gate_up_bias": 2, "down": 2, "down_bias": None}
        self.gate_up_product: GroupedProduct = PlainGroupedProduct()
        self.down_product: GroupedProduct = PlainGroupedProduct()

    def row_multiple(self, x: Tensor) -> int:
        """What every expert's rows should be padded to a multiple of, for tokens like `x`."""
        return math.lcm(
            self.gate_up_product.row_multiple(x, "gate_up" not in self.stored and self.gate_up.requires_grad),
            self.down_product.row_multiple(x, "down" not in self.stored and self.down.requires_grad),
        )

    def forward(
        self, x_RD: Tensor, weights_R: Tensor, offsets_E: Tensor, num_rows: int = 0, copies: Copies | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y_RD: each row through its expert, with its router weight on the way in or out. Arguments as in `Routed`.

        And more_TD, which is missing in the sum of a token's rows; or None.
        """
        weights: Tensor | None = weights_R
        biased_R: Tensor | None = None
        if self.spec.router.weight_on == "input":
            x_RD, weights, copies = x_RD * weights_R.to(x_RD.dtype)[:, None], None, None
            if self.gate_up_bias is not None:
                biased_R = (weights_R != 0).to(weights_R.dtype)  # so that padding stays zero
        # Local: of the experts in this process, which may not be all.
        rows, weight = (offsets_E, num_rows), self.read(self, "gate_up")
        product: Any = self.gate_up_product
        if _see_tokens(product, weight, copies):
            gate_up_R2H = product.from_tokens(x_RD, weight, *rows, copies)
        else:
            gate_up_R2H = product(x_RD, weight, *rows)
        if self.gate_up_bias is not None:
            gate_up_R2H = add_expert_bias(
                gate_up_R2H, local_tensor(self.gate_up_bias).flatten(1, 2), offsets_E, biased_R
            )
        activation = self.spec.activation
        if activation is None:
            h_RH = swiglu(gate_up_R2H, weights)
        else:
            h_RH = clamped_swiglu(gate_up_R2H, weights, activation.limit, activation.alpha)
        product, weight, more_TD = self.down_product, self.read(self, "down"), None
        if _see_tokens(product, weight, copies):
            y_RD, more_TD = product.to_tokens(h_RH, weight, *rows, copies)
        else:
            y_RD = product(h_RH, weight, *rows)
        if self.down_bias is None:
            return y_RD, more_TD
        down_bias_ED = local_tensor(self.down_bias)
        if self.num_addends > 1:
            down_bias_ED = down_bias_ED / self.num_addends
        return add_expert_bias(y_RD, down_bias_ED, offsets_E, biased_R if weights is None else weights), more_TD


def read_expert_weight(module: Experts, name: str) -> Tensor:
    return local_tensor(getattr(module, name)).flatten(1, -2)


def _see_tokens(product: Any, weight: Any, copies: Copies | None) -> bool:
    """Whether adapters are better multiplied with tokens than with the rows that are copies of them."""
    return copies is not None and isinstance(product, LowRankGroupedProduct) and product.suits_tokens(weight, copies)
