"""Adapters: the settings of the converter that adds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key

SCALED = "scaled"


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
    """Modules to adapt, named by segments of their paths; all linear layers and experts if there are none."""

    expert_rank: str = SCALED
    """Rank of the additions to each expert: `scaled`, which is rank // experts per token, or a number in quotes."""

    init: Literal["kaiming"] = "kaiming"
    """First values of A: uniform within 1 / sqrt(inputs) of zero. Those of B are zero."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the adapters as they are stored and updated."""
