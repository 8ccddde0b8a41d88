"""FP8 with a scale per block of 128 x 128 values, as DeepSeek-V3's checkpoints and those like them hold it.

A value is `code * scale`: what these files call `weight_scale_inv` is a multiplier (DeepSeek-V3, arXiv 2412.19437,
section 3.3.2, and the `weight_dequant` kernel that came with the model). Blocks at the end of a matrix may be partial.

Legend: R rows, C columns, r and c blocks of rows and of columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK_SIZE = 128

_LARGEST_CODE = torch.finfo(FP8).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def block_scales(values_RC: Tensor) -> Tensor:
    """The scale of every block, float32 (r, c): the largest magnitude / 448, and 1 where all values are zero.

    A block with a value that is not finite has a scale that is not finite.
    """
    num_rows, num_columns = values_RC.shape
    if num_rows % BLOCK_SIZE or num_columns % BLOCK_SIZE:
        values_RC = F.pad(values_RC, (0, -num_columns % BLOCK_SIZE, 0, -num_rows % BLOCK_SIZE))
    largest_Rc = values_RC.abs().unflatten(1, (-1, BLOCK_SIZE)).amax(2)
    largest_rc = largest_Rc.unflatten(0, (-1, BLOCK_SIZE)).amax(1).float()
    # Below the smallest normal number, a scale would lack the bits that make its codes right.
    scales_rc = (largest_rc / _LARGEST_CODE).clamp_min(_SMALLEST_SCALE)
    return torch.where(largest_rc == 0, 1.0, scales_rc)


def quantize_blocks(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and scales (r, c) of a matrix of any float dtype.

    A finite value comes back within half a step of e4m3: |value| / 16, or scale / 1024 if that is larger.
    """
    scales_rc = block_scales(values_RC)
    quotients_RC = values_RC / expand_scales(scales_rc, values_RC.shape[0], values_RC.shape[1])
    # Rounding may push the largest quotient above the largest code, which the cast would turn into NaN.
    return quotients_RC.clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(FP8), scales_rc


def dequantize_blocks(codes_RC: Tensor, scales_rc: Tensor, block_size: tuple[int, int] = (BLOCK_SIZE,) * 2) -> Tensor:
    """The values, float32 (R, C)."""
    return codes_RC.float() * expand_scales(scales_rc, codes_RC.shape[0], codes_RC.shape[1], block_size)


def expand_scales(
    scales_rc: Tensor, num_rows: int, num_columns: int, block_size: tuple[int, int] = (BLOCK_SIZE,) * 2
) -> Tensor:
    """The scale of every value, float32 (R, C)."""
    scales_rC = scales_rc.float().repeat_interleave(block_size[1], 1)[:, :num_columns]
    return scales_rC.repeat_interleave(block_size[0], 0)[:num_rows]
