"""Where text for people goes: lines, and on a terminal a bar redrawn below them. The package's logger writes here too.

Lines are plain text in a file or a pipe. Colours need a terminal, and neither NO_COLOR (https://no-color.org) nor
TERM=dumb in the environment.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_ERASE_LINE = "\r\x1b[2K"


class Terminal:
    """A text stream with an optional bar on its last line.

    Args:
        stream: standard output if None.
        color: False never colours; True colours where the stream is a terminal that can.
        width: columns of the terminal; asked anew for each bar, as people resize windows.
        clock: local time, for time stamps.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        color: bool = True,
        width: Callable[[], int] | None = None,
        clock: Callable[[], time.struct_time] = time.localtime,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.columns = self._ask_columns if width is None else width
        self._clock = clock
        self._bar = ""
        self.is_interactive = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.has_color = color and self.is_interactive and not os.environ.get("NO_COLOR")

    def style(self, text: str, *styles: str) -> str:
        if not (self.has_color and styles and text):
            return text
        return f"\x1b[{';'.join(_STYLES[name] for name in styles)}m{text}\x1b[0m"

    def stamp(self) -> str:
        """The time of day that begins every line: 14:03:59."""
        return self.style(time.strftime("%H:%M:%S", self._clock()), "dim")

    def line(self, text: str) -> None:
        """Write one line (or several, if `text` holds newlines) above the bar."""
        self._write(f"{_ERASE_LINE if self._bar else ''}{text}\n{self._bar}")

    def bar(self, draw: Callable[[int], str]) -> None:
        """Replace the bar by `draw(columns)`, one short line; nothing happens unless the stream is a terminal."""
        if self.is_interactive:
            # The last column stays free: some terminals wrap as soon as it is written.
            self._bar = draw(max(self.columns() - 1, 1))
            self._write(f"{_ERASE_LINE}{self._bar}")

    def progress_bar(self, fraction: float, count: str, speed: str, left: str) -> None:
        """Replace the bar by one that is filled to `fraction`, with texts beside it; a narrow one has fewer of them."""
        self.bar(lambda columns: self._draw_progress(columns, min(fraction, 1.0), count, speed, left))

    def _draw_progress(self, columns: int, fraction: float, count: str, speed: str, left: str) -> str:
        texts = [text for text in (f"{100 * fraction:3.0f}%", count, speed, left) if text]
        room = columns - len("  ".join(texts)) - 2
        if room >= 10:
            size = min(room, 40)
            full = int(fraction * size)
            bar = self.style("━" * full, "green") + self.style("─" * (size - full), "dim")
            return "  ".join([texts[0], bar, *texts[1:]])
        for text in (speed, count, left):
            if text in texts and len("  ".join(texts)) > columns:
                texts.remove(text)
        return "  ".join(texts)[:columns]

    def clear_bar(self) -> None:
        if self._bar:
            self._bar = ""
            self._write(_ERASE_LINE)

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, errors="replace").decode(encoding))
        self._stream.flush()

    def _ask_columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:  # a terminal in name only, as in an editor's console
            return 80


class TerminalHandler(logging.Handler):
    """Log records as lines of a `Terminal`: time, then the message; level and rank only where they say something."""

    def __init__(self, terminal: Terminal, rank: int) -> None:
        super().__init__(level=logging.INFO if rank == 0 else logging.WARNING)
        self.terminal, self._rank = terminal, rank

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            if record.levelno >= logging.WARNING:
                color = "red" if record.levelno >= logging.ERROR else "yellow"
                text = f"{self.terminal.style(record.levelname.lower() + ':', color, 'bold')} {text}"
            if self._rank != 0:
                text = f"[rank {self._rank}] {text}"
            self.terminal.line(f"{self.terminal.stamp()}  {text}")
        except Exception:  # what logging.Handler asks of every handler: a failing log call must not end the program
            self.handleError(record)


def configure_logging(rank: int, color: bool = True, stream: TextIO | None = None) -> Terminal:
    """Send the "titanmoe" logger to standard output: everything from INFO up on rank 0, warnings and above on others.

    Calling it again replaces the earlier set-up. Records do not propagate to the root logger, so that nobody else
    prints them twice.
    """
    logger = logging.getLogger("titanmoe")
    for handler in list(logger.handlers):
        if isinstance(handler, TerminalHandler):
            logger.removeHandler(handler)
    terminal = Terminal(stream, color=color)
    logger.addHandler(TerminalHandler(terminal, rank))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return terminal


def current_terminal(color: bool = True) -> Terminal:
    """The terminal that `configure_logging` set up, or one on standard output where a library user did not call it."""
    for handler in logging.getLogger("titanmoe").handlers:
        if isinstance(handler, TerminalHandler):
            return handler.terminal
    return Terminal(color=color)
