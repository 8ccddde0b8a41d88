"""Frequencies and magnitudes of every rope scaling, against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from titanmoe.models.rope import latent_logit_factor, rope_frequencies, rope_magnitude
from titanmoe.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(
    ("kind", "options", "scaling"),
    [
        ("linear", {"factor": 4.0}, LinearScaling(4.0)),
        ("llama3", _LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ("llama3", _LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0}, Llama3Scaling(16.0, 1.0, 1.0, 8192)),
        ("yarn", _YARN, YarnScaling(40.0, 4096)),
        ("yarn", _YARN | {"truncate": False, "factor": 32.0}, YarnScaling(32.0, 4096, truncate=False)),
        ("yarn", _YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, YarnScaling(40.0, 4096, 16.0, 2.0)),
        (
            "yarn",
            _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        ),
        (
            "yarn",
            _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
            YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=0.7),
        ),
        ("yarn", _YARN | {"attention_factor": 1.25}, YarnScaling(40.0, 4096, attention_factor=1.25)),
    ],
)
@pytest.mark.parametrize(("dim", "theta"), [(64, 1e4), (128, 5e5), (8, 1.5e5)])
def test_equal_to_transformers(kind: str, options: dict[str, Any], scaling: Any, dim: int, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": theta, **options}
    config = LlamaConfig(head_dim=dim, max_position_embeddings=131_072, rope_parameters=parameters)
    expected, magnitude = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
    rope = Rope(dim, theta, scaling)
    frequencies = rope_frequencies(rope, torch.device("cpu"))
    assert frequencies.dtype == torch.float32
    assert ((frequencies - expected).abs() <= 2e-7 * expected).all()
    assert rope_magnitude(rope) == pytest.approx(magnitude, rel=1e-12)


def test_deepseeks_logits_grow_with_mscale_all_dim() -> None:
    """DeepSeek-V3: softmax scale times (0.1 ln 40 + 1) squared, as its modelling code has it."""
    scaling = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    assert latent_logit_factor(Rope(64, 1e4, scaling)) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert latent_logit_factor(Rope(64, 1e4, YarnScaling(40.0, 4096))) == 1.0
    assert latent_logit_factor(Rope(64, 1e4)) == 1.0
