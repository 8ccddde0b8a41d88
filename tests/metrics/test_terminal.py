from __future__ import annotations

import io
import logging

from tests.metrics.streams import FakeTTY, screen, terminal
from titanmoe.metrics.terminal import Terminal, TerminalHandler, configure_logging, current_terminal


def test_a_file_gets_lines_and_nothing_else():
    stream = io.StringIO()
    out = terminal(stream)
    out.bar(lambda columns: "half way")
    out.line(out.style("one", "red"))
    out.clear_bar()
    assert stream.getvalue() == "one\n"


def test_lines_go_above_the_bar():
    stream = FakeTTY()
    out = terminal(stream, columns=40)
    out.bar(lambda columns: f"bar of {columns}")
    assert stream.getvalue() == "\r\x1b[2Kbar of 39"
    out.line("one")
    out.line("two")
    assert screen(stream.getvalue()) == ["one", "two", "bar of 39"]
    out.bar(lambda columns: "next")
    assert screen(stream.getvalue()) == ["one", "two", "next"]
    out.clear_bar()
    assert screen(stream.getvalue()) == ["one", "two", ""]


def test_colour_only_on_a_willing_terminal(monkeypatch):
    assert terminal(FakeTTY()).style("x", "red", "bold") == "\x1b[31;1mx\x1b[0m"
    assert terminal(FakeTTY(), color=False).style("x", "red") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(FakeTTY()).style("x", "red") == "x"
    assert terminal(FakeTTY()).is_interactive
    monkeypatch.setenv("NO_COLOR", "")
    assert terminal(FakeTTY()).has_color
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal(FakeTTY()).has_color and not terminal(FakeTTY()).is_interactive


def test_a_stream_that_cannot_encode_a_character_gets_another():
    raw = io.BytesIO()
    Terminal(io.TextIOWrapper(raw, encoding="ascii")).line("━ done")
    assert raw.getvalue() == b"? done\n"


def test_a_terminal_without_a_size_is_80_wide():
    widths = []
    Terminal(FakeTTY()).bar(lambda columns: widths.append(columns) or "")
    assert widths == [79]


def test_logging_on_rank_0_and_on_another():
    first, other = io.StringIO(), io.StringIO()
    configure_logging(0, stream=first)
    log = logging.getLogger("titanmoe.trainer")
    log.debug("not shown")
    log.info("saved %s", "step-10")
    log.warning("disk is %d%% full", 90)
    configure_logging(3, stream=other)
    log.info("not shown")
    log.error("lost")
    assert [line[10:] for line in first.getvalue().splitlines()] == ["saved step-10", "warning: disk is 90% full"]
    assert [line[10:] for line in other.getvalue().splitlines()] == ["[rank 3] error: lost"]
    handlers = [handler for handler in logging.getLogger("titanmoe").handlers if isinstance(handler, TerminalHandler)]
    assert len(handlers) == 1, "a second set-up replaces the first"


def test_log_lines_cooperate_with_the_bar_and_show_exceptions():
    stream = FakeTTY()
    out = terminal(stream)
    handler = TerminalHandler(out, rank=0)
    out.bar(lambda columns: "bar")
    try:
        raise ValueError("broken")
    except ValueError as error:
        record = logging.LogRecord("titanmoe", logging.ERROR, "", 0, "oh", (), (ValueError, error, error.__traceback__))
    handler.emit(record)
    lines = screen(stream.getvalue())
    assert lines[0] == "12:00:00  error: oh"
    assert lines[1].startswith("Traceback") and lines[-2] == "ValueError: broken" and lines[-1] == "bar"


def test_the_console_finds_the_loggers_terminal():
    assert isinstance(current_terminal(), Terminal), "a library user need not set logging up"
    assert configure_logging(0, stream=io.StringIO()) is current_terminal()
