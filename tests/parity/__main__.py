"""The table of all families and variants: python -m tests.parity [--json] [FAMILY ...]; exit code 1 if a row fails."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.parity.compare import Row, compare
from tests.parity.variants import VARIANTS

_HEADER = ("family", "variant", "logits", "gradient", "packed", "gradient", "bf16", "theirs", "", "worst gradient of")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(VARIANTS)}; by default all")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args(args)
    if unknown := set(options.families) - VARIANTS.keys():
        parser.error(f"there is no family {unknown.pop()!r}")
    logging.getLogger("titanmoe").setLevel(logging.WARNING)
    rows = []
    for family in options.families or VARIANTS:
        for variant, (model_type, settings) in VARIANTS[family].items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(family, variant, model_type, settings, Path(folder)))
            if options.json:
                print(json.dumps({**asdict(rows[-1]), "failures": rows[-1].failures}), flush=True)
    if not options.json:
        print(table(rows))
    return 1 if any(row.failures for row in rows) else 0


def table(rows: Sequence[Row]) -> str:
    """The rows with aligned columns, and a line per failure."""
    cells = [_HEADER]
    for row in rows:
        figures = (row.logits, row.gradient, row.packed_logits, row.packed_gradient, row.bf16, row.bf16_theirs)
        worst = row.gradient_of if row.gradient > row.packed_gradient else row.packed_gradient_of
        mark = "FAIL" if row.failures else "ok"
        cells.append((row.family, row.variant, *(f"{figure:.1e}" for figure in figures), mark, worst))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += [f"{row.family} {row.variant}: {failure}" for row in rows for failure in row.failures]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
