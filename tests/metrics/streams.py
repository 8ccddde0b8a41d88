"""Streams that stand for a file and for a terminal, and a clock that stands still."""

from __future__ import annotations

import io
import re
import time

from titanmoe.metrics.terminal import Terminal


class FakeTTY(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal(stream: io.StringIO, columns: int = 120, color: bool = True) -> Terminal:
    noon = time.struct_time((2026, 1, 1, 12, 0, 0, 3, 1, 0))
    return Terminal(stream, color=color, width=lambda: columns, clock=lambda: noon)


def plain(text: str) -> str:
    """The text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def screen(text: str) -> list[str]:
    """What a terminal shows after `text`: carriage returns and erased lines are carried out."""
    lines = [""]
    for token in re.findall(r"\r|\n|\x1b\[2K|[^\r\n\x1b]+", plain(text)):
        if token == "\n":
            lines.append("")
        elif token == "\x1b[2K":
            lines[-1] = ""
        elif token != "\r":
            lines[-1] += token
    return lines
