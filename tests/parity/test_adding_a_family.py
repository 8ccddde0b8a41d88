"""The worked example of docs/adding_a_family.md is a family like any other."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.models.family_checks import check_flavor
from tests.models.test_keys import check_file_tensors
from tests.parity.compare import compare
from tests.parity.test_round_trip import check_round_trip
from titanmoe.metrics.flops import num_parameters
from titanmoe.models import family as registry

_PAGE = Path(__file__).parents[2] / "docs" / "adding_a_family.md"
_VARIANTS = ("window", "no_window_tied")


def _blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[registry.Family]:
    """Mistral, registered as the page says: a module of that name, and an entry in FAMILIES."""
    name = "titanmoe.models.families.mistral"
    module = ModuleType(name)
    exec(compile(_blocks()[0], str(_PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "mistral"))
    yield registry.get_family("mistral")


def _options(variant: str) -> tuple[str, dict[str, Any]]:
    values: dict[str, Any] = {}
    exec(compile(_blocks()[1], str(_PAGE), "exec"), values)
    assert tuple(values["VARIANTS"]["mistral"]) == _VARIANTS
    return values["VARIANTS"]["mistral"][variant]


@pytest.mark.parametrize("variant", _VARIANTS)
def test_parity_and_round_trip(family: registry.Family, variant: str, tmp_path: Path) -> None:
    assert not compare("mistral", variant, *_options(variant), tmp_path / "parity").failures
    for dtype in (torch.float32, torch.bfloat16):
        check_round_trip(*_options(variant), tmp_path / str(dtype), dtype)


def test_flavors(family: registry.Family, tmp_path: Path) -> None:
    for flavor in family.flavors:
        check_flavor(family, flavor)
        check_file_tensors(family, flavor, tmp_path)
    # The size that transformers' model of the published config.json has: "7B".
    assert num_parameters(family.flavor("7B")).total == 7_241_732_096
