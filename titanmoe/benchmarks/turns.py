"""Timing contenders in turn, each in a process of its own.

Machines drift: other jobs come and go, clocks change. Contenders therefore run in rounds (A B C, A B C, ...), so that
each round sees the same machine, and ratios are taken within rounds. Processes of their own keep allocators, thread
pools and caches apart.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

READY = "ready"


class Worker:
    """A process that builds something once, and then times it as often as it is asked."""

    def __init__(self, module: str, arguments: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(dict(arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**os.environ, **env},
        )
        self.info: dict[str, Any] = self._read()

    def run(self) -> dict[str, Any]:
        """One timed round."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self._process.wait()
        self._messages.seek(0)
        raise RuntimeError(f"a contender ended with exit code {code}:\n{self._messages.read()}")


def serve(info: Mapping[str, Any], run: Any, stdin: TextIO = sys.stdin) -> None:
    """The worker's side: say that all is built, then answer every line with the result of `run()`."""
    print(json.dumps(dict(info)), flush=True)
    for _ in stdin:
        print(json.dumps(run()), flush=True)


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """Median and extremes, in seconds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """How many times faster `to` was than `of`, round by round: median and extremes."""
    return summarize([a / b for a, b in zip(of, to, strict=True)])


def spread(ratios: Mapping[str, float]) -> str:
    """What `ratio` found, for people."""
    return f"{ratios['median']:.2f}x ({ratios['min']:.2f} to {ratios['max']:.2f})"


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows by column, as lines of text below the names of the columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]
