"""The command that prints errors of products: what it covers, and that it tells what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from titanmoe.benchmarks import sqnr
from titanmoe.benchmarks.sqnr import Contender, measure
from titanmoe.config.sections.quantize import CONVERTERS
from titanmoe.ops import emulated
from titanmoe.ops.grouped_mm import PlainGroupedProduct

CPU = torch.device("cpu")


def test_every_recipe_in_every_situation(capsys: pytest.CaptureFixture[str]) -> None:
    assert sqnr.main(["--device", "cpu", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    natives = ("scaled_mm", "torchao", "scaled_grouped_mm", "torchao")
    assert report["right"]
    assert set(report["left_out"]) == {f"{name}, {native}" for name, native in zip(CONVERTERS, natives, strict=False)}
    found = {(result["kind"], result["name"]) for result in report["results"]}
    assert found == {
        ("linear", "bfloat16"),
        ("experts", "bfloat16"),
        *(("linear", f"linear.float8 {recipe}") for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp")),
        *(
            ("linear", f"linear.mx {recipe}")
            for recipe in ("mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_rceil_wgrad_with_hp")
        ),
        *(("experts", f"grouped_mm.float8 {recipe}") for recipe in ("rowwise", "rowwise_with_gw_hp")),
        *(("experts", f"grouped_mm.mx {recipe}") for recipe in ("mxfp8", "mxfp8_wgrad_with_hp")),
    }
    for result in report["results"]:
        name, gradient = result["name"], result["dw"]
        rounded = (27.0, 29.0)
        unrounded = (55.0, 56.0)
        ranges = {"out": rounded, "dx": rounded, "dw": unrounded if name.endswith("hp") else rounded}
        assert (gradient is None) == (result["situation"] == "frozen")
        for key, (low, high) in ranges.items():
            low, high = unrounded if name == "bfloat16" else (low, high)
            assert result[key] is None or low < result[key] < high, result


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Here: a gradient of weights that is a little too large."""
    right = emulated.EmulatedKernels.weight_gradient
    monkeypatch.setattr(emulated.EmulatedKernels, "weight_gradient", lambda *args: right(*args) * 1.05)
    assert sqnr.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.endswith("TOO LOW")]
    assert len(wrong) == 4 * 2 + 2 * 4  # recipes that round it, in the situations that have it


@pytest.mark.parametrize("wrong", ["tail", "nan", "swapped experts"])
def test_experts_that_are_wrong(wrong: str) -> None:
    def product(x_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        y_RN = PlainGroupedProduct()(x_RK, w_ENK.flip(0) if wrong == "swapped experts" else w_ENK, offsets_E)
        beyond = F.pad(torch.zeros(y_RN.shape[0] - 1, 1), (0, 0, 0, 1), value=1.0)
        return y_RN if wrong == "swapped experts" else y_RN + beyond * (1.0 if wrong == "tail" else float("nan"))

    contender = Contender("experts", "wrong", "torch", product, rounds=(False, False))
    assert not measure(contender, "even rows", [16, 16, 16, 16], CPU).is_right
    right = Contender("experts", "right", "torch", PlainGroupedProduct(), rounds=(False, False))
    assert measure(right, "even rows", [16, 16, 16, 16], CPU).is_right


def test_rows_are_padded_to_what_a_backend_needs() -> None:
    seen = []

    def product(x_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        seen.append(offsets_E.tolist())
        return PlainGroupedProduct()(x_RK, w_ENK, offsets_E)

    contender = Contender("experts", "padded", "torch", product, row_multiple=16, rounds=(False, False))
    assert measure(contender, "odd rows", [1, 16, 0, 33], CPU).is_right
    assert seen == [[16, 32, 32, 80]]


@pytest.mark.gpu
def test_on_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """With whatever backends this GPU has."""
    assert sqnr.main(["--device", "cuda", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    backends = {result["backend"] for result in report["results"]}
    if torch.cuda.get_device_capability() == (9, 0):
        assert backends == {"torch", "emulated", "scaled_mm", "scaled_grouped_mm"}
