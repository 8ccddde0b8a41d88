from __future__ import annotations

import itertools
import threading
import time

import pytest

from titanmoe.data.prefetch import Prefetcher


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_order_and_depth():
    made: list[int] = []
    counter = itertools.count()

    def produce() -> int:
        made.append(next(counter))
        return made[-1]

    prefetcher = Prefetcher(produce, 3)
    wait_until(lambda: len(made) == 3)
    time.sleep(0.02)
    assert len(made) == 3
    assert [prefetcher.get() for _ in range(100)] == list(range(100))
    wait_until(lambda: len(made) == 103)
    prefetcher.close()
    assert len(made) == 103
    assert not prefetcher._thread.is_alive()


def test_an_error_comes_after_what_was_made_before_it():
    items = iter([1, 2])
    prefetcher = Prefetcher(lambda: next(items), 5)
    assert [prefetcher.get(), prefetcher.get()] == [1, 2]
    with pytest.raises(StopIteration):
        prefetcher.get()
    prefetcher.close()


def test_close_waits_for_the_call_in_progress():
    entered, leave = threading.Event(), threading.Event()

    def produce() -> None:
        entered.set()
        assert leave.wait(10)

    prefetcher = Prefetcher(produce, 1)
    assert entered.wait(10)
    threading.Timer(0.02, leave.set).start()
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
