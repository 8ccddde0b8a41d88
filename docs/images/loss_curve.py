"""Draws the loss curve of a run as an SVG: `python docs/images/loss_curve.py outputs docs/images/first_run.svg`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from titanmoe.metrics.chart import Series, line_chart
from titanmoe.metrics.records import JSONL_NAME, read_records

STYLE = """
svg { --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --c0: #0969da; --c1: #d1570b; background: #ffffff; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --soft: #8d96a0; --line: #30363d; --c0: #58a6ff;
  --c1: #f0883e; background: #0d1117; } }
text { font: 11px system-ui, sans-serif; fill: var(--soft); } text.series0 { fill: var(--c0); }
text.series1 { fill: var(--c1); } .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.6; }
polyline.series0 { stroke: var(--c0); } polyline.series1 { stroke: var(--c1); }
circle.series0 { fill: var(--c0); } circle.series1 { fill: var(--c1); }
"""


def draw(dump_folder: Path) -> str:
    """The chart "Loss" of report.html as a picture of its own, with its legend inside."""
    records, _ = read_records(dump_folder / JSONL_NAME)
    names = {"loss": "training loss", "validation_loss": "validation loss"}
    series = [
        Series(name, [(record["step"], record[key]) for record in records if key in record])
        for key, name in names.items()
    ]
    chart = line_chart("Loss", series, label=lambda value: f"{value:.4g}")
    found = re.search(r"<svg (.*?) data-series=.*?>\n(.*)</svg>", chart, re.DOTALL)
    assert found is not None, "line_chart draws one svg"
    legend = "".join(
        f'<text class="series{index}" x="500" y="{28 + 16 * index}">{one.name}</text>\n'
        for index, one in enumerate(series)
    )
    attributes, body = found.groups()
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>\n<style>{STYLE}</style>\n{body}{legend}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run as an SVG.")
    parser.add_argument("dump_folder", type=Path, help="the run's job.dump_folder, with its metrics.jsonl")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(arguments.dump_folder), encoding="utf-8")


if __name__ == "__main__":
    main()
