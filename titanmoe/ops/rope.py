"""Rotary position embedding, half-split convention (channel i rotates with channel i + dim / 2).

Shape suffixes: B batch, S sequence, N heads, H head dim, C = rotated channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(position_ids_BS: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (B, S, 1, C) with C = dim: computed in float32, given in `dtype`."""
    channels = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids_BS.device)
    frequencies = 1.0 / theta ** (channels / dim)
    angles_BSC = (position_ids_BS[..., None].float() * frequencies).repeat(1, 1, 2)[:, :, None]
    return angles_BSC.cos().to(dtype), angles_BSC.sin().to(dtype)


def apply_rope(x_BSNH: Tensor, cos_BS1C: Tensor, sin_BS1C: Tensor) -> Tensor:
    """Rotate the first C channels of every head; the others pass through."""
    dim = cos_BS1C.shape[-1]
    rotated, rest = x_BSNH[..., :dim], x_BSNH[..., dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos_BS1C + torch.cat((-second, first), dim=-1) * sin_BS1C
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)
