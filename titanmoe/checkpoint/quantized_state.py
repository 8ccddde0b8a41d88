"""torchao's 8-bit optimizer states as plain numbers, and back without losing a bit.

The one place that knows how OptimState8bit is made (torchao 0.18): a number is `qmap[code] * scale`, where blocks of
`block_size` numbers share a scale, the largest magnitude of the block when it was quantised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST_SCALE = 1e-12  # torchao's
_NEIGHBOURS = 2  # floats on either side of a quotient that may be the scale it was rounded from


def is_quantized(local: Tensor) -> bool:
    """Whether a tensor holds 8-bit codes rather than plain numbers."""
    return type(local).__name__ == "OptimState8bit"


def as_plain(local: Tensor) -> Tensor:
    """The numbers of an 8-bit state in float32; a plain tensor as it is. Asserts that it is one of the two."""
    if is_quantized(local):
        state: Any = local
        return state.dequantize().float()
    assert type(local) in (Tensor, nn.Parameter), f"a {type(local).__name__} cannot be kept in a checkpoint"
    return local


@torch.no_grad()
def requantize(quantized: Tensor, plain: Tensor) -> None:
    """Put float32 numbers into an 8-bit state. Numbers that came out of a state of the same blocks stay equal.

    That takes more than quantising. A signed code has no -1: a block whose largest number was -scale came out as
    `qmap[0] * scale`, 0.7% smaller, and would shrink by as much at every resume. So for every block the scales that
    such a number can stem from are tried, and one that reproduces the whole block exactly is taken.
    """
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap

    plain = plain.to(quantized.device)
    state: Any = quantized
    state.copy_(plain)
    if not state.signed:
        return
    blocks = plain.reshape(-1, state.block_size)
    codes, scale = state.codes.view_as(blocks), state.scale
    exact = (dequant_with_qmap(codes, state.qmap, scale) == blocks).all(-1)
    candidate = (blocks.abs().amax(-1) / -state.qmap[0]).clip(_SMALLEST_SCALE)
    for _ in range(_NEIGHBOURS):
        candidate = torch.nextafter(candidate, torch.zeros_like(candidate))
    for _ in range(2 * _NEIGHBOURS + 1):
        if exact.all():
            return
        candidate_codes = quantize_8bit_with_qmap(blocks / candidate[:, None], state.qmap)
        fits = ~exact & (dequant_with_qmap(candidate_codes, state.qmap, candidate) == blocks).all(-1)
        codes.copy_(torch.where(fits[:, None], candidate_codes, codes))
        scale.copy_(torch.where(fits, candidate, scale))
        exact |= fits
        candidate = torch.nextafter(candidate, torch.full_like(candidate, torch.inf))
