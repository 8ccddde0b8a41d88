"""The table of all families and variants: python -m tests.parity [--json] [FAMILY ...]; exit code 1 if a row fails."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.parity.compare import Row, compare
from tests.parity.variants import VARIANTS

_OF_ROWS = ("logits", "gradient", "bf16", "theirs")
_HEADER = ("family", "variant", *_OF_ROWS, *(f"packed {name}" for name in _OF_ROWS), "", "worst gradient of")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(VARIANTS)}; by default all")
    parser.add_argument("--device", default="cpu", help="where both compute: cpu or cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args(args)
    if unknown := set(options.families) - VARIANTS.keys():
        parser.error(f"there is no family {unknown.pop()!r}")
    logging.getLogger("titanmoe").setLevel(logging.WARNING)
    rows = []
    for family in options.families or VARIANTS:
        for variant, (model_type, settings) in VARIANTS[family].items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(family, variant, model_type, settings, Path(folder), options.device))
            if options.json:
                print(json.dumps(rows[-1].as_dict()), flush=True)
    if not options.json:
        print(table(rows))
    return 1 if any(row.failures for row in rows) else 0


def table(rows: Sequence[Row]) -> str:
    """The rows with aligned columns, and a line per failure."""
    cells = [_HEADER]
    for row in rows:
        both = (row.whole, row.packed)
        figures = [figure for part in both for figure in (part.logits, part.gradient, part.bf16, part.bf16_theirs)]
        worst = max(both, key=lambda part: part.gradient).gradient_of
        mark = "FAIL" if row.failures else "ok"
        cells.append((row.family, row.variant, *(f"{figure:.1e}" for figure in figures), mark, worst))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += [f"{row.family} {row.variant}: {failure}" for row in rows for failure in row.failures]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
