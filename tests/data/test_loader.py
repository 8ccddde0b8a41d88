from __future__ import annotations

import json
import logging
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.common import TOKENIZER, ListSource, make_loader, random_source
from titanmoe.config.errors import ConfigError
from titanmoe.data import loader as loader_module
from titanmoe.data.loader import DataLoader, merge_states
from titanmoe.data.order import DocumentOrder
from titanmoe.data.packing import IGNORED, Batch
from titanmoe.data.tokenizer import Tokenizer


def naive_rows(source: ListSource, lane: int, num_lanes: int, seq_len: int, num_documents: int, mask: bool) -> list:
    """(tokens, labels, positions, segment lengths) of each window of a lane whose documents end, token by token."""
    order = DocumentOrder(len(source), seed=3, shuffle=True)
    stream: list[tuple[int, int]] = []  # (token, document)
    for document in range(lane, num_documents, num_lanes):
        text = source.texts[order(document)]
        if text:
            stream += [(token, document) for token in [*TOKENIZER.encode(text), TOKENIZER.eos_id]]
    rows = []
    for begin in range(0, len(stream) - 1, seq_len):
        tokens, labels, positions, segments = [], [], [], []
        for place in range(begin, begin + seq_len):
            here = stream[place] if place < len(stream) else (TOKENIZER.pad_id, -1)
            after = stream[place + 1] if place + 1 < len(stream) else None
            tokens.append(here[0])
            labels.append(IGNORED if after is None or (mask and after[1] != here[1]) else after[0])
            if place == begin or (mask and segments[-1] != here[1]):
                positions.append(0)
            else:
                positions.append(positions[-1] + 1)
            segments.append(here[1])
        borders = [place for place in range(seq_len) if positions[place] == 0]
        rows.append((tokens, labels, positions, borders))
    return rows


def rows_of(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    return list(zip(batch.tokens_BS.tolist(), batch.labels_BS.tolist(), batch.position_ids_BS.tolist(), strict=True))


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        for name in ("tokens_BS", "labels_BS", "position_ids_BS", "cu_seqlens"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b), name


def join(parts: list[Batch]) -> Batch:
    """One batch of the rows of several."""
    boundaries: list[Tensor] = []
    num_tokens = 0
    for part in parts:
        assert part.cu_seqlens is not None
        boundaries.append(part.cu_seqlens[:-1] + num_tokens)
        num_tokens += part.tokens_BS.numel()
    return Batch(
        torch.cat([part.tokens_BS for part in parts]),
        torch.cat([part.labels_BS for part in parts]),
        torch.cat([part.position_ids_BS for part in parts]),
        torch.cat([*boundaries, torch.tensor([num_tokens], dtype=torch.int32)]),
    )


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2, 16, 300])
@pytest.mark.parametrize("num_documents", [3, 40])
def test_windows_against_a_naive_packer(document_mask: bool, seq_len: int, num_documents: int):
    source = random_source(num_documents)
    loader = make_loader(source, epochs=2, seq_len=seq_len, document_mask=document_mask, local_batch_size=4)
    expected = [naive_rows(source, lane, 4, seq_len, 2 * num_documents, document_mask) for lane in range(4)]
    num_steps = max(map(len, expected))
    assert loader.count_steps() == num_steps
    for step in range(num_steps):
        assert not loader.exhausted
        batch = next(loader)
        rows = rows_of(batch)
        borders = []
        for lane in range(4):
            if step < len(expected[lane]):
                assert rows[lane] == expected[lane][step][:3]
                borders += [lane * seq_len + border for border in expected[lane][step][3]]
            else:
                assert rows[lane][:2] == ([TOKENIZER.pad_id] * seq_len, [IGNORED] * seq_len)
                borders.append(lane * seq_len)
        if document_mask:
            assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [*borders, 4 * seq_len]
        else:
            assert batch.cu_seqlens is None
    assert loader.exhausted
    assert (next(loader).labels_BS == IGNORED).all() and loader.exhausted


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_epoch_has_each_document_once(num_ranks: int):
    source = ListSource([f"document {number} " * (1 + number % 7) for number in range(23)])
    seen: list[str] = []
    size = 8 // num_ranks
    for rank in range(num_ranks):
        loader = make_loader(source, range(rank * size, rank * size + size), 8, epochs=3, local_batch_size=1)
        streams: list[list[int]] = [[] for _ in range(size)]
        while not loader.exhausted:
            for stream in streams:
                batch = next(loader)
                tokens, labels = batch.tokens_BS[0].tolist(), batch.labels_BS[0].tolist()
                stream += tokens[: 0 if stream else 1] + [label for label in labels if label != IGNORED]
        for stream in streams:
            assert not stream or stream[-1] == TOKENIZER.eos_id
            seen += TOKENIZER.decode(stream).split("<|endoftext|>")[:-1]
    assert sorted(seen) == sorted(source.texts * 3)
    assert source.num_reads == [3] * 23, "a document was read, and so encoded, more than once an epoch"


def test_a_part_of_an_epoch():
    source = ListSource([f"document {number} " * 3 for number in range(20)])
    loader = make_loader(source, epochs=0.5, local_batch_size=4)
    while not loader.exhausted:
        next(loader)
    assert sorted(source.num_reads) == [0] * 10 + [1] * 10


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("epochs", [None, 1])
def test_ranks_together_give_the_batch_of_one_rank(num_ranks: int, epochs: float | None):
    options = {"epochs": epochs, "document_mask": True}
    whole = make_loader(random_source(60), range(8), 8, local_batch_size=8, **options)
    size = 8 // num_ranks
    parts = [
        make_loader(random_source(60), range(rank * size, (rank + 1) * size), 8, local_batch_size=size // 2, **options)
        for rank in range(num_ranks)
    ]
    for _ in range(30):
        assert_equal([next(whole)], [join([next(part) for part in parts for _ in range(2)])])


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("epochs", [None, 2])
def test_resuming_anywhere_goes_on_as_if_never_stopped(prefetch: int, epochs: float | None):
    source = random_source(30)
    options = {"prefetch": prefetch, "epochs": epochs, "document_mask": True}
    reference = list(islice(make_loader(source, document_mask=True, epochs=epochs), 120))
    for num_steps in [0, 1, 2, 3, *random.Random(0).sample(range(4, 50), 6)]:
        before = make_loader(source, **options)
        assert_equal(list(islice(before, 2 * num_steps)), reference[: 2 * num_steps])
        state = json.loads(json.dumps(before.state_dict()))
        before.close()
        after = make_loader(source, **options)
        next(after)  # whatever it did before does not count
        after.load_state_dict(state)
        assert_equal(list(islice(after, 20)), reference[2 * num_steps : 2 * num_steps + 20])
        assert after.state_dict() == make_state_after(source, num_steps + 10, epochs)
        after.close()


def make_state_after(source: ListSource, num_steps: int, epochs: float | None) -> dict:
    loader = make_loader(source, epochs=epochs, document_mask=True)
    for _ in islice(loader, 2 * num_steps):
        pass
    return loader.state_dict()


@pytest.mark.parametrize(("old_size", "new_size"), [(8, 2), (2, 4), (4, 8)])
def test_resuming_on_another_number_of_ranks(old_size: int, new_size: int):
    source = random_source(50)
    reference = make_loader(source, range(8), 8, local_batch_size=8, document_mask=True)

    def ranks(size: int) -> list[DataLoader]:
        lanes = [range(start, start + size) for start in range(0, 8, size)]
        return [make_loader(source, part, 8, local_batch_size=2, document_mask=True, prefetch=2) for part in lanes]

    def global_batch(loaders: list[DataLoader], size: int) -> Batch:
        return join([next(loader) for loader in loaders for _ in range(size // 2)])

    old, new = ranks(old_size), ranks(new_size)
    for _ in range(7):
        assert_equal([next(reference)], [global_batch(old, old_size)])
    merged = merge_states([loader.state_dict() for loader in reversed(old)])
    assert merged == reference.state_dict()
    for loader in new:
        loader.load_state_dict(merged)
    for _ in range(7):
        assert_equal([next(reference)], [global_batch(new, new_size)])
    for loader in (*old, *new):
        loader.close()


def test_reset_and_close_go_on_exactly():
    source = random_source(30)
    reference = list(islice(make_loader(source), 20))
    loader = make_loader(source, prefetch=4)
    assert_equal(list(islice(loader, 7)), reference[:7])
    loader.close()  # in the middle of a global batch
    assert_equal(list(islice(loader, 5)), reference[7:12])
    loader.reset()
    assert_equal(list(islice(loader, 20)), reference)
    loader.close()
    loader.close()


def test_validation_can_be_repeated():
    loader = make_loader(random_source(30), epochs=1, shuffle=False, local_batch_size=4)
    rounds = []
    for _ in range(2):
        loader.reset()
        batches = []
        while not loader.exhausted:
            batches.append(next(loader))
        rounds.append(batches)
    assert len(rounds[0]) == loader.count_steps() > 1
    assert_equal(rounds[0], rounds[1])


def test_fewer_documents_than_lanes(caplog):
    source = ListSource(["only one document here"])
    ids = [*TOKENIZER.encode(source.texts[0]), TOKENIZER.eos_id]
    with caplog.at_level(logging.WARNING, logger="titanmoe"):
        batch = next(make_loader(source, local_batch_size=4, seq_len=3 * len(ids)))
    assert "1 document(s) for a global batch of 4" in caplog.text
    assert batch.tokens_BS.tolist() == [ids * 3] * 4
    ending = make_loader(source, local_batch_size=4, seq_len=3 * len(ids), epochs=1)
    assert [(row != IGNORED).sum().item() for row in next(ending).labels_BS] == [len(ids) - 1, 0, 0, 0]
    assert ending.exhausted


def test_bos_and_eos():
    source = ListSource(["ab", "", "cd"])
    bos = Tokenizer(**{**TOKENIZER.__dict__, "bos_id": 1, "adds_bos": True})

    def first(tokenizer: Tokenizer, append_eos: bool) -> str:
        loader = DataLoader(
            source, tokenizer, seq_len=8, lanes=range(1), num_lanes=1, local_batch_size=1, seed=0, shuffle=False,
            epochs=1, append_eos=append_eos,
        )  # fmt: skip
        return TOKENIZER.decode([token for token in next(loader).tokens_BS[0].tolist() if token != TOKENIZER.pad_id])

    assert first(TOKENIZER, True) == "ab<|endoftext|>cd<|endoftext|>"
    assert first(TOKENIZER, False) == "abcd"
    assert first(bos, True) == "<|im_start|>ab<|endoftext|><|im_start|>cd<|endoftext|>"


@pytest.mark.parametrize(
    ("shuffle", "texts"),
    [(True, ["", "", ""]), (False, ["", "", ""]), (False, ["a", "", "b", "c"])],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_lane_with_nothing_but_empty_documents(shuffle: bool, texts: list[str], prefetch: int):
    loader = make_loader(ListSource(texts), shuffle=shuffle, prefetch=prefetch)
    with pytest.raises(ConfigError, match="all documents are empty"):
        for _ in range(2):
            next(loader)


def test_a_lane_that_has_to_look_long_for_its_document():
    source = ListSource([*[""] * 40, "found"])
    batch = next(make_loader(source, local_batch_size=4))
    ids = [*TOKENIZER.encode("found"), TOKENIZER.eos_id]
    assert batch.tokens_BS.tolist() == [(ids * 16)[:16]] * 4


def test_no_documents():
    with pytest.raises(ConfigError, match="no documents"):
        make_loader(ListSource([]))
    with pytest.raises(ConfigError, match="not one document"):
        make_loader(ListSource(["a"]), epochs=0.1)
    empty = make_loader(ListSource(["", ""]), epochs=1)
    assert empty.count_steps() == 0
    assert (next(empty).labels_BS == IGNORED).all() and empty.exhausted


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_error_in_a_document_reaches_the_consumer_and_the_state_stays(prefetch: int):
    class Broken(ListSource):
        broken = True

        def __getitem__(self, index: int) -> str:
            if index == 25 and self.broken:
                raise ConfigError("row 25 is bad")
            return super().__getitem__(index)

    source = Broken([f"{number} " * 30 for number in range(30)])
    reference = list(islice(make_loader(ListSource(source.texts)), 40))
    loader = make_loader(source, prefetch=prefetch)
    batches = []
    with pytest.raises(ConfigError, match="row 25 is bad"):
        for batch in loader:
            batches.append(batch)
    with pytest.raises(ConfigError, match="row 25 is bad"):
        next(loader)
    assert 0 < len(batches) < 40
    source.broken = False
    assert_equal(batches + list(islice(loader, 40 - len(batches))), reference)
    loader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed of the data order changed: it was 3"),
        ({"shuffle": False}, "data.shuffle changed"),
        ({"seq_len": 32}, "training.seq_len changed: it was 16 in the checkpoint and is 32"),
        ({"append_eos": False}, "data.append_eos changed"),
        ({"num_lanes": 8}, "global batch size changed: it was 4 .* is 8"),
    ],
)
def test_resuming_with_something_changed(changes: dict, message: str):
    state = make_loader(random_source(10)).state_dict()
    with pytest.raises(ConfigError, match=message) as caught:
        make_loader(random_source(10), **changes).load_state_dict(state)
    assert caught.value.mend


def test_resuming_on_other_data_or_with_another_tokenizer():
    state = make_loader(random_source(10)).state_dict()
    with pytest.raises(ConfigError, match="data set changed: it was 'list'"):
        make_loader(ListSource(["a"], "other")).load_state_dict(state)
    with pytest.raises(ConfigError, match="tokenizer changed"):
        make_loader(random_source(10)).load_state_dict({**state, "tokenizer": "other"})


@pytest.mark.parametrize("lanes", [None, 3, {}, {"0": [0, 0], "1": [0, -1]}, {"0": [0, 0], "1": [0]}, {"0": "ab"}])
def test_a_damaged_state(lanes: object):
    loader = make_loader(random_source(10), range(2), 4)
    with pytest.raises(ConfigError, match="which is no position"):
        loader.load_state_dict({**loader.state_dict(), "lanes": lanes})
    with pytest.raises(ConfigError, match="format of the data state"):
        loader.load_state_dict({})


def test_merging_states_that_do_not_fit():
    first, second = (make_loader(random_source(10), lanes, 4) for lanes in (range(2), range(2, 4)))
    states = [first.state_dict(), second.state_dict()]
    assert merge_states([*states, states[0]]) == merge_states(states)
    with pytest.raises(ConfigError, match=r"lanes \[2, 3\] are missing"):
        merge_states(states[:1])
    with pytest.raises(ConfigError, match="differ in source"):
        merge_states([states[0], {**states[1], "source": "other"}])
    next(first)
    with pytest.raises(ConfigError, match="differ in lane 0, lane 1"):
        merge_states([*states, first.state_dict()])


def test_the_state_is_taken_between_global_batches():
    loader = make_loader(random_source(10))
    next(loader)
    with pytest.raises(AssertionError, match="between global batches"):
        loader.state_dict()


def test_counting_reports_its_progress(monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(loader_module, "CHARACTERS_PER_COUNT", 50)
    source = random_source(30)
    with caplog.at_level(logging.INFO, logger="titanmoe"):
        num_steps = make_loader(source, epochs=2).count_steps()
    assert num_steps == max(len(naive_rows(source, lane, 4, 16, 60, False)) for lane in range(4))
    assert "counting tokens: 15 of 30 documents" in caplog.text


def test_a_local_file_end_to_end(tmp_path: Path):
    from titanmoe.data.sources import open_source

    (tmp_path / "a.md").write_text("# Title\n\nSome words.\n")
    loader = make_loader(open_source("text", str(tmp_path), "train"), range(1), 1, local_batch_size=1, epochs=1)
    tokens = next(loader).tokens_BS[0].tolist()
    assert TOKENIZER.decode(tokens).startswith("# Title\n\nSome words.\n<|endoftext|>")
