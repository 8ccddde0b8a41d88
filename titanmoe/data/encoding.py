"""From documents to tokens, each with its label: the token itself, or -100 where it is not supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titanmoe.data.packing import IGNORED
from titanmoe.data.sources import Document, Rendered
from titanmoe.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """The int32 tokens of a document and, of the same length, what is to be predicted in their places."""

    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, places: slice) -> Encoded:
        return Encoded(self.tokens[places], self.labels[places])


NOTHING = Encoded(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], append_eos: bool) -> list[Encoded]:
    """Text gets eos, and bos if the tokenizer adds it; nothing is added to an empty one, or to what was rendered."""
    rendered = [document for document in documents if isinstance(document, Rendered)]
    texts = [document for document in documents if isinstance(document, str)]
    assert not rendered or not texts, "a source has documents of one kind"
    if rendered:
        encodings = tokenizer.encode_batch_with_offsets([document.text for document in rendered])
        return [
            _label(np.array(ids, dtype=np.int32), offsets, document.supervised)
            for (ids, offsets), document in zip(encodings, rendered, strict=True)
        ]
    before = [tokenizer.bos_id] if tokenizer.adds_bos else []
    after = [tokenizer.eos_id] if append_eos else []
    all_tokens = [np.array([*before, *ids, *after] if ids else [], np.int32) for ids in tokenizer.encode_batch(texts)]
    return [Encoded(tokens, tokens) for tokens in all_tokens]


def _label(tokens: np.ndarray, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Encoded:
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(tokens), dtype=bool)
    for begin, end in spans:
        # A token of several characters belongs to a span if one of them does. Some tokenizers cut the spaces off a
        # token's range: one of nothing but spaces is then empty, and stands behind them.
        supervised |= (ends > begin) & np.where(begins < ends, begins < end, ends <= end)
    return Encoded(tokens, np.where(supervised, tokens, np.int32(IGNORED)))
