"""A bias per expert on rows that are sorted by expert.

Shape suffixes: R rows, E experts, N output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanmoe.ops.grouped_mm import expert_rows
from titanmoe.ops.rows import works_in_blocks


def add_expert_bias(y_RN: Tensor, bias_EN: Tensor, offsets_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """y[r] + bias[e(r)], or y[r] + weight[r] * bias[e(r)]; the gradient of the bias is summed in float32.

    Bytes: 2 R N forward and R N backward.

    Args:
        offsets_E: int32, the end of each expert's rows; see `grouped_mm`.
    """
    if torch.compiler.is_compiling():
        rows_RN = bias_EN.float()[experts_of_rows(y_RN, offsets_E)]
        return y_RN + (rows_RN if weights_R is None else rows_RN * weights_R[:, None]).to(y_RN.dtype)
    return _AddExpertBias.apply(y_RN, bias_EN, offsets_E, weights_R)


class _AddExpertBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RN: Tensor, bias_EN: Tensor, offsets_E: Tensor, weights_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(bias_EN, offsets_E, weights_R)
        weights = None if weights_R is None else weights_R.to(y_RN.dtype)
        if works_in_blocks(y_RN):
            out_RN = torch.empty_like(y_RN)
            end = 0
            for expert, rows in expert_rows(offsets_E):
                if weights is None:
                    torch.add(y_RN[rows], bias_EN[expert], out=out_RN[rows])
                else:
                    torch.addr(y_RN[rows], weights[rows], bias_EN[expert], out=out_RN[rows])
                end = rows.stop
            out_RN[end:] = y_RN[end:]
            return out_RN
        rows_RN = bias_EN[experts_of_rows(y_RN, offsets_E)]
        return y_RN + (rows_RN if weights is None else rows_RN * weights[:, None])

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        bias_EN, offsets_E, weights_R = ctx.saved_tensors
        dbias_EN = torch.zeros_like(bias_EN, dtype=torch.float32)
        dweights_R = None if weights_R is None else torch.empty_like(weights_R)
        if works_in_blocks(dy_RN):
            for expert, rows in expert_rows(offsets_E):
                dy = dy_RN[rows].float()
                dbias_EN[expert] = dy.sum(dim=0) if weights_R is None else dy.t() @ weights_R[rows].float()
                if dweights_R is not None:
                    dweights_R[rows] = dy @ bias_EN[expert].float()
        else:
            experts_R = experts_of_rows(dy_RN, offsets_E)
            weighted_RN = dy_RN.float() if weights_R is None else dy_RN * weights_R.float()[:, None]
            dbias_EN.index_add_(0, experts_R, weighted_RN)
            if dweights_R is not None:
                dweights_R = (dy_RN * bias_EN[experts_R]).sum(dim=-1, dtype=weights_R.dtype)
        return dy_RN, dbias_EN.to(bias_EN.dtype), None, dweights_R


def experts_of_rows(rows: Tensor, offsets_E: Tensor) -> Tensor:
    index_R = torch.arange(rows.shape[0], dtype=offsets_E.dtype, device=rows.device)
    # A row beyond the last offset is padding, whose weight and gradient are zero: any expert will do.
    return torch.searchsorted(offsets_E, index_R, right=True).clamp_max_(offsets_E.shape[0] - 1)
