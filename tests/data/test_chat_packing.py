"""Conversations in sequences: whole, kept apart, supervised in part, and resumed exactly."""

from __future__ import annotations

import logging
import random
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.common import TOKENIZER, make_loader
from tests.data.test_loader import assert_equal, join, rows_of
from titanmoe.config.errors import ConfigError
from titanmoe.data.chat_source import ChatSource
from titanmoe.data.chat_template import load_chat_template
from titanmoe.data.lanes import count_windows
from titanmoe.data.loader import DataLoader, merge_states
from titanmoe.data.order import DocumentOrder
from titanmoe.data.packing import IGNORED

SEQ_LEN = 64
IM_END = TOKENIZER.encode("<|im_end|>")[0]


class ListRows:
    """Conversations from a list."""

    fingerprint = "list"

    def __init__(self, talks: list[list[dict[str, str]]]) -> None:
        self.talks = talks

    def __len__(self) -> int:
        return len(self.talks)

    def __getitem__(self, index: int) -> Any:
        return self.talks[index]

    def where(self, index: int) -> str:
        return f"talk {index}"


def random_talks(number: int, seed: int = 0, longest: int = 60) -> list[list[dict[str, str]]]:
    """Conversations of one or two turns; some are too long for SEQ_LEN."""
    generator = random.Random(seed)

    def text(who: str) -> str:
        return f"{who}{len(talks)}:" + "".join(generator.choices("abc xyz\n", k=generator.choice([1, 5, 20, longest])))

    talks: list[list[dict[str, str]]] = []
    for _ in range(number):
        talk = []
        for _ in range(generator.choice([1, 1, 2])):
            talk += [{"role": "user", "content": text("q")}, {"role": "assistant", "content": text("a")}]
        talks.append(talk)
    return talks


def make_source(talks: list[list[dict[str, str]]], assistant_only: bool = True) -> ChatSource:
    return ChatSource(ListRows(talks), load_chat_template(TOKENIZER), assistant_only)


def make(source: ChatSource, lanes: range = range(4), num_lanes: int = 4, **changes: Any) -> DataLoader:
    return make_loader(source, lanes, num_lanes, **{"seq_len": SEQ_LEN, "whole_documents": True, **changes})


def encode(talk: list[dict[str, str]], assistant_only: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation, message by message: special tokens cut the text for the tokenizer."""
    tokens, labels = [], []
    for message in talk:
        head = TOKENIZER.encode(f"<|im_start|>{message['role']}\n")
        body, tail = [*TOKENIZER.encode(message["content"]), IM_END], TOKENIZER.encode("\n")
        tokens += head + body + tail
        learnt = message["role"] == "assistant"
        labels += [IGNORED] * len(head) + (body if learnt else [IGNORED] * len(body)) + [IGNORED] * len(tail)
    return tokens, labels if assistant_only else tokens


Row = tuple[list[int], list[int], list[int], list[int]]


def naive_rows(talks: list, lane: int, num_lanes: int, num_documents: int, assistant_only: bool) -> list[Row]:
    """(tokens, labels, positions, borders) of each window of a lane, conversation by conversation."""
    order = DocumentOrder(len(talks), seed=3, shuffle=True)
    windows: list[list[tuple[list[int], list[int]]]] = []
    for document in range(lane, num_documents, num_lanes):
        encoded = encode(talks[order(document)], assistant_only)
        if len(encoded[0]) > SEQ_LEN + 1:
            continue
        if not windows or sum(len(tokens) for tokens, _ in [*windows[-1], encoded]) > SEQ_LEN + 1:
            windows.append([])
        windows[-1].append(encoded)
    rows = []
    for window in windows:
        tokens, labels, positions, borders = [], [], [], []
        for ids, targets in window:
            borders.append(len(tokens))
            tokens += ids
            labels += [*targets[1:], IGNORED]
            positions += range(len(ids))
        missing = SEQ_LEN - len(tokens)
        if missing > 0:
            borders.append(len(tokens))
        tokens += [TOKENIZER.pad_id] * missing
        labels += [IGNORED] * missing
        positions += range(missing)
        rows.append((tokens[:SEQ_LEN], labels[:SEQ_LEN], positions[:SEQ_LEN], borders))
    return rows


@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize("number", [3, 50])
def test_windows_against_a_naive_packer(number: int, assistant_only: bool) -> None:
    talks = random_talks(number)
    loader = make(make_source(talks, assistant_only), epochs=2, local_batch_size=4)
    expected = [naive_rows(talks, lane, 4, 2 * number, assistant_only) for lane in range(4)]
    num_steps = max(map(len, expected))
    assert loader.count_steps() == num_steps > 0
    for step in range(num_steps):
        assert not loader.exhausted
        batch = next(loader)
        borders = []
        for lane, row in enumerate(rows_of(batch)):
            if step < len(expected[lane]):
                assert row == expected[lane][step][:3]
                borders += [lane * SEQ_LEN + border for border in expected[lane][step][3]]
            else:
                assert row[:2] == ([TOKENIZER.pad_id] * SEQ_LEN, [IGNORED] * SEQ_LEN)
                borders.append(lane * SEQ_LEN)
        assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [*borders, 4 * SEQ_LEN]
    assert loader.exhausted and (next(loader).labels_BS == IGNORED).all()


def test_windows_are_counted_as_they_are_cut() -> None:
    assert count_windows([33, 32, 65, 0, 2, 63, 1], SEQ_LEN, whole=True) == 4
    assert count_windows([], SEQ_LEN, whole=True) == 0


def test_every_answer_is_learnt_once_an_epoch() -> None:
    talks = random_talks(60, longest=10)
    loader = make(make_source(talks), epochs=1, seq_len=200)
    learnt = []
    while not loader.exhausted:
        labels = next(loader).labels_BS
        learnt += TOKENIZER.decode(labels[labels != IGNORED].tolist()).split("<|im_end|>")[:-1]
    assert sorted(learnt) == sorted(message["content"] for talk in talks for message in talk[1::2])


def test_one_that_just_fits_and_one_that_does_not(caplog: pytest.LogCaptureFixture) -> None:
    def talk(length: int) -> list[dict[str, str]]:
        talks = ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "1" * n}] for n in range(99))
        return next(talk for talk in talks if len(encode(talk, True)[0]) == length)

    def first(lengths: list[int]) -> Tensor:
        loader = make(make_source([talk(length) for length in lengths]), range(1), 1, local_batch_size=1, epochs=1)
        labels_S = next(loader).labels_BS[0]
        loader.close()
        return labels_S

    with caplog.at_level(logging.WARNING, logger="titanmoe"):
        labels_S = first([SEQ_LEN + 1])
        # the last token, a line end, is only to be predicted, and not even learnt
        assert labels_S[-2] == IM_END and labels_S[-1] == IGNORED and not caplog.text
        assert (first([SEQ_LEN + 2, 20]) != IGNORED).sum() > 0
    assert caplog.text.count("left out so far: 1 of 2 documents, of more than seq_len + 1 = 65 tokens") == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_nothing_but_conversations_that_are_too_long(prefetch: int) -> None:
    talks = [[{"role": "user", "content": "q " * 99}, {"role": "assistant", "content": "a"}]] * 3
    loader = make(make_source(talks), prefetch=prefetch)
    with pytest.raises(ConfigError, match="all documents are too long") as caught:
        next(loader)
    assert "seq_len" in caught.value.mend
    loader.close()
    ending = make(make_source(talks), epochs=1)
    assert ending.count_steps() == 0 and (next(ending).labels_BS == IGNORED).all() and ending.exhausted


@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_together_give_the_batch_of_one_rank(num_ranks: int, epochs: float | None) -> None:
    whole = make(make_source(random_talks(60)), range(8), 8, local_batch_size=8, epochs=epochs)
    size = 8 // num_ranks
    lanes = [range(rank * size, (rank + 1) * size) for rank in range(num_ranks)]
    parts = [make(make_source(random_talks(60)), part, 8, local_batch_size=size // 2, epochs=epochs) for part in lanes]
    for _ in range(6):
        assert_equal([next(whole)], [join([next(part) for part in parts for _ in range(2)])])


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumed_gives_the_same_batches(stop: int, prefetch: int) -> None:
    reference = list(islice(make(make_source(random_talks(30)), local_batch_size=4), 25))
    loader = make(make_source(random_talks(30)), local_batch_size=4, prefetch=prefetch)
    assert_equal(list(islice(loader, stop)), reference[:stop])
    state = loader.state_dict()
    assert all(offset == 0 for _, offset in state["lanes"].values())
    other = make(make_source(random_talks(30)), local_batch_size=4, prefetch=prefetch)
    next(other)
    other.load_state_dict(state)
    assert_equal(list(islice(other, 25 - stop)), reference[stop:])
    loader.close()
    other.close()


@pytest.mark.parametrize(("old_size", "new_size"), [(2, 8), (8, 2), (4, 4)])
def test_resumed_on_another_number_of_ranks(old_size: int, new_size: int) -> None:
    def ranks(size: int) -> list[DataLoader]:
        lanes = [range(first, first + size) for first in range(0, 8, size)]
        return [make(make_source(random_talks(40)), part, 8) for part in lanes]

    def global_batch(loaders: list[DataLoader], size: int) -> Any:
        return join([next(loader) for loader in loaders for _ in range(size // 2)])

    reference, old, new = (
        make(make_source(random_talks(40)), range(8), 8, local_batch_size=8),
        ranks(old_size),
        ranks(new_size),
    )
    for _ in range(5):
        assert_equal([next(reference)], [global_batch(old, old_size)])
    merged = merge_states([loader.state_dict() for loader in reversed(old)])
    assert merged == reference.state_dict()
    for loader in new:
        loader.load_state_dict(merged)
    for _ in range(5):
        assert_equal([next(reference)], [global_batch(new, new_size)])


def test_another_part_of_the_conversation_to_learn_is_other_data() -> None:
    state = make(make_source(random_talks(5))).state_dict()
    with pytest.raises(ConfigError, match="data set changed") as caught:
        make(make_source(random_talks(5), assistant_only=False)).load_state_dict(state)
    assert "template" in caught.value.mend


def test_validation_can_be_repeated() -> None:
    loader = make(make_source(random_talks(30)), epochs=1, shuffle=False, local_batch_size=4)
    rounds = []
    for _ in range(2):
        loader.reset()
        batches = []
        while not loader.exhausted:
            batches.append(next(loader))
        rounds.append(batches)
    assert len(rounds[0]) == loader.count_steps() > 1
    assert_equal(*rounds)


def test_parts_of_sequences_join_to_the_whole() -> None:
    source = make_source(random_talks(20))
    whole = next(make(source))
    parts = [next(make(source, part=(index, 2))) for index in range(2)]
    for name in ("tokens_BS", "labels_BS", "position_ids_BS"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))
