"""What importing titanmoe costs and offers, and what its wheel would hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import titanmoe

CHECKOUT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["titanmoe", "titanmoe.config", "titanmoe.launch", "titanmoe.cli"])
def test_torch_is_not_imported(module: str) -> None:
    heavy = run_python(f"import sys, {module}; print(sorted({{'torch', 'numpy', 'datasets'}} & set(sys.modules)))")
    assert heavy == "[]"


def test_public_names_exist_where_they_are_said_to_be() -> None:
    """`titanmoe.__getattr__` finds what the type checker is told to find, and each of the homes is a module here."""
    source = (CHECKOUT / "titanmoe" / "__init__.py").read_text()
    told = {
        alias.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("titanmoe.")
        for alias in node.names
    }
    assert told == titanmoe._HOME_OF
    assert set(titanmoe.__all__) == {*told, "__version__"}
    for name, module in told.items():
        assert find_spec(module), f"titanmoe.{name} lies in {module}, which does not exist"


def test_public_names_are_imported_on_first_use() -> None:
    from titanmoe.config import JobConfig, load_config

    assert titanmoe.JobConfig is JobConfig
    assert titanmoe.load_config is load_config
    assert {"JobConfig", "Trainer", "from_pretrained"} <= set(dir(titanmoe))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'from_pretrainedd'"):
        titanmoe.from_pretrainedd  # noqa: B018


def test_every_folder_with_python_is_a_package() -> None:
    """setuptools leaves a folder without __init__.py out of the wheel."""
    package = CHECKOUT / "titanmoe"
    folders = {path.parent for path in package.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_the_wheel_would_hold_the_train_configs() -> None:
    inside = {path.name for path in (CHECKOUT / "titanmoe" / "train_configs").glob("*.toml")}
    assert inside == {path.name for path in (CHECKOUT / "train_configs").glob("*.toml")}
    assert "debug_qwen3_moe.toml" in inside


def test_constraints_pin_every_dependency() -> None:
    pinned = set(re.findall(r"^([a-z0-9_-]+)==", (CHECKOUT / "constraints.txt").read_text(), re.MULTILINE))
    project = (CHECKOUT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev) = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    wanted = set(re.findall(r'^ +"([a-z0-9_-]+)', "".join(lists), re.MULTILINE))
    assert {"torch", "torchao", "pytest"} <= wanted
    assert wanted <= pinned
