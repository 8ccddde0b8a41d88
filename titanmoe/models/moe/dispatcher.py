"""How tokens reach their experts.

Shape suffixes: T tokens, D model dim, K experts per token, R routed rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titanmoe.ops.permute import Permutation, combine, permute, permute_weights, sort_by_expert


@dataclass(frozen=True)
class Routed:
    """What the experts see, and what is needed to bring their results back."""

    x_RD: Tensor
    weights_R: Tensor
    permutation: Permutation

    @property
    def offsets_E(self) -> Tensor:
        return self.permutation.offsets_E


class LocalDispatcher:
    """All experts are in this process: sort the rows, and sum them back."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, align: int) -> Routed:
        """`align`: each expert's rows are padded to a multiple of this."""
        permutation = sort_by_expert(experts_TK, self.num_experts, align)
        return Routed(permute(x_TD, permutation), permute_weights(weights_TK, permutation), permutation)

    def combine(self, y_RD: Tensor, routed: Routed) -> Tensor:
        """y_TD: the sum of every token's rows."""
        return combine(y_RD, routed.permutation)
