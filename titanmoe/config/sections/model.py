"""What is computed: the model and its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model is trained, and where its tokenizer and sizes come from."""

    name: str = "qwen3"
    """Family of the model, or `auto` to read family and sizes from config.json in `model.hf_assets_path`."""

    flavor: str = "debug_moe"
    """Named size within the family, such as `30B-A3B`. Not used with `model.name = "auto"`."""

    hf_assets_path: str | None = None
    """Directory in Hugging Face layout: tokenizer.json, config.json. With `none`, the tokenizer is the builtin one."""

    tokenizer_path: str | None = None
    """Directory of the tokenizer, or `builtin` for the embedded one. With `none`, it is `model.hf_assets_path`."""

    converters: tuple[str, ...] = ()
    """Changes applied to the model in this order before it is distributed: `quantize.linear.float8`,
    `quantize.linear.mx`, `quantize.grouped_mm.float8`, `quantize.grouped_mm.mx`, `quantize.frozen.float8`,
    `quantize.frozen.mx`, `quantize.frozen.nf4`, `lora` (the last). Each has a section of this name."""

    print_after_conversion: bool = False
    """Print a table of what each product became, on which backend, and why others stayed as they were. With `lora` it
    is always printed."""


@dataclass(frozen=True, kw_only=True)
class MoE:
    """How tokens are kept spread over the experts."""

    aux_loss_coeff: float = key(0.0, at_least=0)
    """Weight of the classic load-balancing loss, computed per sequence and added to the training loss; 0 is off."""

    bias_update_rate: float = key(0.0, at_least=0)
    """Balancing without a loss: after each step, the selection bias of an expert moves by this much, up if it had
    fewer tokens than the mean, down if it had more; 0 is off."""

    grouped_mm_backend: Literal["auto", "torch", "loop"] = "auto"
    """What multiplies tokens with the experts' weights in training.dtype: `torch` is `torch.nn.functional.grouped_mm`,
    `loop` one product per expert; `auto` tries on an accelerator whether the first gives right results there."""
