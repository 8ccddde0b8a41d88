"""From a window of tokens to the row of a batch: inputs, shifted labels, positions and document boundaries.

Shape suffixes: B rows, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of a position that is not supervised


@dataclass(frozen=True)
class Batch:
    """One microbatch, on CPU when it leaves the loader.

    Attributes:
        tokens_BS: int64, the inputs.
        labels_BS: int64, labels_BS[b, s] is the token to predict at position s, already shifted; -100 where there is
            none: after the end of the data, with document masks from one document into the next, and where a document
            is not supervised.
        position_ids_BS: int64, counts from 0 in each row or, with document masks, in each segment.
        cu_seqlens: int32, or None without document masks: the borders of the segments among the B * S tokens, from
            0 to B * S. A row begins a segment; no segment is longer than S.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    cu_seqlens: Tensor | None

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which `to(device, non_blocking=True)` does not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def part(self, index: int, count: int) -> Batch:
        """The `index`-th of `count` parts of every sequence, of equal length; `cu_seqlens` stays that of the whole."""
        assert self.tokens_BS.shape[1] % count == 0, "validated"
        tokens, labels, positions = (
            tensor.chunk(count, dim=1)[index] for tensor in (self.tokens_BS, self.labels_BS, self.position_ids_BS)
        )
        return Batch(tokens, labels, positions, self.cu_seqlens)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        boundaries = None if self.cu_seqlens is None else function(self.cu_seqlens)
        return Batch(function(self.tokens_BS), function(self.labels_BS), function(self.position_ids_BS), boundaries)


@dataclass(frozen=True)
class Window:
    """Up to S + 1 tokens of a lane in sequence; none where its data has ended.

    Attributes:
        tokens: int32.
        starts: where in `tokens` documents begin (their continuation from an earlier window does not count).
        labels: what is to be predicted in the place of each token: the token, or -100. None: all tokens.
    """

    tokens: np.ndarray
    starts: Sequence[int]
    labels: np.ndarray | None = None


def pack(windows: Sequence[Window], seq_len: int, pad_id: int, document_mask: bool) -> Batch:
    """Make each window a row: its tokens but the last are the inputs, its tokens but the first the labels.

    Rows are filled up with `pad_id` and label -100. With `document_mask` a document, the continuation of one from an
    earlier window, and the padding are segments: positions count from 0 in each, attention does not leave it, and the
    first token of a document is not predicted from the document before.
    """
    shape = (len(windows), seq_len)
    tokens_BS = np.full(shape, pad_id, dtype=np.int64)
    labels_BS = np.full(shape, IGNORED, dtype=np.int64)
    positions_BS = np.tile(np.arange(seq_len, dtype=np.int64), (len(windows), 1))
    boundaries: list[int] = []
    for row, window in enumerate(windows):
        num_tokens = len(window.tokens)
        assert num_tokens <= seq_len + 1
        tokens_BS[row, : min(num_tokens, seq_len)] = window.tokens[:seq_len]
        labels = window.tokens if window.labels is None else window.labels
        labels_BS[row, : max(num_tokens - 1, 0)] = labels[1:]
        if document_mask:
            inner = [start for start in window.starts if start > 0]
            labels_BS[row, [start - 1 for start in inner]] = IGNORED
            segments = [0, *(start for start in (*inner, num_tokens) if 0 < start < seq_len)]
            lengths = np.diff([*segments, seq_len])
            positions_BS[row] -= np.repeat(segments, lengths)
            boundaries += [row * seq_len + start for start in segments]
    cu_seqlens = torch.tensor([*boundaries, len(windows) * seq_len], dtype=torch.int32) if document_mask else None
    return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(labels_BS), torch.from_numpy(positions_BS), cu_seqlens)
