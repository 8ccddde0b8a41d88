"""Converters of products: one for each kind of module and number format.

They put another product in the place of the one that a module has. Weights, and all that knows of them, stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

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
from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import BLOCK, Scaling
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.scaled_product import Kernels, ScaledGroupedProduct, ScaledLinearProduct


@dataclass(frozen=True)
class LowPrecision(Converter):
    """Products with both operands in 8 bits.

    Attributes:
        list_key: of the config's section, the key with the patterns.
        backend: what multiplies.
        scaling: how scales are chosen.
        rounds_weight_gradient: whether gradients of weights are such products, too.
        patterns: modules to change, or to leave; see `patterns.matches`.
    """

    kind: ClassVar[Kind]
    number_format: ClassVar[NumberFormat]
    list_key: ClassVar[str]

    backend: Backend
    scaling: Scaling
    rounds_weight_gradient: bool = True
    patterns: tuple[str, ...] = ()

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> LowPrecision:
        section = attrgetter(cls.name)(config)
        try:
            backend = choose_backend(cls.kind, cls.number_format, device, section.backend, section.emulate)
        except NoBackendError as error:
            raise ConfigError(
                str(error),
                where="model.converters",
                mend=f"Set {cls.name}.emulate = true to compute the same numbers without the hardware, slowly.",
            ) from error
        recipe = section.recipe_name
        rounds = not (recipe or "").endswith(("_with_hp", "_with_gw_hp"))
        return cls(backend, cls.scaling_of(recipe), rounds, getattr(section, cls.list_key))

    @staticmethod
    @abstractmethod
    def scaling_of(recipe: str | None) -> Scaling:
        """How scales are chosen in the recipe that the section names."""

    @property
    def result(self) -> str:
        return "MXFP8" if self.number_format == "mx" else "FP8"

    @property
    def backend_name(self) -> str:
        return self.backend.name

    def kernels(self) -> Kernels:
        return self.backend.kernels(self.scaling)

    def misfit(self, module: nn.Module) -> str:
        multiple, sizes = self.kernels().feature_multiple, self.features(module)
        if all(size % multiple == 0 for size in sizes):
            return ""
        return f"{' x '.join(map(str, sizes))}: not all multiples of {multiple}"

    @abstractmethod
    def features(self, module: nn.Module) -> tuple[int, int]:
        """How many outputs and inputs."""

    def describe(self, paths: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        shared_by = {"tensor": "tensor", "row": "row", "block": f"{BLOCK} values"}[self.scaling.shared_by]
        rounding = " rounded down" if self.scaling.rounding == "down" else ""
        gradient = "" if self.rounds_weight_gradient else ", gradients of weights unrounded"
        return f" in {self.result} (a scale per {shared_by}{rounding}{gradient}), backend {self.backend.name}"


class _LinearLayers(LowPrecision):
    """All linear layers but those on a list."""

    kind = "linear"
    list_key = "filter_fqns"
    modules = "linear layers"

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, Linear)

    @property
    def leaves_small(self) -> bool:
        return self.number_format == "float8" and AUTO_FILTER in self.patterns

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        # A tied embedding is the output, too, and is never changed.
        paths = dict.fromkeys([*modules, "output", *([AUTO_FILTER] if self.leaves_small else [])])
        check_each_matches(self.patterns, list(paths), f"{self.name}.{self.list_key}", "modules")

    def unwanted(self, path: str, module: nn.Module) -> str:
        listed = first_match(path, self.patterns)
        if listed is not None:
            return f'"{listed}" is in filter_fqns'
        if self.leaves_small and _is_too_small(*self.features(module), self.scaling):
            return f"too small to gain ({AUTO_FILTER})"
        return ""

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, Linear)
        return module.out_features, module.in_features


class _GroupedProducts(LowPrecision):
    """Experts that are on a list."""

    kind = "grouped_mm"
    list_key = "fqns"
    modules = "modules of experts"

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, Experts)

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        where = f"{self.name}.{self.list_key}"
        if not self.patterns:
            raise ConfigError(
                "the list is empty: nothing would be converted",
                where=where,
                mend='It is ["experts"] by default. To convert nothing, take the converter out of model.converters.',
            )
        experts = [path for path, module in modules.items() if self.may_change(module)]
        check_each_matches(self.patterns, experts, where, self.modules)

    def unwanted(self, path: str, module: nn.Module) -> str:
        return "not in fqns" if first_match(path, self.patterns) is None else ""

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, Experts)
        dim, hidden_dim = module.down.shape[1:]
        return dim, hidden_dim


@converter("quantize.linear.float8")
class Float8Linear(_LinearLayers):
    number_format = "float8"

    @staticmethod
    def scaling_of(recipe: str | None) -> Scaling:
        return Scaling("tensor" if recipe in (None, "tensorwise") else "row")


@converter("quantize.linear.mx")
class MXLinear(_LinearLayers):
    number_format = "mx"

    @staticmethod
    def scaling_of(recipe: str | None) -> Scaling:
        return Scaling("block", "down" if recipe == "mxfp8_cublas" else "up")


@converter("quantize.grouped_mm.float8")
class Float8GroupedMM(_GroupedProducts):
    number_format = "float8"

    @staticmethod
    def scaling_of(recipe: str | None) -> Scaling:
        return Scaling("row")


@converter("quantize.grouped_mm.mx")
class MXGroupedMM(_GroupedProducts):
    number_format = "mx"

    @staticmethod
    def scaling_of(recipe: str | None) -> Scaling:
        return Scaling("block")


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
        kernels = config.kernels()
        if isinstance(kernels, EmulatedKernels):  # it multiplies as plain products do
            kernels = EmulatedKernels(config.scaling, plain.kernel)
        product = ScaledGroupedProduct(kernels, config.rounds_weight_gradient, plain_kernel=plain.kernel)
        setattr(module, name, product)
    return module


def _is_too_small(num_outputs: int, num_inputs: int, scaling: Scaling) -> bool:
    """torchao's rule of thumb for H100 (`_auto_filter_for_recipe` in torchao 0.18's float8_linear_utils)."""
    if scaling.shared_by == "tensor":
        return num_inputs <= 4096 and num_outputs <= 1024
    return num_outputs <= 2048 or num_inputs <= 1024 or (num_outputs <= 4096 and num_inputs <= 2048)
