"""Lanes: the streams of tokens that a run's data is dealt to, and the windows cut from them.

Document d of the endless document sequence (see `order`) goes to lane d % num_lanes. A lane strings the tokens of its
documents together and cuts windows of seq_len + 1 tokens with stride seq_len, so that each token but the first is
predicted once. There are as many lanes as sequences in a global batch, however many ranks share them: what lane 3 gives
depends neither on the other lanes nor on the rank that reads it.

With whole documents, as conversations are, a window is instead as many of the lane's next documents as fit into
seq_len + 1 tokens (the last of them is only predicted). One that does not fit alone is left out, as is one of a single
token, from which nothing is predicted.

Where a lane stands is two integers: the next window begins at token `offset` of the lane's document number `document`.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from titanmoe.config.errors import ConfigError
from titanmoe.data.encoding import NOTHING, Encoded, encode_documents
from titanmoe.data.order import DocumentOrder
from titanmoe.data.packing import Window
from titanmoe.data.sources import Document, DocumentSource
from titanmoe.data.tokenizer import Tokenizer

logger = logging.getLogger("titanmoe.data")

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
    documents: deque[tuple[int, Encoded]] = field(default_factory=deque)  # with their numbers, if not wholly cut


class Lanes:
    """Cuts the windows of the lanes in `lanes`, out of `num_lanes` in all.

    Args:
        num_documents: where the document sequence ends; None if it never does.
        append_eos: end each document with the tokenizer's eos.
        whole_within: keep documents whole, in windows of this many tokens at most. None: cut them anywhere.
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
        whole_within: int | None = None,
    ) -> None:
        self._source, self._tokenizer, self._order = source, tokenizer, order
        self._num_lanes, self._num_documents = num_lanes, num_documents
        self._append_eos, self._whole_within = append_eos, whole_within
        self._left_out: set[int] = set()  # documents that are too long, as indices into the source
        self._num_logged = 0
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
        if self._whole_within is not None:
            assert self._whole_within == seq_len + 1
            if not self._num_logged:
                self.log_left_out()
            return [_cut_whole(self._lanes[number], seq_len + 1) for number in numbers]
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
            encoded = self.encode([index for _, _, index, _ in portion], [text for _, _, _, text in portion])
            for (lane, document, _, _), tokens in zip(portion, encoded, strict=True):
                lane.documents.append((document, tokens))
                lane.num_ready += len(tokens)
                lane.num_empty = 0 if len(tokens) else lane.num_empty + 1
            for number in numbers:
                if self._num_documents is None and self._lanes[number].num_empty >= len(self._source):
                    self._refuse_if_endless(number)

    def encode(self, indices: Sequence[int], documents: Sequence[Document]) -> list[Encoded]:
        """The documents at these indices of the source as tokens; none for one that is empty or left out."""
        encoded = encode_documents(self._tokenizer, documents, self._append_eos)
        if self._whole_within is None:
            return encoded
        self._left_out.update(
            index for index, tokens in zip(indices, encoded, strict=True) if len(tokens) > self._whole_within
        )
        return [tokens if 2 <= len(tokens) <= self._whole_within else NOTHING for tokens in encoded]

    def log_left_out(self) -> None:
        """Say how many documents were too long, if there were more than at the last time."""
        if len(self._left_out) > self._num_logged:
            self._num_logged = len(self._left_out)
            logger.warning(
                "left out so far: %d of %d documents, of more than seq_len + 1 = %s tokens",
                self._num_logged,
                len(self._source),
                self._whole_within,
            )

    def _read(self, number: int, num_tokens: int) -> Iterator[tuple[_Lane, int, int, Document]]:
        """Next documents of a lane, with their numbers and indices, that probably have the tokens it lacks."""
        lane = self._lanes[number]
        characters = CHARACTERS_PER_TOKEN * (num_tokens - lane.num_ready)
        while characters > 0 and not lane.ended:
            document, global_document = lane.next_document, number + lane.next_document * self._num_lanes
            if self._num_documents is not None and global_document >= self._num_documents:
                lane.ended = True
                return
            index = self._order(global_document)
            text = self._source[index]
            lane.next_document += 1
            characters -= len(text) + 1
            yield lane, document, index, text

    def _refuse_if_endless(self, number: int) -> None:
        """Raise ConfigError if a lane that met nothing but empty documents for a whole epoch will meet nothing else."""
        if self._order.shuffle:
            indices = range(len(self._source))
        else:  # an unshuffled lane comes by the same documents in every epoch
            stride = math.gcd(self._num_lanes, len(self._source))
            indices = range(number % stride, len(self._source), stride)
        if not any(len(self.encode([index], [self._source[index]])[0]) for index in indices):
            too_long = bool(self._left_out)
            raise ConfigError(
                "too few tokens for one batch: all documents are " + ("too long" if too_long else "empty"),
                where="data set",
                mend="Raise seq_len." if too_long else "Give documents that hold text.",
            )


def _cut(lane: _Lane, seq_len: int) -> Window:
    num_tokens = min(lane.num_ready, seq_len + 1)
    if num_tokens < 2:  # a single token is the last label of the window before
        return Window(np.zeros(0, dtype=np.int32), ())
    pieces: list[Encoded] = []
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
    return _window(pieces, starts)


def _cut_whole(lane: _Lane, max_tokens: int) -> Window:
    pieces: list[Encoded] = []
    starts: list[int] = []
    num_tokens = 0
    while lane.documents and num_tokens + len(lane.documents[0][1]) <= max_tokens:
        _, document = lane.documents.popleft()
        if len(document):
            pieces.append(document)
            starts.append(num_tokens)
            num_tokens += len(document)
    lane.num_ready -= num_tokens
    lane.document = lane.documents[0][0] if lane.documents else lane.next_document
    return _window([NOTHING, *pieces], starts)


def _window(pieces: Sequence[Encoded], starts: Sequence[int]) -> Window:
    tokens = np.concatenate([piece.tokens for piece in pieces])
    return Window(tokens, starts, np.concatenate([piece.labels for piece in pieces]))


def count_windows(lengths: Iterable[int], seq_len: int, whole: bool) -> int:
    """Windows that a lane is cut into which has documents of these numbers of tokens, and no others."""
    if not whole:
        return -(-max(sum(lengths) - 1, 0) // seq_len)
    number, room = 0, 0
    for length in lengths:
        if length > room:
            number, room = number + 1, seq_len + 1
        room -= length
    return number
