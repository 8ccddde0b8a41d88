"""Low precision: the settings of its converters, one section each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key

CONVERTERS = (
    "quantize.linear.float8",
    "quantize.linear.mx",
    "quantize.grouped_mm.float8",
    "quantize.grouped_mm.mx",
    "quantize.frozen.float8",
    "quantize.frozen.mx",
    "quantize.frozen.nf4",
    "lora",
)
"""Names for `model.converters`, each that of a section."""

AUTO_FILTER = "auto_filter_small_kn"


@dataclass(frozen=True, kw_only=True)
class Float8Linear:
    """Converter `quantize.linear.float8`: products of linear layers in FP8."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather FSDP shards in FP8; refused, as it is not supported yet."""

    precompute_float8_dynamic_scale_for_fsdp: bool = key(False, inert="shards are not gathered in FP8")
    """Compute the scales of all weights at once after each optimizer step."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """What shares a scale: a whole tensor (also with `none`), or a row; with `rowwise_with_gw_hp`, gradients of weights
    are computed from unrounded operands."""

    filter_fqns: tuple[str, ...] = ()
    """Modules to leave as they are, named by segments of their paths; `auto_filter_small_kn` leaves those too small to
    gain."""

    backend: Literal["auto", "scaled_mm", "emulated"] = "auto"
    """What multiplies. `auto` takes the first that is tried and found right; naming one takes it untried."""

    emulate: bool = False
    """Compute the same numbers without FP8 hardware, slowly."""


@dataclass(frozen=True, kw_only=True)
class MXLinear:
    """Converter `quantize.linear.mx`: products of linear layers in MXFP8."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = key("triton", inert="the backend chooses it")
    """Kernel that casts along dim 1."""

    recipe_name: Literal["mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_rceil_wgrad_with_hp"] = "mxfp8_cublas"
    """How scales are rounded: down, cutting the largest values (`mxfp8_cublas`), or up; with `..._wgrad_with_hp`,
    gradients of weights are computed from unrounded operands."""

    filter_fqns: tuple[str, ...] = ("output",)
    """Modules to leave as they are, named by segments of their paths."""

    backend: Literal["auto", "torchao", "emulated"] = "auto"
    """What multiplies. `auto` takes the first that is tried and found right; naming one takes it untried."""

    emulate: bool = False
    """Compute the same numbers without MX hardware, slowly."""


@dataclass(frozen=True, kw_only=True)
class Float8GroupedMM:
    """Converter `quantize.grouped_mm.float8`: products of experts in FP8, with one scale per row."""

    recipe_name: Literal["rowwise", "rowwise_with_gw_hp"] = "rowwise"
    """With `rowwise_with_gw_hp`, gradients of weights are computed from unrounded operands."""

    fqns: tuple[str, ...] = ("experts",)
    """Modules of experts to convert, named by segments of their paths."""

    backend: Literal["auto", "scaled_grouped_mm", "emulated"] = "auto"
    """What multiplies. `auto` takes the first that is tried and found right; naming one takes it untried."""

    emulate: bool = False
    """Compute the same numbers without FP8 hardware, slowly."""


@dataclass(frozen=True, kw_only=True)
class MXGroupedMM:
    """Converter `quantize.grouped_mm.mx`: products of experts in MXFP8."""

    recipe_name: Literal["mxfp8", "mxfp8_wgrad_with_hp"] = "mxfp8"
    """Scales are rounded up. With `mxfp8_wgrad_with_hp`, gradients of weights are computed from unrounded operands."""

    fqns: tuple[str, ...] = ("experts",)
    """Modules of experts to convert, named by segments of their paths."""

    backend: Literal["auto", "torchao", "emulated"] = "auto"
    """What multiplies. `auto` takes the first that is tried and found right; naming one takes it untried."""

    emulate: bool = False
    """Compute the same numbers without MX hardware, slowly."""


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
class FrozenFloat8:
    """Converter `quantize.frozen.float8`: weights that are not trained, stored in FP8."""

    recipe_name: Literal["channel", "block"] = "channel"
    """What shares a scale: an output (channel), or a block of 128 x 128 values, as in DeepSeek's and Qwen's
    checkpoints."""

    fqns: tuple[str, ...] = ()
    """Linear layers and modules of experts to convert, named by segments of their paths; all if there are none."""

    filter_fqns: tuple[str, ...] = ()
    """Those of them to leave as they are."""

    backend: Literal["auto", "native", "dequantize", "emulated"] = "auto"
    """What multiplies: FP8 kernels that take the codes as they are and round what they are multiplied with (`native`);
    or products with pieces of the weight that are dequantised for them. `auto` takes native ones where, tried, they are
    right and faster. `emulated`: their numbers without the hardware, slowly."""


@dataclass(frozen=True, kw_only=True)
class FrozenMX:
    """Converter `quantize.frozen.mx`: weights that are not trained, stored in MXFP8."""

    fqns: tuple[str, ...] = ()
    """Linear layers and modules of experts to convert, named by segments of their paths; all if there are none."""

    filter_fqns: tuple[str, ...] = ()
    """Those of them to leave as they are."""


@dataclass(frozen=True, kw_only=True)
class FrozenNF4:
    """Converter `quantize.frozen.nf4`: weights that are not trained, stored in 4 bits, as in QLoRA."""

    block_size: int = key(64, at_least=2)
    """Values of a row that share a scale: a power of two."""

    double_quant: bool = True
    """Store scales in 8 bits, too."""

    fqns: tuple[str, ...] = ()
    """Linear layers and modules of experts to convert, named by segments of their paths; all if there are none."""

    filter_fqns: tuple[str, ...] = ()
    """Those of them to leave as they are."""


@dataclass(frozen=True, kw_only=True)
class QuantizeFrozen:
    """Weights that are not trained, in few bits: linear layers and experts below adapters."""

    float8: FrozenFloat8 = FrozenFloat8()
    """FP8, one scale per output or per block."""

    mx: FrozenMX = FrozenMX()
    """MXFP8, one scale per 32 values."""

    nf4: FrozenNF4 = FrozenNF4()
    """4 bits."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Low precision. The settings of each converter are in a section of its name."""

    strict: bool = False
    """Refuse to start where a module that was to be converted would stay as it is, as its sizes do not fit, or where
    unconverted experts fall back on a slower product."""

    linear: QuantizeLinear = QuantizeLinear()
    """Linear layers."""

    grouped_mm: QuantizeGroupedMM = QuantizeGroupedMM()
    """Experts."""

    frozen: QuantizeFrozen = QuantizeFrozen()
    """Weights that are not trained."""
