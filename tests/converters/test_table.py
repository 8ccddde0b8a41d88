"""The table of what became of each product."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titanmoe.converters.table import Row, render

ROW = Row("layers.{}.attention.q_proj", "bfloat16 64 x 32", "FP8", "emulated")


def rows(row: Row, *layers: int) -> list[Row]:
    return [replace(row, path=row.path.format(layer)) for layer in layers]


def test_layers_that_are_alike_share_a_line() -> None:
    other = Row("layers.{}.attention.q_proj", "bfloat16 64 x 32", why="too small")
    output = Row("output", "bfloat16 100 x 32", why="not listed")
    lines = render([*rows(ROW, 0, 1, 3, 4, 5, 7), *rows(other, 2), *rows(replace(ROW, was="float32 2 x 2"), 6), output])
    assert [line.split(maxsplit=1)[0] for line in lines] == [
        "module",
        "layers.{0-1,3-5,7}.attention.q_proj",
        "layers.2.attention.q_proj",
        "layers.6.attention.q_proj",
        "output",
    ]
    assert lines[1] == "layers.{0-1,3-5,7}.attention.q_proj  bfloat16 64 x 32   FP8        emulated"
    assert lines[4] == "output                               bfloat16 100 x 32  unchanged  not listed"


def test_a_line_that_has_no_reason_does_not_end_in_blanks() -> None:
    assert not [line for line in render([replace(ROW, backend="")]) if line != line.rstrip()]


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "3"),
        ([0, 1], "{0-1}"),
        ([5, 2, 1, 0], "{0-2,5}"),
        ([1, 3, 5, 7, 9], "{1,3,..,9}"),
        ([3, 7, 11, 15], "{3,7,..,15}"),
        ([1, 3, 5], "{1,3,5}"),
        ([1, 3, 5, 7, 8], "{1,3,5,7-8}"),
    ],
)
def test_ranges_of_layers(layers: list[int], text: str) -> None:
    assert render(rows(ROW, *layers))[1].startswith(f"layers.{text}.attention.q_proj ")
