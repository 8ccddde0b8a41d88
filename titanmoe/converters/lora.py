"""Adapters: trained low-rank additions to the frozen weights of linear layers and experts.

They are parameters beside those of the module, which keep their names; its product is wrapped. See `ops.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.sections.lora import SCALED
from titanmoe.converters.converter import Converter, converter
from titanmoe.converters.patterns import check_each_matches, first_match
from titanmoe.models.adapters import is_adapter, row_norms
from titanmoe.models.build import init_adapters
from titanmoe.models.decoder import Decoder
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.grouped_mm import Kernel
from titanmoe.ops.low_rank import Adapted, LowRankGroupedProduct, LowRankLinearProduct
from titanmoe.ops.sharding import local_tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@converter("lora")
@dataclass(frozen=True)
class LoRA(Converter):
    """Attributes:
    rank: of linear layers.
    alpha: see `scale`.
    dropout: part of the inputs that adapters do not see in training.
    use_rslora: see `scale`.
    use_dora: whether the norms of rows are trained, too.
    patterns: modules to adapt; all if there are none.
    expert_rank: of each expert; None: rank // experts per token.
    dtype: of the adapters.
    seed: of their values, if the model has values already.
    """

    modules = "linear layers and groups of experts"
    goes_on_top = True

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    patterns: tuple[str, ...] = ()
    expert_rank: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> LoRA:
        section = config.lora
        return cls(
            section.rank,
            section.alpha,
            section.dropout,
            section.use_rslora,
            section.use_dora,
            section.target_modules,
            None if section.expert_rank == SCALED else int(section.expert_rank),
            _DTYPES[section.dtype],
            config.debug.seed or 0,
        )

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, (Linear, Experts))

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        candidates = {path: module for path, module in modules.items() if self.may_change(module)}
        if any(is_adapter(name) for module in candidates.values() for name, _ in module.named_parameters()):
            raise ConfigError(
                "the model has adapters already", where="model.converters", mend="Apply it to a model without."
            )
        check_each_matches(self.patterns, list(candidates), "lora.target_modules", self.modules)
        for path, module in candidates.items():
            if not self.unwanted(path, module) and self.rank_of(module) < 1:
                assert isinstance(module, Experts)
                raise ConfigError(
                    f"an expert's rank would be rank // experts per token = {self.rank} // {module.spec.top_k} = 0",
                    where="lora.expert_rank",
                    mend=f"Set it to a number in quotes, or lora.rank to at least {module.spec.top_k}.",
                )

    def unwanted(self, path: str, module: nn.Module) -> str:
        return "not in target_modules" if self.patterns and first_match(path, self.patterns) is None else ""

    @property
    def result(self) -> str:
        return "DoRA" if self.use_dora else "LoRA"

    def rank_of(self, module: nn.Module) -> int:
        if not isinstance(module, Experts):
            return self.rank
        return self.rank // module.spec.top_k if self.expert_rank is None else self.expert_rank

    def scale(self, module: nn.Module) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732).

        An alpha is that of a whole rank: experts of a smaller one have one that is as much smaller.
        """
        rank = self.rank_of(module)
        alpha = self.alpha * rank / self.rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Of the parameters that a module gets, by name."""
        rank = self.rank_of(module)
        if isinstance(module, Linear):
            shapes = {
                "lora_a": (rank, module.in_features),
                "lora_b": (module.out_features, rank),
                "lora_magnitude": (module.out_features,),
            }
        else:
            assert isinstance(module, Experts)
            num_experts, dim, hidden_dim = module.spec.num_experts, module.dim, module.spec.hidden_dim
            shapes = {
                "gate_up_lora_a": (num_experts, rank, dim),
                "gate_up_lora_b": (num_experts, 2, hidden_dim, rank),
                "gate_up_lora_magnitude": (num_experts, 2, hidden_dim),
                "down_lora_a": (num_experts, rank, hidden_dim),
                "down_lora_b": (num_experts, dim, rank),
                "down_lora_magnitude": (num_experts, dim),
            }
        return {name: shape for name, shape in shapes.items() if self.use_dora or not name.endswith("magnitude")}

    def describe(self, changed: Sequence[nn.Module]) -> str:
        ranks = dict.fromkeys(
            f"rank {self.rank_of(module)} (scale {self.scale(module):g}){' in experts' * isinstance(module, Experts)}"
            for module in changed
        )
        num_experts = sum(module.spec.num_experts for module in changed if isinstance(module, Experts))
        num_linears = sum(isinstance(module, Linear) for module in changed)
        num_parameters = sum(math.prod(shape) for module in changed for shape in self.shapes(module).values())
        return (
            f" get {self.result} of {' and '.join(ranks)}: {num_linears + 2 * num_experts:,} adapters, two for each of "
            f"{num_experts:,} experts; {num_parameters:,} trainable parameters in {_name(self.dtype)}"
        )

    def finish(self, model: Decoder) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if not next(model.parameters()).is_meta:
            init_adapters(model, self.seed)
            for module in model.modules():
                for name, norms in row_norms(module):
                    magnitude = getattr(module, name)
                    magnitude.data.copy_(norms.view_as(magnitude))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@register_quantize_module_handler(LoRA)
def _adapt(module: nn.Module, config: LoRA) -> nn.Module:
    device = next(module.parameters()).device
    for name, shape in config.shapes(module).items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=config.dtype, device=device)))
    scale = config.scale(module)
    if isinstance(module, Linear):
        module.feature_dims |= {"lora_a": (None, 1), "lora_b": (0, None), "lora_magnitude": (0, None)}
        module.product = LowRankLinearProduct(module.product, scale)
        module.read = partial(_read_linear, module.read, config.dropout)
        return module
    assert isinstance(module, Experts)
    module.hidden_dims |= {"gate_up_lora_a": None, "gate_up_lora_b": 2, "gate_up_lora_magnitude": 2}
    module.hidden_dims |= {"down_lora_a": 2, "down_lora_b": None, "down_lora_magnitude": None}
    for name in ("gate_up_product", "down_product"):
        base = getattr(module, name)
        kernel: Kernel = getattr(getattr(base, "plain", base), "kernel", "auto")  # of products in training.dtype
        setattr(module, name, LowRankGroupedProduct(base, scale, kernel))
    module.read = partial(_read_experts, module.read, config.dropout)
    return module


def _read_linear(read: Any, dropout: float, module: Linear) -> Adapted:
    a: Any = module.lora_a
    b: Any = module.lora_b
    magnitude = getattr(module, "lora_magnitude", None)
    return Adapted(
        read(module),
        local_tensor(a),
        local_tensor(b),
        None if magnitude is None else local_tensor(magnitude),
        dropout if module.training else 0.0,
        module.sum_addends,
    )


def _read_experts(read: Any, dropout: float, module: Experts, name: str) -> Adapted:
    magnitude = getattr(module, f"{name}_lora_magnitude", None)
    return Adapted(
        read(module, name),
        local_tensor(getattr(module, f"{name}_lora_a")),
        local_tensor(getattr(module, f"{name}_lora_b")).flatten(1, -2),
        None if magnitude is None else local_tensor(magnitude).flatten(1),
        dropout if module.training else 0.0,
        module.sum_addends if name == "down" else None,
    )
