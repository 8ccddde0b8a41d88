"""Adapters: the settings of the converter that adds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Converter `lora`: train low-rank additions to frozen weights, (x A) B * scale, of linear layers and experts."""

    rank: int = key(16, at_least=1)
    """Rank of the additions to linear layers."""

    alpha: float = key(32.0, more_than=0)
    """The scale is alpha / rank, also that of experts whatever their rank: theirs is an alpha as much smaller."""

    dropout: float = key(0.0, at_least=0, less_than=1)
    """Part of the inputs that the additions do not see in training."""

    use_rslora: bool = False
    """Divide alpha by the square root of the rank instead (rsLoRA)."""

    use_dora: bool = False
    """Also train the norm of each row of a weight, apart from its direction (DoRA)."""

    target_modules: tuple[str, ...] = ()
    """Modules to adapt, named by segments of their paths; all linear layers and experts if there are none. One of the
    weights of experts is `experts.gate_up_proj` or `experts.down_proj`."""

    expert_rank: Literal["scaled"] | int = key("scaled", at_least=1)
    """Rank of the additions to each expert: a number, or `scaled`, which is rank // experts per token."""

    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    """First values, whose product is zero. `kaiming`: A is uniform within 1 / sqrt(inputs) of zero, B is zero;
    `gaussian`: A is normal with standard deviation 1 / rank, B is zero; `orthogonal`: every second rank of A and every
    other of B are normal with standard deviation 0.1."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the adapters as they are stored and updated."""
