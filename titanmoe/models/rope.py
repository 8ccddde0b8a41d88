"""The frequencies of a `Rope`, and what its scaling does to the size of cos, sin and logits.

Computed in float32 by the formulas of the model releases, so that angles agree with those the weights were made with.

Shape suffixes: F frequencies, one per pair of channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titanmoe.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling


def rope_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """Radians per position of every pair of channels, float32 (F,) with F = dim / 2."""
    channels_F = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device)
    frequencies_F = 1.0 / rope.theta ** (channels_F / rope.dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies_F / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies_F, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies_F, rope, scaling)
    return frequencies_F


def rope_magnitude(rope: Rope) -> float:
    """What cos and sin are multiplied with."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def latent_logit_factor(rope: Rope) -> float:
    """What latent attention's softmax scale is multiplied with (DeepSeek's `mscale_all_dim`)."""
    scaling = rope.scaling
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(frequencies_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths above L / low_freq_factor are stretched, those below L / high_freq_factor kept, a ramp between."""
    length, low, high = scaling.original_max_seq_len, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths_F = 2 * math.pi / frequencies_F
    stretched_F = frequencies_F / scaling.factor
    scaled_F = torch.where(wavelengths_F > length / low, stretched_F, frequencies_F)
    if low == high:  # Llama 4: no ramp
        return scaled_F
    kept_F = (length / wavelengths_F - low) / (high - low)
    is_between = (wavelengths_F <= length / low) & (wavelengths_F >= length / high)
    return torch.where(is_between, (1 - kept_F) * stretched_F + kept_F * frequencies_F, scaled_F)


def _yarn(frequencies_F: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    """Channels by their number of turns over the original length: kept, divided by `factor`, a ramp between."""

    def channel_with(num_turns: float) -> float:
        wavelength = scaling.original_max_seq_len / (num_turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = channel_with(scaling.beta_fast), channel_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first or 0.001
    index_F = torch.arange(rope.dim // 2, dtype=torch.float32, device=frequencies_F.device)
    stretched_F = ((index_F - first) / width).clamp(0, 1)
    return frequencies_F / scaling.factor * stretched_F + frequencies_F * (1 - stretched_F)
