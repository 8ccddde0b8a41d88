"""A line chart as an SVG file of its own, for documents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from titanmoe.metrics.chart import WIDTH, Series, line_chart

_LIGHT = ("#0969da", "#d1570b", "#1a7f37", "#8250df", "#bf3989", "#9a6700")
_DARK = ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#d29922")
_LETTER_PX = 7


def picture(title: str, series: Sequence[Series]) -> str:
    """`line_chart` with its legend inside, in light or dark as the reader's system is; at most six series."""
    chart = line_chart(title, series, label=lambda value: f"{value:.4g}")
    found = re.search(r"<svg (.*?) data-series=.*?>\n(.*)</svg>", chart, re.DOTALL)
    assert found is not None, "line_chart draws one svg"
    attributes, body = found.groups()
    left = min(500, WIDTH - _LETTER_PX * max(len(one.name) for one in series))
    legend = "".join(
        f'<text class="series{index}" x="{left}" y="{28 + 16 * index}">{escape(one.name)}</text>\n'
        for index, one in enumerate(series)
    )
    style = _style(len(series))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>\n<style>{style}</style>\n{body}{legend}</svg>\n'


def _style(num_series: int) -> str:
    light, dark = (
        " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours[:num_series]))
        for colours in (_LIGHT, _DARK)
    )
    of_series = "\n".join(
        f"text.series{index}, circle.series{index} {{ fill: var(--c{index}); }} "
        f"polyline.series{index} {{ stroke: var(--c{index}); }}"
        for index in range(num_series)
    )
    return f"""
svg {{ --soft: #656d76; --line: #d8dee4; {light} background: #ffffff; }}
@media (prefers-color-scheme: dark) {{ svg {{ --soft: #8d96a0; --line: #30363d; {dark} background: #0d1117; }} }}
text {{ font: 11px system-ui, sans-serif; fill: var(--soft); }} .grid {{ stroke: var(--line); }}
polyline {{ fill: none; stroke-width: 1.6; }}
{of_series}
"""
