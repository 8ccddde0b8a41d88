"""Errors of products in low precision: python -m titanmoe.benchmarks.sqnr [--json].

Every recipe of every converter, on every backend that this device has, forward and backward, beside float64: the ratio
of signal to error of the output and of both gradients. Experts have rows that belong to none of them, which hold NaN.
Exit code 1 says that an error is too large.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.config import ConfigError, load_config
from titanmoe.converters.apply import CONVERTERS
from titanmoe.converters.low_precision import LowPrecision
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.scaled_product import ScaledGroupedProduct, ScaledLinearProduct

LEAST_DB = 27.0
"""Rounding to three bits of mantissa gives 31.5 dB, two such operands 28.5, and 27.4 where large values are cut."""
LEAST_UNROUNDED_DB = 48.0
"""bfloat16 gives 55."""

_N, _K = 256, 384
_TAIL = 64
_ROWS = {
    "linear": {"even rows": [256], "odd rows": [77], "frozen": [128]},
    "experts": {
        "even rows": [64, 128, 32, 96],
        "odd rows": [1, 213, 33, 7],
        "experts without rows": [0, 77, 0, 91],
        "all rows at one": [0, 0, 171, 0],
        "frozen": [30, 1, 0, 97],
    },
}


@dataclass(frozen=True)
class Contender:
    """A way to compute products.

    Attributes:
        kind: "linear" or "experts".
        name: of the converter and its recipe.
        product: in the place of `F.linear` or of a `PlainGroupedProduct`.
        row_multiple: what numbers of rows are padded to.
        rounds: whether operands of the product and of the gradient of the weight are rounded.
    """

    kind: str
    name: str
    backend: str
    product: Any
    row_multiple: int = 1
    rounds: tuple[bool, bool] = (True, True)


@dataclass(frozen=True)
class Result:
    """Ratios of signal to error in dB; that of a gradient that is not computed is None."""

    kind: str
    name: str
    backend: str
    situation: str
    out: float
    dx: float
    dw: float | None
    is_right: bool


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m titanmoe.benchmarks.sqnr", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="by default the GPU, if there is one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(args)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    left_out: dict[str, str] = {}
    results = [
        measure(contender, situation, counts, device)
        for contender in contenders(device, left_out)
        for situation, counts in _ROWS[contender.kind].items()
    ]
    report = {
        "benchmark": "sqnr",
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "least_db": {"rounded": LEAST_DB, "unrounded": LEAST_UNROUNDED_DB},
        "results": [asdict(result) for result in results],
        "left_out": left_out,
        "right": all(result.is_right for result in results),
    }
    print(json.dumps(report, indent=2) if options.json else _table(results, report))
    return 0 if report["right"] else 1


def contenders(device: torch.device, left_out: dict[str, str]) -> Iterator[Contender]:
    """Plain products, then every recipe on every backend. Why a backend is not there is noted in `left_out`."""
    yield Contender("linear", "bfloat16", "torch", F.linear, rounds=(False, False))
    yield Contender("experts", "bfloat16", "torch", PlainGroupedProduct(), rounds=(False, False))
    defaults = load_config(None, [])
    for name in (name for name, kind in CONVERTERS.items() if issubclass(kind, LowPrecision)):
        hints = get_type_hints(type(functools.reduce(getattr, name.split("."), defaults)))
        for backend in _choices(hints["backend"]):
            for recipe in _choices(hints["recipe_name"]):
                settings = [
                    f"--model.converters={name}",
                    f"--{name}.recipe_name={recipe}",
                    f"--{name}.backend={backend}",
                ]
                try:
                    converter = CONVERTERS[name].from_job(load_config(None, settings), device)
                except ConfigError as error:
                    left_out[f"{name}, {backend}"] = error.what
                    break
                assert isinstance(converter, LowPrecision)
                kernels, rounds = converter.kernels(), converter.rounds_weight_gradient
                yield Contender(
                    "linear" if converter.kind == "linear" else "experts",
                    f"{name.removeprefix('quantize.')} {recipe}",
                    converter.backend_name,
                    (ScaledLinearProduct if converter.kind == "linear" else ScaledGroupedProduct)(kernels, rounds),
                    kernels.row_multiple(rounds),
                    (True, rounds),
                )


def _choices(hint: Any) -> list[str]:
    """Those of a `Literal`, or of one that may be None; all but "auto"."""
    choices = [choice for arg in get_args(hint) for choice in (get_args(arg) or [arg])]
    return [choice for choice in choices if isinstance(choice, str) and choice != "auto"]


def measure(contender: Contender, situation: str, counts: Sequence[int], device: torch.device) -> Result:
    """One forward and backward pass.

    Args:
        situation: in "frozen", the weight has no gradient.
        counts: numbers of rows of the experts, or the one of a linear layer.
    """
    is_linear, is_frozen = contender.kind == "linear", situation == "frozen"
    counts = [-(-count // contender.row_multiple) * contender.row_multiple for count in counts]
    generator = torch.Generator(device).manual_seed(0)
    num_rows = sum(counts)
    x_RK, w_ENK, dy_RN = (
        (torch.randn(shape, generator=generator, device=device) * factor).bfloat16()
        for shape, factor in (((num_rows, _K), 1.0), ((len(counts), _N, _K), _K**-0.5), ((num_rows, _N), 1e-3))
    )
    exact = _exact(x_RK, w_ENK, dy_RN, counts)
    if not is_linear:
        x_RK, dy_RN = (F.pad(rows, (0, 0, 0, _TAIL), value=float("nan")) for rows in (x_RK, dy_RN))
    x_RK.requires_grad_()
    w = (w_ENK[0] if is_linear else w_ENK).requires_grad_(not is_frozen)
    offsets_E = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    y_RN = contender.product(x_RK, w) if is_linear else contender.product(x_RK, w, offsets_E)
    gradients = torch.autograd.grad(y_RN, [x_RK] if is_frozen else [x_RK, w], dy_RN)
    ratios = [_decibels(value.detach(), ideal) for value, ideal in zip((y_RN, *gradients), exact, strict=False)]
    rounds = (contender.rounds[0], *contender.rounds)
    least = [LEAST_DB if is_rounded else LEAST_UNROUNDED_DB for is_rounded in rounds]
    is_right = all(ratio >= limit for ratio, limit in zip(ratios, least, strict=False))  # NaN is not
    out, dx, dw = (*ratios, None)[:3]
    assert out is not None and dx is not None
    return Result(contender.kind, contender.name, contender.backend, situation, out, dx, dw, is_right)


def _exact(x_RK: Tensor, w_ENK: Tensor, dy_RN: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw in float64."""
    x, w, dy = x_RK.double().split(counts), w_ENK.double(), dy_RN.double().split(counts)
    experts = range(len(counts))
    y_RN = torch.cat([x[expert] @ w[expert].t() for expert in experts])
    dx_RK = torch.cat([dy[expert] @ w[expert] for expert in experts])
    return y_RN, dx_RK, torch.stack([dy[expert].t() @ x[expert] for expert in experts])


def _decibels(value: Tensor, ideal: Tensor) -> float:
    """What is beyond the ideal is to be zero."""
    ideal = F.pad(ideal, (0, 0, 0, value.shape[-2] - ideal.shape[-2]))
    return float(20 * torch.log10(ideal.norm() / (value.double() - ideal).norm()))


def _table(results: Sequence[Result], report: dict[str, Any]) -> str:
    width = max(len(result.name) for result in results) + 2
    lines = [
        f"dB of signal to error, bfloat16 on {report['device']}, torch {report['torch']}; {LEAST_DB:g} at least, "
        f"{LEAST_UNROUNDED_DB:g} where nothing is rounded",
        "",
        f"{'':9}{'':{width}}{'backend':20}{'':22}{'out':>6}{'dx':>7}{'dw':>7}",
    ]
    last = None
    for result in results:
        head = (result.kind, result.name, result.backend)
        cells = ("", "", "") if head == last else head
        last = head
        dw = "-" if result.dw is None else f"{result.dw:.1f}"
        lines.append(
            f"{cells[0]:9}{cells[1]:{width}}{cells[2]:20}{result.situation:22}{result.out:6.1f}{result.dx:7.1f}{dw:>7}"
            + ("" if result.is_right else "  TOO LOW")
        )
    lines += ["", *(f"without {what}: {why}" for what, why in report["left_out"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
