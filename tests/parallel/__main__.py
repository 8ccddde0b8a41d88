"""Every layout of 2 and 4 ranks beside one process, as a table: python -m tests.parallel [--ranks 2 4] [KIND ...]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle

from tests.models.kinds import KINDS
from tests.parallel.layouts import Layout, on_ranks, one_process, why_not

_TOLERANCE = 1e-5
_HEADER = ("kind of layers", "layout", "recompute", "loss", "gradient", "norm", "", "worst gradient of")
_WIDTHS = (24, 34, 11, 9, 9, 9, 3, 0)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args(args)
    num_bad = 0
    _print(_HEADER)
    for kind in options.kinds or KINDS:
        reference = one_process(KINDS[kind])
        # Recomputation must not matter; it takes turns, so that each meets many layouts.
        for layout, recompute in zip(layouts(options.ranks), cycle(("none", "full", "selective")), strict=False):
            if reason := why_not(KINDS[kind], layout):
                _print((kind, str(layout), "", f"not run: {reason}"))
                continue
            steps = on_ranks(KINDS[kind], Layout(**{**vars(layout), "recompute": recompute}))
            errors = [step.gradient_errors(reference) for step in steps]
            worst, name = max((error, name) for each in errors for name, error in each.items())
            loss = max(abs(step.loss - reference.loss) / reference.loss for step in steps)
            norm = max(abs(step.norm - reference.norm) / reference.norm for step in steps)
            is_good = max(worst, loss, norm) < _TOLERANCE
            num_bad += not is_good
            verdict = "ok" if is_good else "BAD"
            _print((kind, str(layout), recompute, f"{loss:.1e}", f"{worst:.1e}", f"{norm:.1e}", verdict, name))
    return 1 if num_bad else 0


def layouts(numbers_of_ranks: Sequence[int]) -> Iterator[Layout]:
    """Every way to arrange these numbers of ranks."""
    for num_ranks in numbers_of_ranks:
        for dp_replicate in _divisors(num_ranks):
            for dp_shard in _divisors(num_ranks // dp_replicate):
                cp = num_ranks // dp_replicate // dp_shard
                for ep in _divisors(dp_shard * cp):
                    yield Layout(dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, ep=ep)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _print(cells: Sequence[str]) -> None:
    print("".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False)).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
