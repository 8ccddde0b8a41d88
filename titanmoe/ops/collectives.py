"""Collectives that autograd knows how to go back through.

They are the operators behind torch's functional collectives, whose Python names differ between versions; checked
against torch 2.11 and 2.13. With G ranks each sends and receives (G - 1) / G of the larger tensor's bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """Every rank's `x`, one after the other along `dim`; in the backward pass gradients are summed over ranks."""
    gathered: Tensor = _Collective.apply(x, group, dim, True)
    return gathered


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """This rank's part, of equal ones along `dim`, of the sum of every rank's `x`; the backward pass gathers."""
    part: Tensor = _Collective.apply(x, group, dim, False)
    return part


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int, gathers: bool) -> Tensor:
        ctx.settings = group, dim, gathers
        return (_gather if gathers else _sum_and_scatter)(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        group, dim, gathers = ctx.settings
        return (_sum_and_scatter if gathers else _gather)(grad, group, dim), None, None, None


def _gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    operators = torch.ops._c10d_functional
    gathered = operators.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    parts: Tensor = operators.wait_tensor(gathered).unflatten(0, (group.size(), -1))
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _sum_and_scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    operators = torch.ops._c10d_functional
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).flatten(0, 1).contiguous()
    part: Tensor = operators.wait_tensor(operators.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name))
    return part
