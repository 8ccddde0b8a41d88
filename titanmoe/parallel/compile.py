"""torch.compile, layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titanmoe import ops


def compile_layers(layers: Iterable[nn.Module], backend: str | Callable[..., Any]) -> None:
    """Compile each layer's forward pass, and with it its backward pass, when it first runs; in place."""
    tag = f"titanmoe-{_fingerprint(Path(ops.__file__).parent)}"
    config = torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag
    for layer in layers:
        # Of torch 2.11 to 2.13. Numbers of a model are constants; one that another model has otherwise would become a
        # variable, which 2.13 cannot compile where it is used inside an autograd Function and outside of it, too.
        constants = torch._dynamo.config.patch(specialize_float=True)
        layer.forward = constants(torch.compile(layer.forward, backend=backend))


def _fingerprint(folder: Path) -> str:
    """Of the source of operators. A compiler keeps what it made on disk, and finds it by the names of operators: it
    does not know that one of them now returns another layout, and would fail, or read the old one.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
