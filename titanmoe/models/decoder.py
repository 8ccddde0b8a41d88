"""The one Decoder: every family is this module built from another `DecoderSpec`.

Shape suffixes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.attention import GroupedQueryAttention
from titanmoe.models.feed_forward import FeedForward
from titanmoe.models.moe.layer import MoELayer
from titanmoe.models.norm import RMSNorm
from titanmoe.models.spec import DecoderSpec, Dense, LayerSpec, MoE, Rope
from titanmoe.ops.rope import rope_table

Head = Callable[[Tensor, Tensor], Any]
"""(hidden_BSD, output weight (V, D)) -> anything; takes the place of the output projection."""


class Block(nn.Module):
    """A pre-norm residual layer: attention, then a feed-forward or a mixture of experts."""

    def __init__(self, dim: int, spec: LayerSpec, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = GroupedQueryAttention(dim, spec.attention, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        feed_forward = spec.feed_forward
        self.feed_forward = FeedForward(dim, feed_forward) if isinstance(feed_forward, Dense) else None
        self.moe = MoELayer(dim, feed_forward) if isinstance(feed_forward, MoE) else None

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, cu_seqlens)
        transform = self.feed_forward if self.moe is None else self.moe
        assert transform is not None
        return x_BSD + transform(self.ffn_norm(x_BSD))


class Output(nn.Linear):
    """The output projection, or whatever `head` makes of the hidden states and the projection's weight.

    A loss that is fused with the projection runs in here, because a sharded weight is whole only inside the forward
    of the module that owns it.
    """

    def forward(self, hidden_BSD: Tensor, head: Head | None = None) -> Any:
        return F.linear(hidden_BSD, self.weight) if head is None else head(hidden_BSD, self.weight)


class Decoder(nn.Module):
    """A decoder-only language model.

    Attributes:
        spec: what it was built from.
        layers: the blocks, keyed "0", "1", ...
        output: None when the embedding's weight is used for the output too (`spec.tie_embeddings`).
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tok_embeddings = nn.Embedding(spec.vocab_size, spec.dim)
        self.layers = nn.ModuleDict(
            {str(index): Block(spec.dim, layer, spec.norm_eps) for index, layer in enumerate(spec.layers)}
        )
        self.norm = RMSNorm(spec.dim, spec.norm_eps)
        self.output = None if spec.tie_embeddings else Output(spec.dim, spec.vocab_size, bias=False)

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits (B, S, V), or what `head` returns.

        Args:
            tokens_BS: int64 token ids.
            position_ids: (B, S) or (S,), each token's position in its document; 0, 1, ... in every row if None.
            cu_seqlens: int32, where documents begin in the flattened tokens (0, ..., B * S, the start of every row
                among them), if a token may only attend to its own document.
            head: called with the last hidden states (B, S, D) and the output weight (V, D), instead of projecting.
        """
        if position_ids is None:
            position_ids = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSD = self.tok_embeddings(tokens_BS)
        position_ids = position_ids.expand(tokens_BS.shape)
        tables = {rope: rope_table(position_ids, rope.dim, rope.theta, x_BSD.dtype) for rope in self._ropes()}
        for block in self.blocks():
            x_BSD = block(x_BSD, *tables[block.spec.attention.rope], cu_seqlens)
            if block.moe is not None:
                block.moe.router.record()
        x_BSD = self.norm(x_BSD)
        if self.output is not None:
            return self.output(x_BSD, head)
        weight_VD = self.tok_embeddings.weight
        return F.linear(x_BSD, weight_VD) if head is None else head(x_BSD, weight_VD)

    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers.values()))

    def moe_layers(self) -> list[tuple[str, MoELayer]]:
        """(layer index as in `layers`, MoE layer) of every block that has one."""
        named_blocks = zip(self.layers, self.blocks(), strict=True)
        return [(index, block.moe) for index, block in named_blocks if block.moe is not None]

    def _ropes(self) -> set[Rope]:
        return {layer.attention.rope for layer in self.spec.layers}
