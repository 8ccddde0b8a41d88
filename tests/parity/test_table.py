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
from tests.parity.compare import Row, compare
from tests.parity.variants import VARIANTS
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import FAMILIES

_GOOD = Row("qwen3", "moe", 1e-6, 2e-6, "norm.weight", 1e-6, 3e-6, "output.weight", 8e-3, 9e-3)


def test_every_family_has_variants() -> None:
    assert set(VARIANTS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "variant"), [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, family: str, variant: str) -> None:
    row = compare(family, variant, *VARIANTS[family][variant], tmp_path)
    assert not row.failures, table([row])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("layers.1.ffn_norm.weight", {"logits", "gradient", "packed_logits", "packed_gradient", "bf16"}),
        ("layers.0.moe.experts.down", {"logits", "gradient", "packed_logits", "packed_gradient", "bf16"}),
    ],
)
def test_a_model_that_differs_fails_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: set[str]
) -> None:
    real = titanmoe.from_pretrained

    def load(path: Path, dtype: torch.dtype) -> Decoder:
        model = real(path, dtype=dtype)
        if path.name == "model":
            model.get_parameter(name).data.mul_(1.2)
        return model

    monkeypatch.setattr(titanmoe, "from_pretrained", load)
    row = compare("qwen3", "moe", *VARIANTS["qwen3"]["moe"], tmp_path)
    assert {failure.partition(" ")[0] for failure in row.failures} == changes


def test_documents_that_see_each_other_fail_where_they_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Decoder.forward

    def leaky(self: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        return forward(self, tokens, **{**options, "cu_seqlens": None})

    monkeypatch.setattr(Decoder, "forward", leaky)
    row = compare("qwen3", "dense", *VARIANTS["qwen3"]["dense"], tmp_path)
    assert {failure.partition(" ")[0] for failure in row.failures} == {"packed_logits", "packed_gradient"}


@pytest.mark.parametrize("name", ["logits", "gradient", "packed_logits", "packed_gradient", "bf16"])
@pytest.mark.parametrize("value", [1e-1, float("nan"), float("inf")])
def test_each_figure_can_fail_a_row(name: str, value: float) -> None:
    assert not _GOOD.failures
    (failure,) = replace(_GOOD, **{name: value}).failures
    assert failure.startswith(f"{name} is")


def test_the_command_prints_aligned_columns_and_fails_with_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_row(family: str, variant: str, *_: object) -> Row:
        return replace(_GOOD, variant=variant, logits=1.0 if variant == "dense_tied" else 1e-6)

    monkeypatch.setattr("tests.parity.__main__.compare", some_row)
    assert main(["qwen3"]) == 1
    header, *rows, failure = capsys.readouterr().out.splitlines()
    assert len(rows) == len(VARIANTS["qwen3"])
    column = header.index("worst gradient of")
    assert all(row[column:] == "output.weight" for row in rows)
    assert [row.split()[1] for row in rows if "FAIL" in row] == ["dense_tied"]
    assert failure == "qwen3 dense_tied: logits is 1.0e+00, allowed is 1.0e-04"
    assert main(["qwen3", "--json"]) == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["variant"] for row in printed if row["failures"]} == {"dense_tied"}
    monkeypatch.setattr("tests.parity.__main__.compare", lambda *_: _GOOD)
    assert main(["qwen3"]) == 0
    with pytest.raises(SystemExit):
        main(["quen3"])
