"""Draws the loss curve of a run as an SVG: `python docs/images/loss_curve.py outputs docs/images/first_run.svg`."""

from __future__ import annotations

import argparse
from pathlib import Path

from titanmoe.metrics.chart import Series
from titanmoe.metrics.picture import picture
from titanmoe.metrics.records import JSONL_NAME, read_records


def draw(dump_folder: Path) -> str:
    """The chart "Loss" of report.html as a picture of its own."""
    records, _ = read_records(dump_folder / JSONL_NAME)
    names = {"loss": "training loss", "validation_loss": "validation loss"}
    series = [
        Series(name, [(record["step"], record[key]) for record in records if key in record])
        for key, name in names.items()
    ]
    return picture("Loss", series)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run as an SVG.")
    parser.add_argument("dump_folder", type=Path, help="the run's job.dump_folder, with its metrics.jsonl")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(arguments.dump_folder), encoding="utf-8")


if __name__ == "__main__":
    main()
