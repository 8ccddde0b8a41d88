"""The loader: microbatches of a rank's lanes, prepared ahead, with a state that any number of ranks resumes from.

Global batch n is the n-th window of every lane. A rank owns a range of lanes and hands out its part of a global batch
in len(lanes) / local_batch_size microbatches, so the data of step n depends neither on the number of ranks nor on
gradient accumulation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from titanmoe.config.errors import ConfigError
from titanmoe.data.lanes import Lanes, Position, count_windows
from titanmoe.data.order import DocumentOrder
from titanmoe.data.packing import Batch, pack
from titanmoe.data.prefetch import Prefetcher
from titanmoe.data.sources import Document, DocumentSource
from titanmoe.data.tokenizer import Tokenizer

logger = logging.getLogger("titanmoe.data")

STATE_VERSION = 1
LOG_SECONDS = 10.0
CHARACTERS_PER_COUNT = 1 << 20  # encoded at a time by count_steps

# What must not change between saving and resuming: the name in the state, what it is, how to mend it.
_IDENTITY = {
    "version": ("the format of the data state", "Resume with the version of titanmoe that saved it."),
    "source": (
        "the data set",
        "Give the files it was saved with (training.dataset, training.dataset_path; for chat, also the template).",
    ),
    "tokenizer": ("the tokenizer", "Give the same tokenizer (model.tokenizer_path, model.hf_assets_path)."),
    "seed": ("the seed of the data order", "Set debug.seed to what it was."),
    "shuffle": ("data.shuffle", "Set it to what it was."),
    "append_eos": ("data.append_eos", "Set it to what it was."),
    "num_lanes": ("the global batch size", "Set training.global_batch_size to what it was; it may not change."),
    "seq_len": ("training.seq_len", "Set it to what it was."),
}


class DataLoader:
    """An endless iterator of microbatches over the lanes of one data rank.

    Args:
        lanes: this rank's lanes, a part of range(num_lanes); a multiple of local_batch_size in number.
        num_lanes: sequences in a global batch.
        seed: chooses the permutation of the documents in each epoch; without `shuffle` they come in the source's order.
        epochs: how often each document comes (a fraction ends within an epoch). A lane whose documents are used up
            gives rows of padding with label -100 from then on, as long as it is asked. None: endless.
        document_mask, append_eos: see `pack` and `Lanes`.
        whole_documents: put documents into sequences whole and keep them apart, as conversations want it; one longer
            than seq_len + 1 tokens is left out, and how many were is logged. Implies document_mask.
        part: (index, count), where several ranks compute equal parts of the same sequences.
        prefetch: microbatches that a background thread prepares ahead; 0 makes them when they are asked for.

    Raises:
        ConfigError: the source has no documents, or epochs are too few for one document; while iterating, a document
            that cannot be read, or nothing but empty ones.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        lanes: range,
        num_lanes: int,
        local_batch_size: int,
        seed: int,
        shuffle: bool,
        epochs: float | None = None,
        document_mask: bool = False,
        append_eos: bool = True,
        whole_documents: bool = False,
        prefetch: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        assert lanes and lanes.step == 1 and lanes.start >= 0 and lanes.stop <= num_lanes, (lanes, num_lanes)
        assert len(lanes) % local_batch_size == 0, (lanes, local_batch_size)
        if len(source) == 0:
            raise ConfigError("the data set holds no documents", where="data set", mend="Give files that hold text.")
        num_documents = None if epochs is None else round(epochs * len(source))
        if num_documents == 0:
            raise ConfigError(
                f"{epochs} epochs of {len(source)} documents are not one document",
                where="training.epochs",
                mend=f"Give at least 1/{len(source)}.",
            )
        if epochs is None and len(source) < num_lanes:
            logger.warning(
                "%d document(s) for a global batch of %d sequences: a batch will repeat documents",
                len(source),
                num_lanes,
            )
        self._source, self._tokenizer = source, tokenizer
        self._order = DocumentOrder(len(source), seed, shuffle)
        self._lane_numbers, self._num_lanes = lanes, num_lanes
        self._num_documents = num_documents
        self._seq_len, self._local_batch_size = seq_len, local_batch_size
        self._document_mask, self._whole = document_mask or whole_documents, whole_documents
        self._prefetch = prefetch
        self._part = part
        self._identity = {
            "version": STATE_VERSION,
            "source": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "shuffle": shuffle,
            "append_eos": append_eos,
            "num_lanes": num_lanes,
            "seq_len": seq_len,
        }
        within = seq_len + 1 if whole_documents else None
        self._lanes = Lanes(source, tokenizer, self._order, lanes, num_lanes, num_documents, append_eos, within)
        self._prefetcher: Prefetcher[tuple[Batch, dict[int, Position], bool]] | None = None
        self._next_row = 0  # of the microbatch to make next, among this rank's lanes
        self._positions = self._lanes.positions()  # after the batches handed out, whatever was prepared ahead
        self._exhausted = False
        self._num_given = 0  # microbatches of the current global batch handed out

    def __iter__(self) -> Iterator[Batch]:
        """The loader itself: iterating goes on where the last batch ended."""
        return self

    def __next__(self) -> Batch:
        if self._prefetch and self._prefetcher is None:
            self._prefetcher = Prefetcher(self._make, self._prefetch)
        try:
            made = self._prefetcher.get() if self._prefetcher else self._make()
        except BaseException:
            self._rewind()
            raise
        batch, self._positions, self._exhausted = made
        self._num_given = (self._num_given + 1) % (len(self._lane_numbers) // self._local_batch_size)
        return batch

    def _make(self) -> tuple[Batch, dict[int, Position], bool]:
        """The next microbatch, with the lanes' positions after it and whether they are then exhausted."""
        numbers = self._lane_numbers[self._next_row : self._next_row + self._local_batch_size]
        self._next_row = (self._next_row + self._local_batch_size) % len(self._lane_numbers)
        windows = self._lanes.cut(numbers, self._seq_len)
        batch = pack(windows, self._seq_len, self._tokenizer.pad_id, self._document_mask)
        return batch.part(*self._part), self._lanes.positions(), self._lanes.exhausted()

    @property
    def exhausted(self) -> bool:
        """Whether all that follows, in this rank's lanes, is padding. Always False without `epochs`."""
        return self._exhausted

    def count_steps(self) -> int:
        """Global batches after which this rank's lanes are exhausted, from the start: the most windows in a lane.

        A run over `epochs` takes the maximum over its ranks. Reads and encodes each of this rank's documents once.

        Raises:
            ConfigError: a document cannot be read.
        """
        assert self._num_documents is not None, "an endless loader has no last step"
        lengths = self._count_tokens()
        self._lanes.log_left_out()
        lanes = ([int(lengths[index]) for index in self._indices(lane)] for lane in self._lane_numbers)
        return max(count_windows(lane, self._seq_len, self._whole) for lane in lanes)

    def _indices(self, lane: int) -> Iterator[int]:
        """Indices into the source of all documents of a lane."""
        assert self._num_documents is not None
        return (self._order(document) for document in range(lane, self._num_documents, self._num_lanes))

    def _count_tokens(self) -> np.ndarray:
        """Tokens of each document of this rank's lanes, by index into the source; 0 for the others."""
        wanted = np.zeros(len(self._source), dtype=bool)
        for lane in self._lane_numbers:
            for index in self._indices(lane):
                wanted[index] = True
        indices = np.flatnonzero(wanted)
        lengths = np.zeros(len(self._source), dtype=np.int64)
        texts: list[Document] = []
        characters = 0
        logged = time.monotonic()
        for done, found in enumerate(indices, start=1):
            texts.append(self._source[int(found)])
            characters += len(texts[-1])
            if characters >= CHARACTERS_PER_COUNT or done == len(indices):
                places = indices[done - len(texts) : done]
                lengths[places] = [len(tokens) for tokens in self._lanes.encode(places.tolist(), texts)]
                texts, characters = [], 0
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("counting tokens: %d of %d documents", done, len(indices))
        return lengths

    def reset(self) -> None:
        """Go back to the first batch."""
        self._go_to({number: (0, 0) for number in self._lane_numbers})

    def close(self) -> None:
        """End the background thread. What it prepared is made again if iterating goes on."""
        if self._prefetcher is not None:
            self._rewind()
        self._lanes.log_left_out()

    def _rewind(self) -> None:
        """Bring the lanes back to what was handed out."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._lanes.restore(self._positions)
        self._next_row = self._num_given * self._local_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's lanes stand after the batches handed out, as plain JSON values.

        To be taken between global batches; `merge_states` makes one state of those of all ranks.
        """
        assert self._num_given == 0, "the state of the data is taken between global batches"
        lanes = {str(number): list(position) for number, position in self._positions.items()}
        return {**self._identity, "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state`, merged from all ranks, says; this rank takes its own lanes from it.

        Raises:
            ConfigError: the state is broken, or of other data, tokenizer, order, global batch size or sequence length.
        """
        for name, (meaning, mend) in _IDENTITY.items():
            if state.get(name) != self._identity[name]:
                raise ConfigError(
                    f"{meaning} changed: it was {state.get(name)!r} in the checkpoint and is {self._identity[name]!r}",
                    where="data state of the checkpoint",
                    mend=f"{mend} To start on new data, load the model only (checkpoint.initial_load_path).",
                )
        lanes = state.get("lanes")
        positions: dict[int, Position] = {}
        for number in self._lane_numbers:
            position = lanes.get(str(number)) if isinstance(lanes, Mapping) else None
            if not isinstance(position, (list, tuple)) or len(position) != 2 or not all(map(_is_count, position)):
                raise ConfigError(
                    f"lane {number} of {self._num_lanes} stands at {position!r}, which is no position",
                    where="data state of the checkpoint",
                    mend="The checkpoint is damaged: resume from an earlier step (checkpoint.load_step).",
                )
            positions[number] = (position[0], position[1])
        self._go_to(positions)

    def _go_to(self, positions: dict[int, Position]) -> None:
        self.close()
        self._positions, self._num_given, self._exhausted = positions, 0, False
        self._rewind()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all data ranks, in any order; ranks that read the same lanes may both be given.

    Raises:
        ConfigError: the states are of different runs or steps, or lanes are missing.
    """
    assert states
    header = {name: states[0].get(name) for name in _IDENTITY}
    lanes: dict[str, list[int]] = {}
    for state in states:
        differing = [name for name in _IDENTITY if state.get(name) != header[name]]
        differing += [f"lane {lane}" for lane, at in state["lanes"].items() if lanes.get(lane, at) != at]
        if differing:
            raise ConfigError(
                f"the ranks' states differ in {', '.join(differing)}",
                where="data state",
                mend="All ranks must have the same config and files: compare their copies.",
            )
        lanes.update(state["lanes"])
    missing = [lane for lane in range(header["num_lanes"] or 0) if str(lane) not in lanes]
    if missing:
        raise ConfigError(
            f"lanes {missing} are missing from the ranks' states", where="data state", mend="Give those of all ranks."
        )
    return {**header, "lanes": {lane: lanes[lane] for lane in sorted(lanes, key=int)}}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
