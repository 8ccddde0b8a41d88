"""The help of a key is the docstring under its field. Python does not keep it, so it is read from the source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the text under that field of a dataclass, as one paragraph. Fields without a text are absent."""
    (class_node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(class_node, ast.ClassDef)
    docs = {}
    for statement, below in pairwise(class_node.body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = _one_paragraph(text)
    return docs


def class_doc(cls: type) -> str:
    """The docstring of a section as one paragraph."""
    return _one_paragraph(cls.__doc__ or "")


def _one_paragraph(text: str) -> str:
    return " ".join(text.split())
