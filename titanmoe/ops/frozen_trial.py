"""Frozen products on trial: they take plain weights, so that they are tried as others are, and are timed beside
dequantising.

Shape suffixes: R rows, E experts, N output features, K input features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titanmoe.ops.backends import Kind
from titanmoe.ops.frozen import FrozenGroupedProduct, FrozenKernels, FrozenLinearProduct, FrozenWeight
from titanmoe.ops.frozen_formats import Format

_NUM_ROUNDS = 10
_SIZES = {"linear": (8192, 4096, 4096), "grouped_mm": (8192, 1536, 2048)}
"""R, N, K of a middle-sized model."""
_NUM_EXPERTS = 64


class OfPlainWeights:
    """A frozen product whose weights are quantised when it is called, (N, K) or (E, N, K)."""

    def __init__(self, kind: Kind, format: Format, kernels: FrozenKernels | None) -> None:
        self.format, self.is_stack = format, kind == "grouped_mm"
        self.product: Any = FrozenGroupedProduct(kernels=kernels) if self.is_stack else FrozenLinearProduct(kernels)

    def __call__(self, x: Tensor, w: Tensor, *arguments: Any) -> Tensor:
        return self.product(x, self.stored(w.detach().float()), *arguments)

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        return self.product.row_multiple(x, trains)

    def stored(self, w: Tensor) -> FrozenWeight:
        parts = [self.format.quantize(matrix) for matrix in (w if self.is_stack else [w])]
        stacks = (torch.stack(part) if self.is_stack else part[0] for part in zip(*parts, strict=True))
        return FrozenWeight(self.format, tuple(stacks), self.is_stack)


def slowness(kind: Kind, format: Format, kernels: FrozenKernels, device: torch.device) -> str:
    """Whether kernels are slower than dequantising, forward and backward, and by how much; "" if they are not."""
    num_rows, num_outputs, num_inputs = _SIZES[kind]
    experts = (_NUM_EXPERTS,) if kind == "grouped_mm" else ()
    x, w, dy = (
        torch.randn(*sizes, device=device, dtype=torch.bfloat16)
        for sizes in ((num_rows, num_inputs), (*experts, num_outputs, num_inputs), (num_rows, num_outputs))
    )
    x.requires_grad_()
    weight = OfPlainWeights(kind, format, None).stored(w)
    ends = torch.arange(1, _NUM_EXPERTS + 1, device=device, dtype=torch.int32) * (num_rows // _NUM_EXPERTS)
    arguments = (ends, num_rows) if experts else ()

    def call(product: Any) -> Callable[[], object]:
        return lambda: torch.autograd.grad(product(x, weight, *arguments), x, dy)

    native, plain = seconds(*(call(OfPlainWeights(kind, format, it).product) for it in (kernels, None)))
    return "" if native < plain else f"takes {native * 1e3:.2f} ms where dequantising takes {plain * 1e3:.2f} ms"


def seconds(*calls: Callable[[], object]) -> list[float]:
    """The least that each takes, of some rounds in turn after one that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + _NUM_ROUNDS):
        for of_one, call in zip(taken, calls, strict=True):
            _wait()
            begin = time.perf_counter()
            call()
            _wait()
            of_one.append(time.perf_counter() - begin)
    return [min(of_one[1:]) for of_one in taken]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
