"""Products of experts and of linear layers, computed and compared: for tests of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from titanmoe.ops.scaled_product import Kernels, ScaledGroupedProduct, ScaledLinearProduct


@dataclass(frozen=True)
class Products:
    """A product and its gradients; those of an expert without rows are zero, as are rows of no expert."""

    y: Tensor
    dx: Tensor
    dw: Tensor

    def decibels_to(self, expected: Products) -> dict[str, float]:
        """Signal-to-noise ratios."""
        return {
            name: float(20 * torch.log10(wanted.norm() / (found.double().to(wanted.device) - wanted).norm()))
            for name, found in vars(self).items()
            for wanted in [getattr(expected, name).double()]
        }


@dataclass(frozen=True)
class Operands:
    """Rows of experts, then a tail that is of none, full of NaN; without `num_rows`, rows of a linear layer."""

    x: Tensor
    w: Tensor
    dy: Tensor
    num_rows: tuple[int, ...] | None = None

    @property
    def offsets(self) -> Tensor:
        assert self.num_rows is not None
        return torch.tensor(self.num_rows, device=self.x.device).cumsum(0).int()

    def computed_by(self, kernels: Kernels) -> Products:
        x, w = self.x.detach().requires_grad_(), self.w.detach().requires_grad_()
        if self.num_rows is None:
            y = ScaledLinearProduct(kernels)(x, w)
        else:
            y = ScaledGroupedProduct(kernels)(x, w, self.offsets)
        return Products(y.detach(), *torch.autograd.grad(y, (x, w), self.dy))

    def exact(self) -> Products:
        """In float64."""
        x, w, dy = self.x.double(), self.w.double(), self.dy.double()
        if self.num_rows is None:
            return Products(x @ w.t(), dy @ w, dy.t() @ x)
        found = Products(torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(w))
        start = 0
        for expert, number in enumerate(self.num_rows):
            rows, start = slice(start, start + number), start + number
            found.y[rows] = x[rows] @ w[expert].t()
            found.dx[rows] = dy[rows] @ w[expert]
            found.dw[expert] = dy[rows].t() @ x[rows]
        return found


def random_operands(
    num_rows: tuple[int, ...] | int,
    num_inputs: int,
    num_outputs: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    tail: int = 32,
) -> Operands:
    """Rows and columns differ in size by powers of two. An integer for `num_rows` is that of a linear layer."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        sizes = torch.randint(-3, 4, (shape[-2], 1), generator=generator).float().exp2()
        return (torch.randn(*shape, generator=generator) * sizes).to(device, dtype)

    if isinstance(num_rows, int):
        rows = num_rows
        return Operands(random(rows, num_inputs), random(num_outputs, num_inputs), random(rows, num_outputs))
    rows = sum(num_rows) + tail
    weights = random(len(num_rows), num_outputs, num_inputs)
    operands = Operands(random(rows, num_inputs), weights, random(rows, num_outputs), num_rows)
    for values in (operands.x, operands.dy):
        values[sum(num_rows) :] = math.nan
    return operands


def poison(device: torch.device | str) -> None:
    """Fill free memory with NaN, so that what is not written is seen."""
    torch.full((1 << 27,), math.nan, dtype=torch.bfloat16, device=device)


def needs_capability(first: tuple[int, int], last: tuple[int, int]) -> None:
    """Skip the test on other GPUs."""
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability()
    if not first <= capability <= last:
        pytest.skip(f"needs a GPU of compute capability {first} to {last}")


def scaled_grouped_mm(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, *, offs: Tensor, **options: Any
) -> Tensor:
    """What torch documents of its kernel, slowly; what it does not write is NaN."""
    meta = (tensor.to("meta") for tensor in (a, b, a_scales, b_scales))
    y = torch.full_like(
        torch.ops.aten._scaled_grouped_mm(*meta, offs=offs.to("meta"), **options), torch.nan, device="cpu"
    )
    start = 0
    for group, end in enumerate(offs.tolist()):
        if b.dim() == 3:
            y[start:end] = (a[start:end].float() @ b[group].float()) * a_scales[start:end, None] * b_scales[group]
        elif end > start:
            scales = a_scales.view(len(offs), -1)[group][:, None] * b_scales.view(len(offs), -1)[group]
            y[group] = (a[:, start:end].float() @ b[start:end].float()) * scales
        start = end
    return y
