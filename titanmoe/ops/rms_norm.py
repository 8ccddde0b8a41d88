"""RMS normalisation (Zhang and Sennrich, arXiv 1910.07467).

Shape suffixes: R rows, N features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.rows import row_blocks, works_in_blocks


def rms_norm(x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32 inside, in x's dtype outside.

    Keeps x and one float32 per row for backward. Bytes: 2 R N forward, 3 R N backward.
    """
    if not works_in_blocks(x):
        y = F.rms_norm(x, weight_N.shape, weight_N, eps)
        if not torch.compiler.is_compiling() and y.grad_fn is not None:
            # With it and what the node saves, the result can be computed again.
            y.grad_fn.metadata["eps"] = eps  # type: ignore[index]
        return y
    return _RMSNorm.apply(x, weight_N, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        x_RN = x.reshape(-1, x.shape[-1])
        y_RN = torch.empty_like(x_RN)
        inverse_R1 = torch.empty(x_RN.shape[0], 1, dtype=torch.float32)
        weight = weight_N.float()
        for rows in row_blocks(x_RN):
            x_block = x_RN[rows].float()
            inverse = torch.linalg.vector_norm(x_block, dim=1, keepdim=True).square_().div_(x_RN.shape[1])
            inverse_R1[rows] = inverse.add_(eps).rsqrt_()
            _scale(x_block, inverse, weight, y_RN[rows])
        ctx.save_for_backward(x_RN, weight_N, inverse_R1)
        ctx.recompute = _scaled  # from what is saved, so that the products after it need not keep the result
        return y_RN.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_RN, weight_N, inverse_R1 = ctx.saved_tensors
        dy_RN = dy.reshape(x_RN.shape)
        dx_RN = torch.empty_like(x_RN)
        weight = weight_N.float()
        dweight_N = torch.zeros_like(weight)
        for rows in row_blocks(x_RN):
            x_block, dy_block, inverse = x_RN[rows].float(), dy_RN[rows].float(), inverse_R1[rows]
            dx_block = dx_RN[rows]
            buffer = dx_block if dx_block.dtype == torch.float32 else torch.empty_like(dy_block)
            if ctx.needs_input_grad[1]:
                dweight_N.addmv_(torch.mul(dy_block, x_block, out=buffer).t(), inverse[:, 0])
            across = torch.mul(dy_block, weight, out=buffer)
            along = (across * x_block).mean(dim=1, keepdim=True).mul_(inverse).mul_(inverse).mul_(-inverse)
            across.mul_(inverse)
            dx_block.copy_(across.addcmul_(x_block, along))
        return dx_RN.view(dy.shape), dweight_N.to(weight_N.dtype) if ctx.needs_input_grad[1] else None, None


def _scaled(x_RN: Tensor, weight_N: Tensor, inverse_R1: Tensor) -> Tensor:
    y_RN = torch.empty_like(x_RN)
    weight = weight_N.float()
    for rows in row_blocks(x_RN):
        _scale(x_RN[rows].float(), inverse_R1[rows], weight, y_RN[rows])
    return y_RN


def _scale(x_block: Tensor, inverse_R1: Tensor, weight_N: Tensor, y_block: Tensor) -> None:
    """Write x * inverse * weight to `y_block`, which may have fewer bits; `x_block`, then a copy, is overwritten."""
    buffer = y_block if y_block.dtype == torch.float32 else x_block
    y_block.copy_(torch.mul(x_block, inverse_R1, out=buffer).mul_(weight_N))
