"""Small sources and loaders for the tests of the data room."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from titanmoe.data.loader import DataLoader
from titanmoe.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(None)


class ListSource:
    """Documents from a list; counts how often each was read."""

    def __init__(self, texts: Sequence[str], fingerprint: str = "list") -> None:
        self.texts, self.fingerprint = list(texts), fingerprint
        self.num_reads = [0] * len(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        self.num_reads[index] += 1
        return self.texts[index]


def random_source(num_documents: int, seed: int = 0) -> ListSource:
    """Documents of very different lengths, some empty, each with its number in it."""
    generator = random.Random(seed)
    texts = []
    for number in range(num_documents):
        length = generator.choice([0, 1, 5, 20, 60, 200])
        texts.append("" if length == 0 else f"#{number}:" + "".join(generator.choices("abc xyz\n", k=length)))
    return ListSource(texts)


def make_loader(source: Any, lanes: range = range(4), num_lanes: int = 4, **changes: Any) -> DataLoader:
    options: dict[str, Any] = {"seq_len": 16, "local_batch_size": 2, "seed": 3, "shuffle": True}
    return DataLoader(source, TOKENIZER, lanes=lanes, num_lanes=num_lanes, **{**options, **changes})
