"""Rotary position embedding: tables of angles, and their application.

Shape suffixes: B batch, S sequence, N heads, H head dim, C = rotated channels, F = C / 2 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    position_ids_BS: Tensor, frequencies_F: Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and, negative in the first half, sin of angles, times `magnitude`: each (B, S, 1, C), computed in float32."""
    angles_BS1F = (position_ids_BS[..., None].float() * frequencies_F)[:, :, None]
    cos_BS1F, sin_BS1F = angles_BS1F.cos() * magnitude, angles_BS1F.sin() * magnitude
    return torch.cat((cos_BS1F, cos_BS1F), -1).to(dtype), torch.cat((-sin_BS1F, sin_BS1F), -1).to(dtype)


def apply_rope(x_BSNH: Tensor, cos_BS1C: Tensor, sin_BS1C: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first C channels of every head by the angles of a `rope_table`; the others pass through.

    Channel i rotates with channel i + C / 2. If `interleaved`, channel 2i rotates with 2i + 1, and the rotated
    channels come out with all first partners before all second ones: queries and keys that are treated alike have the
    same products in any order.
    """
    dim = cos_BS1C.shape[-1]
    rotated, rest = x_BSNH[..., :dim], x_BSNH[..., dim:]
    if interleaved:
        rotated = torch.cat((rotated[..., 0::2], rotated[..., 1::2]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = torch.addcmul(rotated * cos_BS1C, torch.cat((second, first), dim=-1), sin_BS1C)
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)
