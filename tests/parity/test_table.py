"""Every row of the parity table, and that the table can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import titanmoe
from tests.parity.__main__ import main, table
from tests.parity.compare import Errors, Row, compare
from tests.parity.variants import VARIANTS
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import FAMILIES

_ROWS = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
_GOOD = Errors(1e-6, 2e-6, "norm.weight", 8e-3, 9e-3)
_FIGURES = {"logits", "gradient", "bf16"}


def test_every_family_has_variants() -> None:
    assert set(VARIANTS) == set(FAMILIES)


@pytest.mark.parametrize(("family", "variant"), _ROWS)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, family: str, variant: str) -> None:
    row = compare(family, variant, *VARIANTS[family][variant], tmp_path)
    assert not row.failures, table([row])


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "variant"), _ROWS)
def test_logits_and_gradients_are_those_of_transformers_on_a_gpu(tmp_path: Path, family: str, variant: str) -> None:
    row = compare(family, variant, *VARIANTS[family][variant], tmp_path, "cuda")
    assert not row.failures, table([row])


@pytest.mark.parametrize("name", ["layers.1.ffn_norm.weight", "layers.0.moe.experts.down"])
def test_a_model_that_differs_fails_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = titanmoe.from_pretrained

    def load(path: Path, **options: Any) -> Decoder:
        model = real(path, **options)
        if path.name == "model":
            model.get_parameter(name).data.mul_(1.2)
        return model

    monkeypatch.setattr(titanmoe, "from_pretrained", load)
    row = compare("qwen3", "moe", *VARIANTS["qwen3"]["moe"], tmp_path)
    assert _failing(row.whole) == _failing(row.packed) == _FIGURES


def test_documents_that_see_each_other_fail_where_they_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Decoder.forward

    def leaky(self: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        return forward(self, tokens, **{**options, "cu_seqlens": None})

    monkeypatch.setattr(Decoder, "forward", leaky)
    row = compare("qwen3", "dense", *VARIANTS["qwen3"]["dense"], tmp_path)
    assert not row.whole.failures
    assert _failing(row.packed) == _FIGURES


def _failing(errors: Errors) -> set[str]:
    return {failure.partition(" ")[0] for failure in errors.failures}


@pytest.mark.parametrize("name", sorted(_FIGURES))
@pytest.mark.parametrize("value", [1e-1, float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["whole", "packed"])
def test_each_figure_can_fail_a_row(part: str, name: str, value: float) -> None:
    good = Row("qwen3", "moe", _GOOD, _GOOD)
    assert not good.failures
    (failure,) = replace(good, **{part: replace(_GOOD, **{name: value})}).failures
    assert failure.startswith(f"packed {name} is" if part == "packed" else f"{name} is")


def test_the_command_prints_aligned_columns_and_fails_with_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_row(family: str, variant: str, *_: object) -> Row:
        return Row(family, variant, replace(_GOOD, logits=1.0) if variant == "dense_tied" else _GOOD, _GOOD)

    monkeypatch.setattr("tests.parity.__main__.compare", some_row)
    assert main(["qwen3"]) == 1
    header, *rows, failure = capsys.readouterr().out.splitlines()
    assert len(rows) == len(VARIANTS["qwen3"])
    column = header.index("worst gradient of")
    assert all(row[column:] == "norm.weight" for row in rows)
    assert [row.split()[1] for row in rows if "FAIL" in row] == ["dense_tied"]
    assert failure == "qwen3 dense_tied: logits is 1.0e+00, allowed is 1.0e-04"
    assert main(["qwen3", "--json"]) == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["variant"] for row in printed if row["failures"]} == {"dense_tied"}
    monkeypatch.setattr("tests.parity.__main__.compare", lambda family, variant, *_: Row(family, variant, _GOOD, _GOOD))
    assert main(["qwen3"]) == 0
    with pytest.raises(SystemExit):
        main(["quen3"])
