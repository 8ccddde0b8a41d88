"""Attention of one new token per sequence to keys and values that are kept.

Shape suffixes: B batch, N query heads, K key/value heads, G = N / K of them per key head, C slots, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention(
    q_BNH: Tensor, k_BKCH: Tensor, v_BKCH: Tensor, scale: float, mask_BC: Tensor | None, sinks_N: Tensor | None
) -> Tensor:
    """softmax(q k^T * scale) v over the slots, whose order is of no importance.

    The query heads of a key head are the rows of one product, so that keys and values are read once. Without autograd.

    Args:
        q_BNH: query head n reads key head n // G.
        mask_BC: float32, added to the scores; None if every slot is seen.
        sinks_N: see `causal_attention`.

    Returns:
        o_BNH. Bytes: keys and values once. FLOPs: 4 B N C H.
    """
    q_BKGH = q_BNH.unflatten(1, (k_BKCH.shape[1], -1))
    mask = None if mask_BC is None else mask_BC[:, None, None]
    if sinks_N is None:
        mask = None if mask is None else mask.to(q_BNH.dtype)
        return F.scaled_dot_product_attention(q_BKGH, k_BKCH, v_BKCH, attn_mask=mask, scale=scale).flatten(1, 2)
    scores_BKGC = (q_BKGH @ k_BKCH.transpose(-2, -1)).float() * scale
    if mask is not None:
        scores_BKGC = scores_BKGC + mask
    sinks = sinks_N.float().view(k_BKCH.shape[1], -1, 1).expand(*scores_BKGC.shape[:-1], 1)
    shares_BKGC = torch.cat((scores_BKGC, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    return (shares_BKGC.to(v_BKCH.dtype) @ v_BKCH).flatten(1, 2)
