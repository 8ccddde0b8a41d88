"""gpt-oss's activation, with an optional weight per row folded in.

Shape suffixes: R rows, H hidden features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from titanmoe.ops.swiglu import gate_up_blocks


def clamped_swiglu(gate_up_R2H: Tensor, weights_R: Tensor | None, limit: float, alpha: float) -> Tensor:
    """h_RH = (clamp(up) + 1) * g * sigmoid(alpha * g) [* weight of the row], with g = min(gate, limit), |up| <= limit.

    Gate and up are the halves of `gate_up_R2H`. Keeps only its inputs for backward. Source: gpt-oss's reference model.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula, and its backward
        gate_RH, up_RH, _ = _clamped(gate_up_R2H, limit)
        h_RH = (up_RH + 1) * gate_RH * torch.sigmoid(alpha * gate_RH)
        return h_RH if weights_R is None else h_RH * weights_R.to(h_RH.dtype)[:, None]
    return _ClampedSwiGLU.apply(gate_up_R2H, weights_R, limit, alpha)


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_R2H: Tensor, weights_R: Tensor | None, limit: float, alpha: float) -> Tensor:
        ctx.save_for_backward(gate_up_R2H, weights_R)
        ctx.limit, ctx.alpha = limit, alpha
        ctx.recompute = partial(_activated, limit=limit, alpha=alpha)  # see swiglu.py
        return _activated(gate_up_R2H, weights_R, limit, alpha)

    @staticmethod
    def backward(ctx: Any, dh_RH: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        gate_up_R2H, weights_R = ctx.saved_tensors
        dgate_up_R2H = torch.empty_like(gate_up_R2H)
        dweights_R = None if weights_R is None else torch.empty_like(weights_R)
        for rows in gate_up_blocks(gate_up_R2H):
            gate_RH, up_RH, is_inside = _clamped(gate_up_R2H[rows], ctx.limit)
            dgate_RH, dup_RH = dgate_up_R2H[rows].chunk(2, dim=-1)
            dh = dh_RH[rows]
            sigmoid_RH = torch.sigmoid(ctx.alpha * gate_RH)
            glu_RH = gate_RH * sigmoid_RH
            if dweights_R is not None:
                dweights_R[rows] = ((up_RH + 1) * glu_RH).mul_(dh).sum(dim=-1, dtype=dweights_R.dtype)
                dh = dh * weights_R[rows].to(dh.dtype)[:, None]
            slope_RH = sigmoid_RH * (1 + ctx.alpha * gate_RH * (1 - sigmoid_RH))
            torch.mul(dh * (up_RH + 1), slope_RH, out=dgate_RH)
            torch.mul(dh, glu_RH, out=dup_RH)
            dgate_up_R2H[rows].mul_(is_inside)
        return dgate_up_R2H, dweights_R, None, None


def _activated(gate_up_R2H: Tensor, weights_R: Tensor | None, limit: float, alpha: float) -> Tensor:
    h_RH = gate_up_R2H.new_empty(gate_up_R2H.shape[0], gate_up_R2H.shape[1] // 2)
    for rows in gate_up_blocks(gate_up_R2H):
        gate_RH, up_RH, _ = _clamped(gate_up_R2H[rows], limit)
        product = torch.mul(up_RH + 1, torch.sigmoid(alpha * gate_RH).mul_(gate_RH), out=h_RH[rows])
        if weights_R is not None:
            product.mul_(weights_R[rows].to(product.dtype)[:, None])
    return h_RH


def _clamped(gate_up_R2H: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up, and where neither's clamp cut (of both, side by side)."""
    gate_RH, up_RH = gate_up_R2H.chunk(2, dim=-1)
    is_inside = torch.cat((gate_RH <= limit, up_RH.abs() <= limit), dim=-1)
    return gate_RH.clamp(max=limit), up_RH.clamp(-limit, limit), is_inside
