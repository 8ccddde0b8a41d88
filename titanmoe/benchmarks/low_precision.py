"""Number formats to compare with plain products, each as converters of a job and their recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from titanmoe.config import load_config
from titanmoe.converters.converter import CONVERTERS
from titanmoe.converters.frozen import Frozen
from titanmoe.converters.low_precision import LowPrecision
from titanmoe.ops.backends import Kind, NoBackendError, choose_backend

_FP8_LINEAR, _FP8_EXPERTS = "quantize.linear.float8", "quantize.grouped_mm.float8"
_MX_LINEAR, _MX_EXPERTS = "quantize.linear.mx", "quantize.grouped_mm.mx"

FORMATS: Mapping[str, Mapping[str, str]] = {
    "fp8_tensorwise": {_FP8_LINEAR: "tensorwise"},
    "fp8_rowwise": {_FP8_LINEAR: "rowwise", _FP8_EXPERTS: "rowwise"},
    "fp8_rowwise_gw_hp": {_FP8_LINEAR: "rowwise_with_gw_hp", _FP8_EXPERTS: "rowwise_with_gw_hp"},
    "mxfp8": {_MX_LINEAR: "mxfp8_cublas_rceil", _MX_EXPERTS: "mxfp8"},
    "mxfp8_wgrad_hp": {_MX_LINEAR: "mxfp8_rceil_wgrad_with_hp", _MX_EXPERTS: "mxfp8_wgrad_with_hp"},
}
"""The recipe of each converter."""

USUAL = ("fp8_tensorwise", "fp8_rowwise", "mxfp8")
"""Those that are compared if none are named."""

_FROZEN_FP8 = "quantize.frozen.float8"
BASES: Mapping[str, tuple[str, ...]] = {
    "FP8": (_FROZEN_FP8, f"--{_FROZEN_FP8}.backend=dequantize"),
    "FP8, blocks": (_FROZEN_FP8, f"--{_FROZEN_FP8}.backend=dequantize", f"--{_FROZEN_FP8}.recipe_name=block"),
    "FP8, native": (_FROZEN_FP8, f"--{_FROZEN_FP8}.backend=native"),
    "MXFP8": ("quantize.frozen.mx",),
    "NF4": ("quantize.frozen.nf4",),
}
"""Frozen weights: a converter of each, and its settings."""


def formats_for(kinds: Collection[Kind]) -> list[str]:
    """Those that have a converter for one of these kinds of products."""
    return [name for name, recipes in FORMATS.items() if any(_kind(converter) in kinds for converter in recipes)]


def without_backend(name: str, kinds: Collection[Kind], device: torch.device) -> dict[str, str]:
    """The converters of a format that have no backend on `device`, and why."""
    reasons = {}
    for converter in _converters(name, kinds):
        cls = CONVERTERS[converter]
        assert issubclass(cls, LowPrecision)
        try:
            choose_backend(cls.kind, cls.number_format, device)
        except NoBackendError as error:
            reasons[converter] = str(error)
    return reasons


def job_options(name: str, kinds: Collection[Kind], emulate: Collection[str] = ()) -> list[str]:
    """What turns a job into one in this format.

    Args:
        emulate: converters to be emulated.
    """
    recipes = _converters(name, kinds)
    return [
        f"--model.converters={','.join(recipes)}",
        *(f"--{converter}.recipe_name={recipe}" for converter, recipe in recipes.items()),
        *(f"--{converter}.emulate" for converter in emulate),
    ]


def build_converters(options: Sequence[str], device: torch.device) -> list[LowPrecision]:
    """The converters of a job with these options."""
    config = load_config(None, options)
    found = [CONVERTERS[name].from_job(config, device) for name in config.model.converters]
    return [converter for converter in found if isinstance(converter, LowPrecision)]


def build_base(name: str, device: torch.device) -> Frozen:
    """The converter of one of `BASES`.

    Raises:
        ConfigError: it cannot work there.
    """
    converter, *settings = BASES[name]
    config = load_config(None, [f"--model.converters={converter}", *settings])
    found = CONVERTERS[converter].from_job(config, device)
    assert isinstance(found, Frozen)
    return found


def _converters(name: str, kinds: Collection[Kind]) -> dict[str, str]:
    return {converter: recipe for converter, recipe in FORMATS[name].items() if _kind(converter) in kinds}


def _kind(converter: str) -> str:
    return converter.split(".")[1]
