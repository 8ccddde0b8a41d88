"""What became of each product of a model, for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One product.

    Attributes:
        path: of its module.
        was: dtype and sizes.
        now: the name of the converter and what it does; "" if it stays as it was.
        backend: what computes it now.
        why: why it stays as it was.
    """

    path: str
    was: str
    now: str = ""
    backend: str = ""
    why: str = ""


def render(rows: Iterable[Row]) -> list[str]:
    """Lines of text; layers that are alike share one."""
    cells = [("module", "was", "is", "backend", "because")]
    cells += [(row.path, row.was, row.now or "unchanged", row.backend, row.why) for row in _layers_together(rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in cells
    ]


def _layers_together(rows: Iterable[Row]) -> list[Row]:
    layers: dict[Row, list[int]] = {}
    for row in rows:
        match = re.match(r"layers\.(\d+)\.", row.path)
        path = row.path if match is None else "layers.{}." + row.path[match.end() :]
        layers.setdefault(replace(row, path=path), []).extend([] if match is None else [int(match[1])])
    return [replace(row, path=row.path.replace("{}", _ranges(numbers))) for row, numbers in layers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "{0-2,5}"; [3] as "3"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
