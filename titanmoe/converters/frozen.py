"""Converters of storage: weights that are not trained, in few bits, for linear layers and experts.

A weight's parameter is replaced by its parts (`weight_payload`, `weight_scale`, ...: see `ops.frozen_formats`), which
are bytes and require no gradient. A model that has values is quantised in place, one module after the other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.converters.converter import Converter, converter
from titanmoe.converters.patterns import check_each_matches, first_match
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.backends import Kind, NoBackendError
from titanmoe.ops.float8 import BLOCK
from titanmoe.ops.frozen import FrozenGroupedProduct, FrozenKernels, FrozenLinearProduct, FrozenWeight
from titanmoe.ops.frozen_backends import choose_kernels
from titanmoe.ops.frozen_formats import MX, NF4, Float8Block, Float8Channel, Format
from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.grouped_mm import PlainGroupedProduct


@dataclass(frozen=True)
class Frozen(Converter):
    """Attributes:
    fqns: modules to change; all if there are none.
    filter_fqns: of these, those to leave.
    """

    modules = "linear layers and groups of experts"

    fqns: tuple[str, ...]
    filter_fqns: tuple[str, ...]

    @abstractmethod
    def format(self, num_inputs: int) -> Format:
        """Of a weight with so many inputs."""

    @property
    def input_multiple(self) -> int:
        """What the number of inputs must be a multiple of."""
        return 1

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, (Linear, Experts))

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        paths = [path for path, module in modules.items() if self.may_change(module)]
        check_each_matches(self.fqns, paths, f"{self.name}.fqns", self.modules)
        # Other modules may be named, too, since they stay as they are.
        check_each_matches(self.filter_fqns, list(modules), f"{self.name}.filter_fqns", "modules")

    def unwanted(self, path: str, module: nn.Module) -> str:
        if self.fqns and first_match(path, self.fqns) is None:
            return "not in fqns"
        listed = first_match(path, self.filter_fqns)
        return "" if listed is None else f'"{listed}" is in filter_fqns'

    def misfit(self, module: nn.Module) -> str:
        inputs = [shape[-1] for shape in _weights(module).values()]
        if all(number % self.input_multiple == 0 for number in inputs):
            return ""
        return f"{' and '.join(map(str, inputs))} inputs: not a multiple of {self.input_multiple}"

    @property
    def result(self) -> str:
        return "frozen " + self.name.rpartition(".")[2].upper().replace("FLOAT8", "FP8").replace("MX", "MXFP8")

    def kernels(self, module: nn.Module) -> FrozenKernels | None:
        """What multiplies with the weights of a module as they are stored; None if they are dequantised."""
        return None

    def backend_of(self, module: nn.Module) -> str:
        kernels = self.kernels(module)
        return "dequantised in pieces" if kernels is None else kernels.name

    @property
    @abstractmethod
    def scales(self) -> str:
        """How many scales there are, for people."""

    def describe(self, paths: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        stored = [self._stored(modules[path], name) for path in paths for name in _weights(modules[path])]
        num_values = sum(weight.numel for weight in stored)
        bits = 8 * sum(weight.num_bytes for weight in stored) / num_values
        return f" become {self.result} ({self.scales}): {num_values:,} values of {bits:.2f} bits"

    def _stored(self, module: nn.Module, name: str) -> Stored:
        shape = _weights(module)[name]
        return Stored(name, self.format(shape[-1]), shape, isinstance(module, Experts))


@converter("quantize.frozen.float8")
@dataclass(frozen=True)
class FrozenFloat8(Frozen):
    """Attributes:
    recipe: "channel" or "block".
    backend: as in the job config.
    device: where the model will compute.
    choices: what `choose_kernels` has said so far, when it was needed.
    """

    recipe: str
    backend: str
    device: torch.device
    choices: dict[Kind, tuple[FrozenKernels | None, str]] = field(default_factory=dict, compare=False)

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> FrozenFloat8:
        section = config.quantize.frozen.float8
        return cls(section.fqns, section.filter_fqns, section.recipe_name, section.backend, device)

    def format(self, num_inputs: int) -> Format:
        return Float8Channel() if self.recipe == "channel" else Float8Block()

    @property
    def scales(self) -> str:
        return "a scale per output" if self.recipe == "channel" else "a scale per 128 x 128 values"

    def kernels(self, module: nn.Module) -> FrozenKernels | None:
        kernels, _ = self._choice(_kind(module))
        sizes = (size for shape in _weights(module).values() for size in shape[-2:])
        return None if kernels is None or any(size % kernels.feature_multiple for size in sizes) else kernels

    def _choice(self, kind: Kind) -> tuple[FrozenKernels | None, str]:
        if kind not in self.choices:
            try:
                self.choices[kind] = choose_kernels(kind, self.format(0).name, self.device, self.backend)
            except NoBackendError as error:
                raise ConfigError(
                    str(error),
                    where="quantize.frozen.float8.backend",
                    mend='"auto" takes what the device has; "emulated" computes the same numbers, slowly.',
                ) from error
        return self.choices[kind]

    def describe(self, paths: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        told = super().describe(paths, modules)
        for kind, what in _KINDS.items():
            changed = [modules[path] for path in paths if _kind(modules[path]) == kind]
            if not changed:
                continue
            kernels, why = self._choice(kind)
            if kernels is None:
                told += f"; {what} dequantised{why and ', as '}{why}"
            else:
                num_native = sum(self.kernels(module) is not None for module in changed)
                told += f"; {num_native} of {len(changed)} {what} multiplied as they are stored, by {kernels.name}"
        return told


@converter("quantize.frozen.mx")
@dataclass(frozen=True)
class FrozenMX(Frozen):
    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> FrozenMX:
        section = config.quantize.frozen.mx
        return cls(section.fqns, section.filter_fqns)

    def format(self, num_inputs: int) -> Format:
        return MX()

    @property
    def input_multiple(self) -> int:
        return BLOCK

    @property
    def scales(self) -> str:
        return f"a scale per {BLOCK} values"


@converter("quantize.frozen.nf4")
@dataclass(frozen=True)
class FrozenNF4(Frozen):
    """Attributes:
    block: values that share a scale.
    double_quant: whether scales are in 8 bits, too.
    """

    block: int = 64
    double_quant: bool = True

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> FrozenNF4:
        section = config.quantize.frozen.nf4
        if section.block_size & (section.block_size - 1):
            raise ConfigError(
                f"{section.block_size} is not a power of two",
                where="quantize.frozen.nf4.block_size",
                mend="QLoRA has 64. Smaller blocks are more exact and take more memory.",
            )
        return cls(section.fqns, section.filter_fqns, section.block_size, section.double_quant)

    def format(self, num_inputs: int) -> Format:
        return NF4.for_columns(num_inputs, self.block, self.double_quant)

    @property
    def input_multiple(self) -> int:
        return self.block

    @property
    def scales(self) -> str:
        return f"a scale per {self.block} values{', quantised in turn' if self.double_quant else ''}"


@register_quantize_module_handler(FrozenFloat8)
@register_quantize_module_handler(FrozenMX)
@register_quantize_module_handler(FrozenNF4)
def _freeze(module: nn.Module, config: Frozen) -> nn.Module:
    for name in _weights(module):
        weight, stored = getattr(module, name), config._stored(module, name)
        stored.add_to(module, weight.device)
        if not weight.is_meta:
            _quantize(module, stored, weight.detach())
        _describe_parts(module, stored)
    if isinstance(module, Linear):
        module.product = FrozenLinearProduct(config.kernels(module))
        module.read = _read_linear
        return module
    assert isinstance(module, Experts)
    for product in ("gate_up_product", "down_product"):
        plain = getattr(module, product)
        assert isinstance(plain, PlainGroupedProduct)
        setattr(module, product, FrozenGroupedProduct(plain.kernel, config.kernels(module)))
    module.read = _read_experts
    return module


_KINDS: dict[Kind, str] = {"linear": "linear layers", "grouped_mm": "groups of experts"}


def _kind(module: nn.Module) -> Kind:
    return "grouped_mm" if isinstance(module, Experts) else "linear"


def _weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a module."""
    if isinstance(module, Experts):
        num_experts, hidden_dim = module.spec.num_experts, module.spec.hidden_dim
        return {
            "gate_up": (num_experts, 2, hidden_dim, module.dim),
            "down": (num_experts, module.dim, hidden_dim),
        }
    assert isinstance(module, Linear)
    return {"weight": (module.out_features, module.in_features)}


def _quantize(module: nn.Module, stored: Stored, weight: torch.Tensor) -> None:
    for matrix, rows in stored.pieces(module):
        try:
            stored.fill(module, matrix, rows.start, weight[matrix][rows].float())
        except ValueError as error:
            raise ConfigError(str(error), where=f"{stored.name} of a {type(module).__name__}") from error


def _describe_parts(module: Any, stored: Stored) -> None:
    """Say which dims of the parts are cut where the weight's are."""
    module.stored[stored.name] = stored
    for name, part in zip(stored.part_names, stored.format.parts, strict=True):
        inputs = None if part.columns is None else len(stored.shape) - 1
        if isinstance(module, Linear):
            module.feature_dims[name] = (0, inputs)
        else:  # hidden units are outputs of gate and up, and inputs of down
            module.hidden_dims[name] = len(stored.shape) - 2 if stored.name == "gate_up" else inputs


def _read_linear(module: Linear) -> FrozenWeight:
    return module.stored["weight"].read(module)


def _read_experts(module: Experts, name: str) -> FrozenWeight:
    return module.stored[name].read(module)
