"""Decoding with kept keys and values: the prompts in one forward, then one token of every sequence per forward.

The model knows nothing of it: what combines its heads (`attend`) is replaced as long as a `Decoding` is in use. Rows
are padded on the right, and every row has positions of its own. So a prompt is seen by the same attention as in
training, whatever its mask; what follows a row's last token is not seen by it, and is overwritten as it grows.

Memory is taken once per batch, in every layer for as many tokens as it can see. The token at position p lies in slot
p modulo the number of slots: one that is overwritten has left the window, or is of an earlier chunk. Latent attention
keeps its heads' keys and values, not the latent: 2 N (P + C) numbers per token.

Shape suffixes: B batch, S sequence, D model dim, V vocabulary, N query heads, K key/value heads, H head dim, C slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.attention import Attend
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import GroupedQuery, Latent
from titanmoe.ops.cached_attention import cached_attention


class Decoding:
    """A batch of sequences that grow.

    Attributes:
        max_length: how many tokens a sequence may have.
        lengths: how many it has, as the host knows.
        lengths_B: the same on the device.
        is_prefill: whether the forward that runs is that of the prompts.
    """

    def __init__(self, model: Decoder, max_length: int) -> None:
        self.model, self.max_length = model, max_length
        self.lengths: list[int] = []
        self.lengths_B = torch.empty(0, dtype=torch.int64)
        self.is_prefill = True

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """logits_BV of the token after each prompt. What was kept before is forgotten."""
        self.lengths = [len(prompt) for prompt in prompts]
        self.lengths_B = torch.tensor(self.lengths, device=device)
        longest = max(self.lengths)
        assert min(self.lengths) > 0 and longest <= self.max_length
        tokens_BS = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        last_B = self.lengths_B - 1
        self.is_prefill = True

        def head(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_BSD = hidden_BSD.take_along_dim(last_B[:, None, None], dim=1)
            return F.linear(hidden_BSD, weight_VD)

        return self.model(tokens_BS, head=head)[:, 0]

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """logits_BV of the token after this one, which is added to each sequence."""
        self.is_prefill = False
        self.lengths = [length + 1 for length in self.lengths]
        assert max(self.lengths) <= self.max_length
        logits_B1V = self.model(tokens_B[:, None], position_ids=self.lengths_B[:, None])
        self.lengths_B = self.lengths_B + 1
        return logits_B1V[:, 0]


@contextmanager
def decoding(model: Decoder, max_length: int) -> Iterator[Decoding]:
    """Let the model keep keys and values; it is what it was before when this ends. For a whole model in one process.

    Args:
        max_length: of prompt and generated tokens together, for every sequence.
    """
    batch, was_training = Decoding(model, max_length), model.training
    attentions = [block.attention for block in model.blocks()]
    before = [attention.attend for attention in attentions]
    for attention in attentions:
        attention.attend = _KeepingAttend(attention.attend, attention.spec, batch)
    model.eval()
    try:
        yield batch
    finally:
        model.train(was_training)
        for attention, attend in zip(attentions, before, strict=True):
            attention.attend = attend


class _KeepingAttend:
    """`attend` of one layer, with what it keeps."""

    def __init__(self, attend: Attend, spec: GroupedQuery | Latent, batch: Decoding) -> None:
        self.attend, self.batch = attend, batch
        window, self.chunk = (spec.window, spec.chunk) if isinstance(spec, GroupedQuery) else (None, None)
        self.num_slots = min(batch.max_length, window or batch.max_length, self.chunk or batch.max_length)
        self.k_BKCH = self.v_BKCH = torch.empty(0)

    def __call__(
        self,
        q_BSNH: Tensor,
        k_BSKH: Tensor,
        v_BSKV: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        scale: float | None = None,
        sinks_N: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `causal_attention`."""
        if self.batch.is_prefill:
            self.k_BKCH, self.v_BKCH = self._kept(k_BSKH, v_BSKV), self._kept(v_BSKV, k_BSKH)
            return self.attend(q_BSNH, k_BSKH, v_BSKV, cu_seqlens, scale=scale, sinks_N=sinks_N, **options)
        self._add(self.k_BKCH, k_BSKH)
        self._add(self.v_BKCH, v_BSKV)
        num_seen = [self._num_seen(length) for length in self.batch.lengths]
        end = max(num_seen)
        k_BKCH, v_BKCH, mask_BC = self.k_BKCH[:, :, :end], self.v_BKCH[:, :, :end], None
        if min(num_seen) < end:
            is_hidden_BC = torch.arange(end, device=q_BSNH.device) >= self._num_seen(self.batch.lengths_B + 1)[:, None]
            mask_BC = torch.zeros(is_hidden_BC.shape, device=q_BSNH.device).masked_fill_(is_hidden_BC, float("-inf"))
        scale = q_BSNH.shape[-1] ** -0.5 if scale is None else scale
        q_BNH = F.pad(q_BSNH[:, 0], (0, k_BKCH.shape[-1] - q_BSNH.shape[-1]))
        o_BNH = cached_attention(q_BNH, k_BKCH, v_BKCH, scale, mask_BC, sinks_N)
        return o_BNH[:, None, :, : v_BSKV.shape[-1]]

    def _num_seen(self, length: Any) -> Any:
        """How many slots, from the first on, hold what the last of `length` tokens sees: a number, or a tensor."""
        if self.chunk is not None:
            return (length - 1) % self.num_slots + 1
        return length.clamp(max=self.num_slots) if isinstance(length, Tensor) else min(length, self.num_slots)

    def _kept(self, x_BSKH: Tensor, other: Tensor) -> Tensor:
        """Memory for keys or values, with the prompts' in place.

        Keys and values get equal numbers of channels, the additional ones zero, as the kernels want it.
        """
        batch, seq_len, num_heads, head_dim = x_BSKH.shape
        widest = max(head_dim, other.shape[-1])
        kept_BKCH = x_BSKH.new_zeros(batch, num_heads, self.num_slots, widest)
        if seq_len > self.num_slots:
            last_B1 = self.batch.lengths_B[:, None] - 1
            slot_C = torch.arange(self.num_slots, device=x_BSKH.device)
            position_BC = (last_B1 - (last_B1 - slot_C) % self.num_slots).clamp(min=0)  # the last one in each slot
            x_BSKH = x_BSKH.take_along_dim(position_BC[:, :, None, None], dim=1)
        kept_BKCH[:, :, : x_BSKH.shape[1], :head_dim] = x_BSKH.transpose(1, 2)
        return kept_BKCH

    def _add(self, kept_BKCH: Tensor, x_B1KH: Tensor) -> None:
        """Put each row's new token into its slot."""
        slots, head_dim = {(length - 1) % self.num_slots for length in self.batch.lengths}, x_B1KH.shape[-1]
        if len(slots) == 1:
            kept_BKCH[:, :, slots.pop(), :head_dim] = x_B1KH[:, 0]
        else:
            row_B = torch.arange(len(self.batch.lengths), device=x_B1KH.device)
            kept_BKCH[row_B, :, self.batch.lengths_B % self.num_slots, :head_dim] = x_B1KH[:, 0]
