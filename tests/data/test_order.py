from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from titanmoe.data.order import DocumentOrder, permute

EXPECTED = [7, 4, 5, 9, 1, 2, 3, 6, 0, 8]  # of permute(index, 10, seed=42, epoch=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4099])
def test_every_epoch_is_a_permutation(size: int):
    order = DocumentOrder(size, seed=7, shuffle=True)
    for epoch in range(3):
        assert sorted(order(epoch * size + index) for index in range(size)) == list(range(size))


def test_without_shuffle_the_order_is_the_source_s():
    order = DocumentOrder(5, seed=7, shuffle=False)
    assert [order(document) for document in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_seeds_and_epochs_differ():
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return tuple(permute(index, 50, seed, number) for index in range(50))

    assert len({epoch(seed, number) for seed in range(5) for number in range(5)}) == 25


def test_any_number_of_documents_is_found_at_once():
    size = 10**12
    found = {permute(index, size, 0, 0) for index in range(1000)}
    assert len(found) == 1000 and all(0 <= index < size for index in found)


def test_it_does_not_change_between_versions():
    assert [permute(index, 10, 42, 0) for index in range(10)] == EXPECTED


def test_places_are_evenly_spread():
    # 600 epochs of 6 documents: each lands on each place 100 times, with a standard deviation of 9.1.
    counts = Counter((index, permute(index, 6, 1, epoch)) for epoch in range(600) for index in range(6))
    assert len(counts) == 36
    assert all(60 < count < 140 for count in counts.values()), counts
    # Neighbours do not stay neighbours: of 999 pairs about two do by chance.
    order = [permute(index, 1000, 1, 0) for index in range(1000)]
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 12
