"""The bar and the lines of long readings and writings."""

from __future__ import annotations

import io
import logging
from itertools import count

import pytest

from tests.metrics.streams import FakeTTY, screen, terminal
from titanmoe.metrics.progress import progress_bar


def test_a_bar_on_a_terminal_begins_anew_for_each_verb_and_goes_at_the_end() -> None:
    stream, now = FakeTTY(), [0.0]
    report = progress_bar(terminal(stream), clock=lambda: now[0])
    report("read", 10**9, 8 * 10**9)
    assert screen(stream.getvalue())[-1] == f" 12%  {'━' * 5}{'─' * 35}  1.0/8.0 GB read"
    now[0] = 2.0
    report("read", 4 * 10**9, 8 * 10**9)
    assert screen(stream.getvalue())[-1] == f" 50%  {'━' * 20}{'─' * 20}  4.0/8.0 GB read  2.00 GB/s  0:02 left"
    report("read", 8 * 10**9, 8 * 10**9)
    assert screen(stream.getvalue()) == [""]
    report("verified", 0, 10**9)
    assert screen(stream.getvalue())[-1] == f"  0%  {'─' * 40}  0.0/1.0 GB verified"


def test_a_bar_is_drawn_ten_times_a_second_at_most() -> None:
    stream, milliseconds = FakeTTY(), count()
    report = progress_bar(terminal(stream), clock=lambda: next(milliseconds) / 1000)
    for done in range(1000):
        report("read", done, 1000)
    assert 9 <= stream.getvalue().count("GB read") <= 11


def test_lines_elsewhere_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    stream, seconds = io.StringIO(), count()
    report = progress_bar(terminal(stream), clock=lambda: next(seconds) / 2)
    with caplog.at_level(logging.INFO):
        for done in range(70):
            report("read", done * 10**8, 70 * 10**8)
    assert 2 <= len(caplog.messages) <= 3
    assert caplog.messages[0].endswith("of 7.0 GB read")
    assert not stream.getvalue()


def test_nothing_to_do_is_done() -> None:
    progress_bar(terminal(FakeTTY()))("read", 0, 0)
