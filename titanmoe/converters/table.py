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
        now: what it is; "" if it stays as it was.
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
    cells = [("module", "was", "is", "backend, or why not")]
    cells += [(row.path, row.was, row.now or "unchanged", row.backend or row.why) for row in _layers_together(rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]).rstrip()
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
    """[0, 1, 2, 5] as "{0-2,5}"; [1, 3, 5, 7, 9] as "{1,3,..,9}"; [3] as "3"."""
    numbers = sorted(numbers)
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    step = numbers[1] - numbers[0]
    if step > 1 and len(numbers) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{{{numbers[0]},{numbers[1]},..,{numbers[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs) + "}"
