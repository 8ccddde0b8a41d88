"""The one Decoder: every family is this module built from another `DecoderSpec`.

Shape suffixes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.attention import GroupedQueryAttention, RopeTable
from titanmoe.models.feed_forward import FeedForward
from titanmoe.models.latent_attention import LatentAttention
from titanmoe.models.moe.layer import MoELayer
from titanmoe.models.norm import RMSNorm
from titanmoe.models.rope import rope_frequencies, rope_magnitude
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope
from titanmoe.ops.attention import chunk_documents
from titanmoe.ops.rope import rope_table
from titanmoe.ops.sharding import local_tensor

Head = Callable[..., Any]
"""(hidden_BSD, output weight (V, D)) -> anything; takes the place of the output projection. Where the vocabulary is on
several ranks (`Decoder.project` is replaced), it gets this rank's words only and, as `words`, the ranks' group."""


class Block(nn.Module):
    """A pre-norm residual layer: attention, then a feed-forward or a mixture of experts."""

    def __init__(self, dim: int, spec: LayerSpec, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.attention_norm = RMSNorm(dim, norm_eps)
        attention = spec.attention
        self.attention = (
            GroupedQueryAttention(dim, attention, norm_eps)
            if isinstance(attention, GroupedQuery)
            else LatentAttention(dim, attention)
        )
        self.ffn_norm = RMSNorm(dim, norm_eps)
        feed_forward = spec.feed_forward
        self.feed_forward = FeedForward(dim, feed_forward) if isinstance(feed_forward, Dense) else None
        self.moe = MoELayer(dim, feed_forward) if isinstance(feed_forward, MoE) else None

    def forward(
        self, x_BSD: Tensor, table: RopeTable | None, cu_seqlens: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), table, cu_seqlens, position_ids_BS)
        transform = self.feed_forward if self.moe is None else self.moe
        assert transform is not None
        return x_BSD + transform(self.ffn_norm(x_BSD))


def project(hidden_BSD: Tensor, weight_VD: Tensor, head: Head | None) -> Any:
    """Logits (B, S, V), or what `head` makes of the hidden states and the projection's weight."""
    return F.linear(hidden_BSD, weight_VD) if head is None else head(hidden_BSD, weight_VD)


class Embedding(nn.Embedding):
    """`nn.Embedding` with what this process has of the weight."""

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return F.embedding(tokens_BS, local_tensor(self.weight))


class Output(nn.Linear):
    """The output projection.

    A loss that is fused with the projection runs in here, because a sharded weight is whole only inside the forward
    of the module that owns it.
    """

    def forward(self, hidden_BSD: Tensor, project: Callable[..., Any] = project, head: Head | None = None) -> Any:
        return project(hidden_BSD, local_tensor(self.weight), head)


@dataclass(frozen=True)
class Part:
    """What of a model is here: some of its layers, and perhaps its ends. The last part has the final norm, too.

    A tied embedding is in both ends: if these are in different processes, each has a copy of its own.
    """

    layers: tuple[int, ...]
    embeds: bool = True
    projects: bool = True


class Decoder(nn.Module):
    """A decoder-only language model, or a part of one.

    Attributes:
        spec: what it was built from; of the whole model, also where only a part is here.
        layers: the blocks, keyed by their place in the whole model: "0", "1", ...
        embeds: whether tokens come in; hidden states come into a part that begins later.
        tok_embeddings: None in a part that needs it neither to embed nor, being tied, to project.
        norm: None in a part that ends earlier.
        num_sequence_parts: into how many parts sequences are cut, of which this process is given one.
        project: what makes logits, or calls the head; replaced where the vocabulary is on several ranks.
        output: None in a part that ends earlier, and when the embedding's weight is used for the output too
            (`spec.tie_embeddings`).
    """

    def __init__(self, spec: DecoderSpec, part: Part | None = None) -> None:
        super().__init__()
        part = part or Part(tuple(range(len(spec.layers))))
        self.spec = spec
        self.num_sequence_parts = 1
        self.project: Callable[..., Any] = project
        self.embeds = part.embeds
        has_embedding = part.embeds or (part.projects and spec.tie_embeddings)
        self.tok_embeddings = Embedding(spec.vocab_size, spec.dim) if has_embedding else None
        self.layers = nn.ModuleDict(
            {str(index): Block(spec.dim, spec.layers[index], spec.norm_eps) for index in part.layers}
        )
        self.norm = RMSNorm(spec.dim, spec.norm_eps) if part.projects else None
        has_output = part.projects and not spec.tie_embeddings
        self.output = Output(spec.dim, spec.vocab_size, bias=False) if has_output else None

    def view(self, part: Part) -> Decoder:
        """A part of this model as a model of its own: the same modules in another container."""
        view = Decoder(self.spec, Part((), embeds=False, projects=False))
        view.embeds = part.embeds
        view.num_sequence_parts, view.project = self.num_sequence_parts, self.project
        view.layers.update({str(index): self.layers[str(index)] for index in part.layers})
        if part.embeds or (part.projects and self.spec.tie_embeddings):
            view.tok_embeddings = self.tok_embeddings
        if part.projects:
            view.norm, view.output = self.norm, self.output
        return view

    def forward(
        self,
        inputs: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits (B, S, V), or what `head` returns; hidden states (B, S, D) of a part that ends earlier.

        Args:
            inputs: int64 token ids (B, S); for a part that begins later, what the part before it returned.
            position_ids: (B, S) or (S,), each token's position in its document; 0, 1, ... in every row if None. A part
                that begins later needs them.
            cu_seqlens: int32, where documents begin in the flattened tokens (0, ..., B * S, the start of every row
                among them), if a token may only attend to its own document.
            head: called with the last hidden states (B, S, D) and the output weight (V, D), instead of projecting.
        """
        if position_ids is None:
            assert self.embeds, "hidden states may be of other tokens than this process is given"
            position_ids = torch.arange(inputs.shape[1], device=inputs.device)
        x_BSD = inputs
        if self.embeds:
            assert self.tok_embeddings is not None
            x_BSD = self.tok_embeddings(inputs)
        position_ids = position_ids.expand(inputs.shape[0], -1)
        tables = {rope: _rope_table(rope, position_ids, x_BSD.dtype) for rope in self._attention_kinds("rope")}
        batch, seq_len = position_ids.shape[0], position_ids.shape[1] * self.num_sequence_parts
        documents = {
            chunk: cu_seqlens if chunk is None else chunk_documents(cu_seqlens, chunk, batch, seq_len, inputs.device)
            for chunk in self._attention_kinds("chunk")
        }
        for block in self.blocks():
            attention = block.spec.attention
            chunk = getattr(attention, "chunk", None)
            x_BSD = block(x_BSD, tables[attention.rope], documents[chunk], position_ids)
            if block.moe is not None and block.training:  # or the counts are those of the last recomputation
                block.moe.router.record()
        if self.norm is None:
            return x_BSD
        x_BSD = self.norm(x_BSD)
        if self.output is not None:
            return self.output(x_BSD, self.project, head)
        assert self.tok_embeddings is not None, "a tied embedding is in both ends"
        return self.project(x_BSD, local_tensor(self.tok_embeddings.weight), head)

    def copied_parameters(self) -> list[nn.Parameter]:
        """What the part that embeds has too: a tied embedding, where it is here only to project."""
        return [] if self.embeds or self.tok_embeddings is None else list(self.tok_embeddings.parameters())

    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers.values()))

    def moe_layers(self) -> list[tuple[str, MoELayer]]:
        """(layer index as in `layers`, MoE layer) of every block that has one."""
        named_blocks = zip(self.layers, self.blocks(), strict=True)
        return [(index, block.moe) for index, block in named_blocks if block.moe is not None]

    def _attention_kinds(self, name: str) -> set[Any]:
        """Every value that a field of the layers' attention has; None for a kind of attention without it."""
        return {getattr(block.spec.attention, name, None) for block in self.blocks()}


def _rope_table(rope: Rope | None, position_ids_BS: Tensor, dtype: torch.dtype) -> RopeTable | None:
    if rope is None:
        return None
    frequencies_F = rope_frequencies(rope, position_ids_BS.device)
    return rope_table(position_ids_BS, frequencies_F, rope_magnitude(rope), dtype)
