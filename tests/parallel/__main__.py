"""Every layout of some ranks beside one process, as a table: python -m tests.parallel [KIND ...] [--ranks 2 4].

A row is a layout and a kind of layers; it is run with experts that learn, that are frozen, and with one that every
token goes to. Errors are the largest over ranks, three steps and these situations. With `--precision` products are in
low precision: of one kind of layers, whose sizes are multiples of 32, in one step (see `test_low_precision`).

With `--adapters` there is a row for each layout, schedule of a pipeline and offloading, and a column for each kind of
adapters on each kind of frozen weights: the largest error of a gradient, or of one as a whole if it is in bfloat16. The
last column is what an optimizer moved in three steps: "ok" if it is all adapters, of experts those with tokens, and
nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product

from tests.models.kinds import KINDS, WIDE, deep
from tests.parallel.adapters import ADAPTERS, errors_of, wrong_moves
from tests.parallel.layouts import NUM_STEPS, PRECISIONS, SITUATIONS, Layout, compare, one_process, why_not
from titanmoe.models.spec import num_experts

_HEADER = ("kind of layers", "layout", "recompute", "loss", "gradient", "noise", "norm", "", "worst gradient of")
_WIDTHS = (24, 42, 11, 9, 9, 9, 9, 5, 0)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--precision", choices=PRECISIONS, default="plain")
    parser.add_argument("--adapters", action="store_true")
    options = parser.parse_args(args)
    if options.adapters:
        return adapters(options.ranks)
    precision, is_plain = PRECISIONS[options.precision], options.precision == "plain"
    specs = {kind: KINDS[kind] for kind in options.kinds or KINDS} if is_plain else {options.precision: WIDE}
    num_bad = num_run = 0
    _print(_HEADER)
    for kind, spec in specs.items():
        spec = deep(spec, 4)  # a layer for each of four stages
        situations = SITUATIONS if num_experts(spec) else {"all learn": None}
        num_steps = NUM_STEPS if is_plain else 1
        references = {name: one_process(spec, change, num_steps, precision) for name, change in situations.items()}
        # Recomputation must not matter; it takes turns, so that each meets many layouts.
        for layout, recompute in zip(layouts(options.ranks), cycle(("none", "full", "selective")), strict=False):
            if reason := why_not(spec, layout):
                _print((kind, str(layout), "", f"not run: {reason}"))
                continue
            layout = Layout(**{**vars(layout), "recompute": recompute})
            errors = [compare(spec, layout, change, references[name], precision) for name, change in situations.items()]
            worst = max(errors, key=lambda each: each.gradient)
            loss, norm = max(each.loss for each in errors), max(each.norm for each in errors)
            noise = max(each.noise for each in errors)
            is_good = all(precision.allows(each) for each in errors)
            num_run, num_bad = num_run + 1, num_bad + (not is_good)
            numbers = (f"{error:.1e}" for error in (loss, worst.gradient, noise, norm))
            _print((kind, str(layout), recompute, *numbers, "ok" if is_good else "BAD", worst.worst))
    print(f"{num_run} rows run, {num_bad} bad")
    return 1 if num_bad else 0


def adapters(numbers_of_ranks: Sequence[int]) -> int:
    num_bad = num_run = 0
    widths = (58, *[max(10, len(name) + 2) for name in ADAPTERS], 0)
    _print(("layout", *ADAPTERS, "moves"), widths)
    for layout, schedule in adapter_rows(numbers_of_ranks):
        section = {"pipeline_parallel_schedule": schedule} if schedule else {}
        details = [schedule, layout.recompute * (layout.recompute != "none"), "offload" * layout.offload]
        named = ", ".join([str(layout), *filter(None, details)])
        if reason := why_not(WIDE, layout, schedule or "1F1B"):
            _print((named, f"not run: {reason}"), widths)
            continue
        cells = []
        for name, errors in errors_of(WIDE, layout, section=section).items():
            is_good, number = ADAPTERS[name].allows(errors), errors.noise if ADAPTERS[name].noise else errors.largest
            cells.append(f"{number:.1e}" + " BAD" * (not is_good))
        wrong = [
            each for name in ("LoRA on bfloat16", "DoRA on nf4") for each in wrong_moves(WIDE, layout, name, section)
        ]
        cells.append("; ".join(wrong) or "ok")
        num_run, num_bad = num_run + 1, num_bad + (bool(wrong) or any("BAD" in cell for cell in cells))
        _print((named, *cells), widths)
    print(f"{num_run} rows of {len(ADAPTERS) + 1} cells run, {num_bad} bad")
    return 1 if num_bad else 0


def adapter_rows(numbers_of_ranks: Sequence[int]) -> Iterator[tuple[Layout, str]]:
    """Layouts with recomputation by turns, and the schedule of a pipeline that is not 1F1B."""
    for layout, recompute in zip(layouts(numbers_of_ranks), cycle(("none", "full", "selective", "moe")), strict=False):
        yield replace(layout, recompute=recompute), ""
        if layout.pp == 2:
            yield layout, "Interleaved1F1B"
            yield layout, "ZBVZeroBubble"
        if layout.pp * layout.cp * layout.tp == 1:
            yield replace(layout, offload=True), ""


def layouts(numbers_of_ranks: Sequence[int]) -> Iterator[Layout]:
    """Every way to arrange these numbers of ranks."""
    for num_ranks in numbers_of_ranks:
        sizes = _divisors(num_ranks)
        for pp, dp_replicate, dp_shard, cp, tp in product(sizes, repeat=5):
            if pp * dp_replicate * dp_shard * cp * tp != num_ranks:
                continue
            for etp in {1, tp}:
                for ep in _divisors(dp_shard * cp * tp // etp):
                    yield Layout(pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, tp=tp, ep=ep, etp=etp)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _print(cells: Sequence[str], widths: Sequence[int] = _WIDTHS) -> None:
    padded = (cell.ljust(width - 1) + " " for cell, width in zip(cells, widths, strict=False))
    print("".join(padded).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
