"""The rules that keep the house habitable: who imports whom, how long files get, and that no pickle is ever loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "titanmoe"
# From the top of the house to its ground floor. A room may import the rooms on later lines.
FLOORS = (
    ("train", "cli", "launch"),
    ("benchmarks",),
    ("trainer",),
    ("planning",),
    ("evaluation",),
    ("metrics",),
    ("checkpoint",),
    ("training",),
    ("data",),
    ("parallel",),
    ("converters",),
    ("models",),
    ("ops",),
    ("config",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ALONE = ("ops", "config")
WITHOUT_TORCH = ("config", "launch")
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that `source` imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # "from . import x" in a.b.c is a.b.x; a package's own __init__ is given as a.b.__init__
            base = module.split(".")[: -node.level] if node.level else []
            stem = ".".join([*base, node.module] if node.module else base)
            # In "from titanmoe import x" the room is x; elsewhere the stem names it.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def imports_of(path: Path) -> list[tuple[int, str]]:
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return list(imported_modules(path.read_text(), module))


def forbidden(room: str, imported: str) -> str:
    """Why `room` may not import the dotted name, or "" if it may."""
    package, _, rest = imported.partition(".")
    if package == "torch" and room in WITHOUT_TORCH:
        return f"{room} imports no torch"
    if package != "titanmoe" or rest == "__version__":
        return ""
    other = rest.partition(".")[0]
    if other not in FLOOR_OF:
        return f"{other!r} is no room: import from the room that defines it"
    if other == room:
        return ""
    if room in ALONE:
        return f"{room} imports no other room"
    return "" if FLOOR_OF[room] < FLOOR_OF[other] else f"{room} does not stand above {other}"


def test_imports_go_only_downwards() -> None:
    wrong = [
        f"{relative(path)}:{line}: {imported}: {reason}"
        for path in python_files()
        if path != PACKAGE / "__init__.py"  # the library's front door names what lies in any room
        for line, imported in imports_of(path)
        if (reason := forbidden(room_of(path), imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("models", "from titanmoe.ops.grouped_mm import grouped_mm", True),
        ("models", "def f():\n    from titanmoe.data.batch import Batch", False),
        ("models", "if TYPE_CHECKING:\n    import titanmoe.parallel.mesh", False),
        ("models", "from titanmoe import training", False),
        ("models", "from ..training import loss", False),
        ("models", "from .spec import DecoderSpec", True),
        ("ops", "from titanmoe.config import ConfigError", False),
        ("config", "import torch.nn", False),
        ("launch", "from torch import nn", False),
        ("train", "from titanmoe.launch import main", False),
        ("cli", "from titanmoe import __version__", True),
        ("cli", "from titanmoe import Trainer", False),
    ],
)
def test_the_import_rule_itself(room: str, source: str, allowed: bool) -> None:
    """The checker sees imports in functions, under TYPE_CHECKING, and relative ones."""
    reasons = [forbidden(room, imported) for _, imported in imported_modules(source, f"titanmoe.{room}.module")]
    assert reasons
    assert any(reasons) != allowed


def test_every_file_has_its_room() -> None:
    rooms = {room_of(path) for path in python_files()} - {"__init__"}
    assert rooms <= set(FLOOR_OF), f"new rooms want a floor: {sorted(rooms - set(FLOOR_OF))}"


def test_files_stay_short() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in python_files()}
    too_long = {name: length for name, length in lengths.items() if length > 600}
    assert not too_long, f"files of more than 600 lines want a split: {too_long}"
    counted = [path for path in python_files() if not {"families", "benchmarks"} & set(path.parts)]
    total = sum(num_lines_of_code(path.read_text()) for path in counted)
    assert total < 17_500, f"the package without its families and benchmarks has {total} lines of code"


def num_lines_of_code(source: str) -> int:
    """Without blank lines, comments and docstrings, which nobody should be tempted to save."""
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    return sum(number not in texts and bool(line.strip()) and line.strip()[0] != "#" for number, line in lines)


def test_the_count_of_lines_itself() -> None:
    source = '"""Doc."""\n\nx = 1  # note\n# remark\ndef f():\n    """Two\n    lines."""\n    return "text"\n'
    assert num_lines_of_code(source) == 3


def unpickling_calls(source: str) -> list[tuple[int, str]]:
    """(line, call) of every call that would unpickle what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            found.append((node.lineno, f"from {node.module} import ..."))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        owner, _, function = name.rpartition(".")
        if owner in UNPICKLERS and function in ("load", "loads", "Unpickler", "open"):
            found.append((node.lineno, name))
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append((node.lineno, "torch.load without weights_only=True"))
        if keywords.get("allow_pickle", "False") != "False":
            found.append((node.lineno, f"{name} with allow_pickle"))
    return found


def test_no_pickle_is_loaded() -> None:
    wrong = [
        f"{relative(path)}:{line}: {call}"
        for path in python_files()
        for line, call in unpickling_calls(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "unpickles"),
    [
        ("torch.load(path, weights_only=True)", False),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=flag)", True),
        ("pickle.loads(data)", True),
        ("from pickle import load", True),
        ("pickle.dumps(data)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("json.load(file)", False),
    ],
)
def test_the_pickle_rule_itself(source: str, unpickles: bool) -> None:
    assert bool(unpickling_calls(source)) == unpickles
