"""What the benchmarks of products share: options, formats, figures, and the table.

A call is a forward and a backward pass in bfloat16. FLOPs are those of plain products: 2 M N K for the output, as many
for the gradient of the input and, unless weights are frozen, for theirs. Casts are no FLOPs, nor are rows that groups
are padded with: they cost time only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from titanmoe.benchmarks.device_timing import describe_machine, pick_device, plain_product, seconds_in_turn
from titanmoe.benchmarks.low_precision import USUAL, build_converters, formats_for, job_options, without_backend
from titanmoe.benchmarks.turns import aligned, ratio, spread, summarize
from titanmoe.config import ConfigError
from titanmoe.converters.low_precision import LowPrecision
from titanmoe.ops.backends import Kind

DONE, MISTAKE = 0, 2
DTYPE = torch.bfloat16
PLAIN, _MATMUL = "bf16", "matmul"
CPU_PRESET = "cpu"

Row = dict[str, Any]
Calls = Mapping[str, Callable[[], object]]
"""A forward and a backward pass of each contender."""


@dataclass(frozen=True)
class Size:
    """Rows (m, k) times a weight (n, k), or times g of them, each with its group of rows."""

    m: int
    n: int
    k: int
    g: int | None = None


@dataclass(frozen=True)
class Setting:
    """What to compare, and where.

    Attributes:
        formats: the converters of each, one for a kind of product.
        left_out: why others are not compared.
    """

    device: torch.device
    num_rounds: int
    formats: Mapping[str, tuple[LowPrecision, ...]]
    left_out: Mapping[str, str]

    def fitting(self, *features: int) -> tuple[dict[str, tuple[LowPrecision, ...]], dict[str, str]]:
        """The formats that products with these numbers of features can have; why the others are left out."""
        formats, left_out = {}, dict(self.left_out)
        for name, converters in self.formats.items():
            multiple = max(converter.kernels().feature_multiple for converter in converters)
            odd = [str(number) for number in features if number % multiple]
            if odd:
                left_out[name] = f"{' and '.join(odd)} features: not a multiple of {multiple}"
            else:
                formats[name] = converters
        return formats, left_out


def run(
    benchmark: str, options: argparse.Namespace, kinds: Sequence[Kind], measure: Callable[[Setting], Sequence[Row]]
) -> int:
    """Choose what to compare, measure, print; the exit code."""
    try:
        setting = _setting(options, kinds)
        rows = measure(setting)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    report = {
        "benchmark": benchmark,
        **describe_machine(setting.device),
        "torch": torch.__version__,
        "rounds": setting.num_rounds,
        "backends": {
            name: {converter.name: converter.backend_name for converter in converters}
            for name, converters in setting.formats.items()
        },
        "rows": rows,
    }
    print(json.dumps(report, indent=1) if options.json else _table(report))
    return DONE


def add_options(parser: argparse.ArgumentParser, kinds: Sequence[Kind], presets: Sequence[str]) -> None:
    formats = formats_for(kinds)
    usual = [name for name in formats if name in USUAL]
    parser.add_argument("--preset", choices=presets, help=f"sizes; {CPU_PRESET} by default on a CPU, else {presets[1]}")
    parser.add_argument(
        "--formats", nargs="*", choices=formats, default=usual, help="besides bf16; default %(default)s"
    )
    parser.add_argument("--emulate", action="store_true", help="emulate formats that this device has no products in")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default a GPU if there is one")
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--json", action="store_true")


def _setting(options: argparse.Namespace, kinds: Sequence[Kind]) -> Setting:
    device = pick_device(options.device)
    formats, left_out = {}, {}
    for name in options.formats:
        missing = without_backend(name, kinds, device)
        if missing and not options.emulate:
            left_out[name] = f"{'; '.join(dict.fromkeys(missing.values()))} (--emulate computes it, slowly)"
        else:
            formats[name] = tuple(build_converters(job_options(name, kinds, missing), device))
    return Setting(device, options.rounds, formats, left_out)


def choose_preset(given: str | None, presets: Sequence[str], device: torch.device, is_small: bool) -> str:
    """
    Args:
        is_small: whether the number of rows is given, so that any preset will do on a CPU.

    Raises:
        ConfigError: a preset for GPUs on a CPU.
    """
    name = given or presets[0 if device.type == "cpu" else 1]
    if device.type == "cpu" and name != CPU_PRESET and not is_small:
        raise ConfigError(
            f"the sizes of {name} are for a GPU: a CPU would take hours",
            where="--preset",
            mend=f"Take {CPU_PRESET}, or say how many rows there are.",
        )
    return name


def choose_sizes(
    options: argparse.Namespace, presets: Mapping[str, Sequence[Size]], device: torch.device
) -> list[Size]:
    """The preset's sizes, with the dims that are given in the place of its own."""
    sizes = list(presets[choose_preset(options.preset, list(presets), device, is_small=options.m is not None)])
    for dim in ("m", "n", "k", "g"):
        given = getattr(options, dim, None)
        if given:
            sizes = [replace(size, **{dim: number}) for size in sizes for number in given]
    return list(dict.fromkeys(sizes))


def add_dims(parser: argparse.ArgumentParser, **dims: str) -> None:
    for dim, what in dims.items():
        parser.add_argument(f"--{dim}", type=positive, nargs="+", help=what)
    parser.add_argument("--frozen", action="store_true", help="no gradients of weights")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def weights_of(is_frozen: bool) -> str:
    return "frozen" if is_frozen else "trainable"


def compare(size: Size, is_frozen: bool, calls: Calls, left_out: Mapping[str, str], setting: Setting) -> Row:
    """Time the products of one size, and tell their figures."""
    seconds, matmul_rate = time_products(calls, setting)
    return {
        "size": {key: number for key, number in asdict(size).items() if number is not None},
        "weights": weights_of(is_frozen),
        "left_out": left_out,
        **figures(seconds, (2 if is_frozen else 3) * 2 * size.m * size.n * size.k, matmul_rate),
    }


def time_products(calls: Calls, setting: Setting) -> tuple[dict[str, list[float]], float]:
    """Seconds of every call by round, and the FLOP/s of a large plain product that takes part in all rounds."""
    matmul, matmul_flops = plain_product(setting.device, DTYPE)
    seconds = seconds_in_turn({**calls, _MATMUL: matmul}, setting.num_rounds, setting.device)
    return seconds, matmul_flops / statistics.median(seconds.pop(_MATMUL))


def figures(seconds: Mapping[str, Sequence[float]], flops: int, matmul_rate: float) -> Row:
    """What is printed of one size: `seconds` has the plain products, and those in each format."""
    products = {}
    for name, of_rounds in seconds.items():
        rate = flops / statistics.median(of_rounds)
        products[name] = {
            "seconds": summarize(of_rounds),
            "speedup": ratio(seconds[PLAIN], of_rounds),
            "tflops": rate / 1e12,
            "share_of_matmul_rate": rate / matmul_rate,
        }
    return {"flops": flops, "matmul_tflops": matmul_rate / 1e12, "products": products}


def _table(report: Row) -> str:
    rows, backends = report["rows"], report["backends"]
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}; forward and backward"]
    for name, of_converters in backends.items():
        lines.append(
            f"{name}: {', '.join(f'{converter} on {backend}' for converter, backend in of_converters.items())}"
        )
    if any("emulated" in of_converters.values() for of_converters in backends.values()):
        lines.append("What is emulated has the numbers of the hardware, and says nothing about its speed.")
    left_out = dict.fromkeys(f"{name} left out: {reason}" for row in rows for name, reason in row["left_out"].items())
    lines += [*left_out, ""]
    cells = [_cells(row, name, backends) for row in rows for name in row["products"]]
    return "\n".join([*lines, *aligned(cells)])


def _cells(row: Row, name: str, backends: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    product = row["products"][name]
    cells = {key.replace("_", " "): f"{number:,}" for key, number in row["size"].items()}
    cells |= {
        "weights": row["weights"],
        "product": name + (" (emulated)" if "emulated" in backends.get(name, {}).values() else ""),
        "ms": f"{1e3 * product['seconds']['median']:.2f}",
        "speedup (rounds)": "" if name == PLAIN else spread(product["speedup"]),
        "TFLOP/s": f"{product['tflops']:.3f}",
        "of matmul": f"{product['share_of_matmul_rate']:.0%}",
    }
    if "of_trainable" in product:
        cells["of trainable"] = f"{product['of_trainable']['median']:.2f}"
    if product.get("peak_bytes") is not None:
        cells["peak GiB"] = f"{product['peak_bytes'] / 2**30:.2f}"
    return cells
