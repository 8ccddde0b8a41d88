"""Lanes: the streams of tokens that a run's data is dealt to, and the windows cut from them.

Document d of the endless document sequence (see `order`) goes to lane d % num_lanes. A lane strings the tokens of its
documents together and cuts windows of seq_len + 1 tokens with stride seq_len, so that each token but the first is
predicted once. There are as many lanes as sequences in a global batch, however many ranks share them: what lane 3 gives
depends neither on the other lanes nor on the rank that reads it.

Where a lane stands is two integers: the next window begins at token `offset` of the lane's document number `document`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from titanmoe.config.errors import ConfigError
from titanmoe.data.order import DocumentOrder
from titanmoe.data.packing import Window
from titanmoe.data.sources import DocumentSource
from titanmoe.data.tokenizer import Tokenizer

# Documents are read in portions that are likely to give the tokens wanted. An error costs a little time only.
CHARACTERS_PER_TOKEN = 3

Position = tuple[int, int]  # (document, offset)


@dataclass
class _Lane:
    document: int = 0
    offset: int = 0
    next_document: int = 0  # the first one not read yet
    num_ready: int = 0  # tokens encoded and not yet cut; -offset until the first document of a restored lane is read
    num_empty: int = 0  # documents without tokens since the last one with any
    ended: bool = False
    documents: deque[tuple[int, np.ndarray]] = field(default_factory=deque)  # number and tokens, if not wholly cut


class Lanes:
    """Cuts the windows of the lanes in `lanes`, out of `num_lanes` in all.

    Args:
        num_documents: where the document sequence ends; None if it never does.
        append_eos: end each document with the tokenizer's eos.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        order: DocumentOrder,
        lanes: Sequence[int],
        num_lanes: int,
        num_documents: int | None,
        append_eos: bool,
    ) -> None:
        self._source, self._tokenizer, self._order = source, tokenizer, order
        self._num_lanes, self._num_documents = num_lanes, num_documents
        self._append_eos = append_eos
        self._lanes = {number: _Lane() for number in lanes}

    def positions(self) -> dict[int, Position]:
        """Where each lane stands."""
        return {number: (lane.document, lane.offset) for number, lane in self._lanes.items()}

    def restore(self, positions: Mapping[int, Position]) -> None:
        """Go to where `positions` says; the documents there are read and encoded again."""
        for number in self._lanes:
            document, offset = positions[number]
            self._lanes[number] = _Lane(document, offset, next_document=document, num_ready=-offset)

    def cut(self, numbers: Sequence[int], seq_len: int) -> list[Window]:
        """The next window of each of these lanes; an empty one where nothing is left to predict."""
        self._fill(numbers, seq_len + 1)
        return [_cut(self._lanes[number], seq_len) for number in numbers]

    def exhausted(self) -> bool:
        """Whether only empty windows are left in all of these lanes."""
        if self._num_documents is None:
            return False
        self._fill(list(self._lanes), 2)
        return all(lane.num_ready < 2 for lane in self._lanes.values())

    def _fill(self, numbers: Sequence[int], num_tokens: int) -> None:
        """Read and encode documents until each lane has `num_tokens` ready or has ended."""
        while True:
            portion = [item for number in numbers for item in self._read(number, num_tokens)]
            if not portion:
                return
            encoded = encode_documents(self._tokenizer, [text for _, _, text in portion], self._append_eos)
            for (lane, document, _), tokens in zip(portion, encoded, strict=True):
                lane.documents.append((document, tokens))
                lane.num_ready += len(tokens)
                lane.num_empty = 0 if len(tokens) else lane.num_empty + 1
            for number in numbers:
                if self._num_documents is None and self._lanes[number].num_empty >= len(self._source):
                    self._refuse_if_endless(number)

    def _read(self, number: int, num_tokens: int) -> Iterator[tuple[_Lane, int, str]]:
        """Next documents of a lane, with their numbers, that probably have the tokens it lacks."""
        lane = self._lanes[number]
        characters = CHARACTERS_PER_TOKEN * (num_tokens - lane.num_ready)
        while characters > 0 and not lane.ended:
            document, global_document = lane.next_document, number + lane.next_document * self._num_lanes
            if self._num_documents is not None and global_document >= self._num_documents:
                lane.ended = True
                return
            text = self._source[self._order(global_document)]
            lane.next_document += 1
            characters -= len(text) + 1
            yield lane, document, text

    def _refuse_if_endless(self, number: int) -> None:
        """Raise ConfigError if a lane that met nothing but empty documents for a whole epoch will meet nothing else."""
        if self._order.shuffle:
            indices = range(len(self._source))
        else:  # an unshuffled lane comes by the same documents in every epoch
            stride = math.gcd(self._num_lanes, len(self._source))
            indices = range(number % stride, len(self._source), stride)
        if not any(self._tokenizer.encode(self._source[index]) for index in indices):
            raise ConfigError(
                "too few tokens for one batch: all documents are empty",
                where="data set",
                mend="Give documents that hold text.",
            )


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], append_eos: bool) -> list[np.ndarray]:
    """The int32 tokens of each document, with eos, and with bos if the tokenizer adds it; none if it is empty."""
    before = [tokenizer.bos_id] if tokenizer.adds_bos else []
    after = [tokenizer.eos_id] if append_eos else []
    encoded = tokenizer.encode_batch(texts)
    return [np.array([*before, *ids, *after] if ids else [], dtype=np.int32) for ids in encoded]


def _cut(lane: _Lane, seq_len: int) -> Window:
    num_tokens = min(lane.num_ready, seq_len + 1)
    if num_tokens < 2:  # a single token is the last label of the window before
        return Window(np.zeros(0, dtype=np.int32), ())
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    wanted = num_tokens
    offset = lane.offset
    for _, tokens in lane.documents:
        if offset == 0 and len(tokens):
            starts.append(num_tokens - wanted)
        piece = tokens[offset : offset + wanted]
        pieces.append(piece)
        wanted -= len(piece)
        offset = 0
        if wanted == 0:
            break
    lane.num_ready -= min(num_tokens, seq_len)
    lane.offset += min(num_tokens, seq_len)
    while lane.documents and lane.offset >= len(lane.documents[0][1]):
        lane.offset -= len(lane.documents.popleft()[1])
    lane.document = lane.documents[0][0] if lane.documents else lane.next_document
    return Window(np.concatenate(pieces), starts)
