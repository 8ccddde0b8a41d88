"""What the standard library says of itself: signatures and docstrings, read from its sources without importing them."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from titanmoe.config.errors import ConfigError
from titanmoe.data.sources import Split, stdlib_files

# Programs, tables and private modules: many files, little documentation.
NOT_DOCUMENTATION = ("idlelib/", "lib2to3/", "encodings/", "turtledemo/", "pydoc_data/", "ensurepip/", "_")


@dataclass(frozen=True)
class Doc:
    """A public function, method or class with its docstring.

    Attributes:
        kind: "function", "method" or "class".
        name: with module and class, such as textwrap.TextWrapper.fill.
        signature: the name with its parameters; a class has those of __init__.
        answer: the first paragraph of the docstring.
    """

    kind: str
    name: str
    signature: str
    answer: str

    @property
    def question(self) -> str:
        return f"What does the {self.kind} `{self.signature}` do?"


def stdlib_docs(split: Split) -> list[Doc]:
    """All of one part of the standard library, in the order of files and lines, the same for the same sources.

    Files are split as those of the data set `stdlib`, so that no docstring of one part is text of the other.

    Raises:
        ConfigError: this Python has no source files, or they are without docstrings.
    """
    docs: dict[Doc, None] = {}  # some are defined twice, for two systems
    root, names = stdlib_files(split)
    for name in names:
        if name.startswith(NOT_DOCUMENTATION):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse((root / name).read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        docs.update(dict.fromkeys(_docs_in(tree, module)))
    if not docs:
        raise ConfigError(
            "the standard library's sources have no docstrings",
            where=str(root),
            mend='Use a Python that ships them, or give conversations: training.dataset = "chat".',
        )
    return list(docs)


def _docs_in(parent: ast.Module | ast.ClassDef, path: str) -> Iterator[Doc]:
    for node in parent.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            kind = "method" if isinstance(parent, ast.ClassDef) else "function"
            yield from _doc(node, kind, f"{path}.{node.name}", node.args)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            functions = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
            yield from _doc(node, "class", f"{path}.{node.name}", getattr(functions.get("__init__"), "args", None))
            yield from _docs_in(node, f"{path}.{node.name}")


def _doc(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, kind: str, name: str, args: ast.arguments | None
) -> Iterator[Doc]:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").partition("\n\n")[0].strip()
    if text:
        parameters = "" if args is None else ast.unparse(args)
        first, _, rest = parameters.partition(", ")
        yield Doc(kind, name, f"{name}({rest if first in ('self', 'cls') else parameters})", text)
