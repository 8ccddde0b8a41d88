"""Converters of products: one for each kind of module and number format.

They put another product in the place of the one that a module has. Weights, and all that knows of them, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.sections.quantize import AUTO_FILTER
from titanmoe.converters.converter import Converter, converter
from titanmoe.converters.patterns import check_each_matches, first_match
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.backends import Backend, Kind, NoBackendError, NumberFormat, choose_backend
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.scaled_product import Kernels, ScaledGroupedProduct, ScaledLinearProduct


@dataclass(frozen=True)
class LowPrecision(Converter):
    """Products with both operands in 8 bits.

    Attributes:
        backend: what multiplies.
        scaling: how scales are chosen.
        rounds_weight_gradient: whether gradients of weights are such products, too.
        patterns: modules to change, or to leave; see `patterns.matches`.
    """

    kind: ClassVar[Kind]
    number_format: ClassVar[NumberFormat]

    backend: Backend
    scaling: Scaling
    rounds_weight_gradient: bool = True
    patterns: tuple[str, ...] = ()

    @classmethod
    def _backend(cls, section: Any, device: torch.device) -> Backend:
        try:
            return choose_backend(cls.kind, cls.number_format, device, section.backend, section.emulate)
        except NoBackendError as error:
            raise ConfigError(
                str(error),
                where="model.converters",
                mend=f"Set {cls.name}.emulate = true to compute the same numbers without the hardware, slowly.",
            ) from error

    @property
    def backend_name(self) -> str:
        return self.backend.name

    def kernels(self) -> Kernels:
        return self.backend.kernels(self.scaling)

    def _misfit(self, *features: int) -> str:
        multiple = self.kernels().feature_multiple
        if all(number % multiple == 0 for number in features):
            return ""
        return f"{' x '.join(map(str, features))} features: not all multiples of {multiple}"

    def describe(self) -> str:
        shared_by = {"tensor": "a scale per tensor", "row": "a scale per row", "block": "a scale per 32 values"}
        number_format = "MXFP8" if self.number_format == "mx" else "FP8"
        rounding = ", rounded down" if self.scaling.rounding == "down" else ""
        gradient = "" if self.rounds_weight_gradient else ", gradients of weights unrounded"
        return f"{number_format}, {shared_by[self.scaling.shared_by]}{rounding}{gradient}"


class _LinearLayers(LowPrecision):
    """All linear layers but those on a list."""

    kind = "linear"
    modules = "linear layers"

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, Linear)

    def check(self, paths: Mapping[str, nn.Module]) -> None:
        # A tied embedding is the output, too, and is never changed.
        ignored = (AUTO_FILTER,) if "output" in paths else (AUTO_FILTER, "output")
        patterns = [pattern for pattern in self.patterns if pattern not in ignored]
        check_each_matches(patterns, list(paths), f"{self.name}.filter_fqns", "modules")

    def obstacle(self, path: str, module: nn.Module) -> str:
        assert isinstance(module, Linear)
        listed = first_match(path, self.patterns)
        if listed is not None:
            return f'("{listed}" is in {self.name}.filter_fqns)'
        num_outputs, num_inputs = module.weight.shape
        if AUTO_FILTER in self.patterns and _is_too_small(num_outputs, num_inputs, self.scaling):
            return f"({AUTO_FILTER}: {num_outputs} x {num_inputs} is too small to gain)"
        return self._misfit(num_outputs, num_inputs)


class _GroupedProducts(LowPrecision):
    """Experts that are on a list."""

    kind = "grouped_mm"
    modules = "modules of experts"

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, Experts)

    def check(self, paths: Mapping[str, nn.Module]) -> None:
        where = f"{self.name}.fqns"
        experts = [path for path, module in paths.items() if self.may_change(module)]
        if not experts:
            raise ConfigError(f"{self.name} is for experts, and this model has none", where="model.converters")
        if not self.patterns:
            raise ConfigError("is empty: nothing would be converted", where=where, mend='It is ["experts"] by default.')
        check_each_matches(self.patterns, experts, where, self.modules)

    def obstacle(self, path: str, module: nn.Module) -> str:
        assert isinstance(module, Experts)
        if first_match(path, self.patterns) is None:
            return f"(not in {self.name}.fqns)"
        dim, hidden_dim = module.down.shape[1:]
        return self._misfit(dim, hidden_dim)


@converter("quantize.linear.float8")
class Float8Linear(_LinearLayers):
    number_format = "float8"

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> Float8Linear:
        section = config.quantize.linear.float8
        return cls(
            cls._backend(section, device),
            Scaling("tensor" if section.recipe_name in (None, "tensorwise") else "row"),
            rounds_weight_gradient=section.recipe_name != "rowwise_with_gw_hp",
            patterns=section.filter_fqns,
        )


@converter("quantize.linear.mx")
class MXLinear(_LinearLayers):
    number_format = "mx"

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> MXLinear:
        section = config.quantize.linear.mx
        return cls(
            cls._backend(section, device),
            Scaling("block", "down" if section.recipe_name == "mxfp8_cublas" else "up"),
            rounds_weight_gradient=section.recipe_name != "mxfp8_rceil_wgrad_with_hp",
            patterns=section.filter_fqns,
        )


@converter("quantize.grouped_mm.float8")
class Float8GroupedMM(_GroupedProducts):
    number_format = "float8"

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> Float8GroupedMM:
        section = config.quantize.grouped_mm.float8
        return cls(
            cls._backend(section, device),
            Scaling("row"),
            rounds_weight_gradient=section.recipe_name != "rowwise_with_gw_hp",
            patterns=section.fqns,
        )


@converter("quantize.grouped_mm.mx")
class MXGroupedMM(_GroupedProducts):
    number_format = "mx"

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> MXGroupedMM:
        section = config.quantize.grouped_mm.mx
        return cls(
            cls._backend(section, device),
            Scaling("block"),
            rounds_weight_gradient=section.recipe_name != "mxfp8_wgrad_with_hp",
            patterns=section.fqns,
        )


@register_quantize_module_handler(Float8Linear)
@register_quantize_module_handler(MXLinear)
def _convert_linear(module: Linear, config: LowPrecision) -> Linear:
    module.product = ScaledLinearProduct(config.kernels(), config.rounds_weight_gradient)
    return module


@register_quantize_module_handler(Float8GroupedMM)
@register_quantize_module_handler(MXGroupedMM)
def _convert_experts(module: Experts, config: LowPrecision) -> Experts:
    for name in ("gate_up_product", "down_product"):
        plain = getattr(module, name)
        assert isinstance(plain, PlainGroupedProduct)
        product = ScaledGroupedProduct(config.kernels(), config.rounds_weight_gradient, plain_kernel=plain.kernel)
        setattr(module, name, product)
    return module


def _is_too_small(num_outputs: int, num_inputs: int, scaling: Scaling) -> bool:
    """torchao's rule of thumb for H100 (`_auto_filter_for_recipe` in torchao 0.18's float8_linear_utils)."""
    if scaling.shared_by == "tensor":
        return num_inputs <= 4096 and num_outputs <= 1024
    return num_outputs <= 2048 or num_inputs <= 1024 or (num_outputs <= 4096 and num_inputs <= 2048)
