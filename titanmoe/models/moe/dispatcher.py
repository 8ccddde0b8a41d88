"""How tokens reach their experts.

Shape suffixes: T tokens, D model dim, K experts per token, R routed rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from titanmoe.ops.permute import Copies, combine, permute, permute_weights, sort_by_expert


@dataclass(frozen=True)
class Routed:
    """What the experts see, and what the dispatcher needs to bring their results back.

    Attributes:
        weights_R: the router's weight of every row; zero in padding.
        offsets_E: int32, the end of each expert's rows; of the experts in this process.
        num_rows: how many of the rows are not padding. There may be rows beyond the last offset.
        journey: the dispatcher's own.
        copies: the tokens, where rows are only copied and do not travel.
    """

    x_RD: Tensor
    weights_R: Tensor
    offsets_E: Tensor
    num_rows: int
    journey: Any
    copies: Copies | None = None


class Dispatcher(Protocol):
    """Brings tokens to their experts and back; replaced where the experts are on several ranks.

    Sending and receiving are two calls, so that something else can be computed while rows travel.
    """

    def send(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Any:
        """Begin to bring rows to their experts; the result is for `receive`."""

    def receive(self, sent: Any, align: int) -> Routed:
        """Rows sorted by expert, each expert's padded to a multiple of `align`."""

    def combine(self, y_RD: Tensor, routed: Routed, more_TD: Tensor | None) -> Tensor:
        """y_TD: the sum of every token's rows, and of what there is more of the tokens of `routed.copies`."""


class LocalDispatcher:
    """All experts are in this process: sort the rows, and sum them back."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def send(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x_TD, weights_TK, experts_TK

    def receive(self, sent: tuple[Tensor, Tensor, Tensor], align: int) -> Routed:
        x_TD, weights_TK, experts_TK = sent
        permutation = sort_by_expert(experts_TK, self.num_experts, align)
        x_RD, weights_R = permute(x_TD, permutation), permute_weights(weights_TK, permutation)
        copies = Copies(x_TD, experts_TK, permutation.slot_R, permutation.row_TK)
        return Routed(x_RD, weights_R, permutation.offsets_E, experts_TK.numel(), permutation, copies)

    def combine(self, y_RD: Tensor, routed: Routed, more_TD: Tensor | None) -> Tensor:
        """See `Dispatcher`."""
        y_TD = combine(y_RD, routed.journey)
        return y_TD if more_TD is None else y_TD + more_TD
