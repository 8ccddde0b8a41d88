"""What is computed: the model, its experts, its numeric formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key

_NO_CONVERTER = "no converter is listed in model.converters"


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

    converters: tuple[str, ...] = key((), later="converting the model (low precision, adapters)")
    """Changes applied to the model in this order before it is distributed, such as `quantize.linear.float8`."""

    print_after_conversion: bool = key(False, inert=_NO_CONVERTER)
    """Print the model after its conversion."""


@dataclass(frozen=True, kw_only=True)
class MoE:
    """How tokens are kept spread over the experts."""

    aux_loss_coeff: float = key(0.0, at_least=0)
    """Weight of the classic load-balancing loss, computed per sequence and added to the training loss; 0 is off."""

    bias_update_rate: float = key(0.0, at_least=0)
    """Balancing without a loss: after each step, the selection bias of an expert moves by this much, up if it had
    fewer tokens than the mean, down if it had more; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class Float8Linear:
    """Converter `quantize.linear.float8`: products of linear layers in FP8."""

    enable_fsdp_float8_all_gather: bool = key(False, inert=_NO_CONVERTER)
    """Gather FSDP shards in FP8."""

    precompute_float8_dynamic_scale_for_fsdp: bool = key(False, inert=_NO_CONVERTER)
    """Compute the scales of all weights at once after each optimizer step."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = key(None, inert=_NO_CONVERTER)
    """How scales are chosen."""

    filter_fqns: tuple[str, ...] = key((), inert=_NO_CONVERTER)
    """Modules to leave as they are; `auto_filter_small_kn` leaves those too small to gain."""

    emulate: bool = key(False, inert=_NO_CONVERTER)
    """Compute the same numbers without FP8 hardware."""


@dataclass(frozen=True, kw_only=True)
class MXLinear:
    """Converter `quantize.linear.mx`: products of linear layers in MXFP8."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = key("triton", inert=_NO_CONVERTER)
    """Kernel that casts along dim 1."""

    recipe_name: Literal["mxfp8_cublas", "mxfp8_cublas_rceil"] = key("mxfp8_cublas", inert=_NO_CONVERTER)
    """How scales are chosen and which product is called."""

    filter_fqns: tuple[str, ...] = key(("output",), inert=_NO_CONVERTER)
    """Modules to leave as they are."""


@dataclass(frozen=True, kw_only=True)
class Float8GroupedMM:
    """Converter `quantize.grouped_mm.float8`: products of experts in FP8."""

    fqns: tuple[str, ...] = key((), inert=_NO_CONVERTER)
    """Modules to convert."""


@dataclass(frozen=True, kw_only=True)
class MXGroupedMM:
    """Converter `quantize.grouped_mm.mx`: products of experts in MXFP8."""

    recipe_name: str = key("mxfp8", inert=_NO_CONVERTER)
    """How scales are chosen."""

    fqns: tuple[str, ...] = key((), inert=_NO_CONVERTER)
    """Modules to convert."""


@dataclass(frozen=True, kw_only=True)
class QuantizeLinear:
    """Low precision for linear layers."""

    float8: Float8Linear = Float8Linear()
    """FP8, one or many scales per tensor."""

    mx: MXLinear = MXLinear()
    """MXFP8, one scale per 32 values."""


@dataclass(frozen=True, kw_only=True)
class QuantizeGroupedMM:
    """Low precision for the products of experts."""

    float8: Float8GroupedMM = Float8GroupedMM()
    """FP8, one scale per row."""

    mx: MXGroupedMM = MXGroupedMM()
    """MXFP8, one scale per 32 values."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Settings of the low-precision converters, one section each."""

    linear: QuantizeLinear = QuantizeLinear()
    """Linear layers."""

    grouped_mm: QuantizeGroupedMM = QuantizeGroupedMM()
    """Experts."""
