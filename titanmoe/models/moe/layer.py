"""The mixture-of-experts layer: four small objects.

Shape suffixes: B batch, S sequence, D model dim.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from titanmoe.models.feed_forward import FeedForward
from titanmoe.models.moe.dispatcher import Dispatcher, LocalDispatcher
from titanmoe.models.moe.experts import Experts
from titanmoe.models.moe.router import Router
from titanmoe.models.spec import MoE


class MoELayer(nn.Module):
    def __init__(self, dim: int, spec: MoE) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(dim, spec)
        self.dispatcher: Dispatcher = LocalDispatcher(spec.num_experts)
        self.experts = Experts(dim, spec)
        self.shared_experts = FeedForward(dim, spec.shared) if spec.shared else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        weights_TK, experts_TK = self.router(x_BSD)
        sent = self.dispatcher.send(x_BSD.flatten(0, 1), weights_TK, experts_TK)
        shared_BSD = None if self.shared_experts is None else self.shared_experts(x_BSD)
        routed = self.dispatcher.receive(sent, self.experts.row_multiple(x_BSD))
        del sent  # the rows as they travelled are not needed while the experts compute
        y_RD, more_TD = self.experts(routed.x_RD, routed.weights_R, routed.offsets_E, routed.num_rows, routed.copies)
        y_BSD = self.dispatcher.combine(y_RD, routed, more_TD).view_as(x_BSD)
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD
