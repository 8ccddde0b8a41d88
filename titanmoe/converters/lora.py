"""Adapters: trained low-rank additions to the frozen weights of linear layers and experts.

They are parameters beside those of the module, which keep their names; its product is wrapped. See `ops.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.converters.converter import Converter, converter
from titanmoe.converters.patterns import check_each_matches, first_match, matches
from titanmoe.models.adapters import is_adapter, row_norms
from titanmoe.models.build import init_adapters
from titanmoe.models.decoder import Decoder
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.grouped_mm import Kernel
from titanmoe.ops.low_rank import Adapted, LowRankGroupedProduct, LowRankLinearProduct
from titanmoe.ops.sharding import local_tensor

_Shapes = dict[str, tuple[tuple[int, ...], ...]]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHTS = ("gate_up", "down")
_NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""What patterns call the weights of experts, as files and PEFT do; gate and up are one weight here."""


@converter("lora")
@dataclass(frozen=True)
class LoRA(Converter):
    """Attributes:
    rank: of linear layers.
    alpha: see `scale`.
    dropout: part of the inputs that adapters do not see in training.
    use_rslora: see `scale`.
    use_dora: whether the norms of rows are trained, too.
    patterns: modules to adapt, and weights of experts; all if there are none.
    expert_rank: of each expert; None: rank // experts per token.
    init: see `init_adapters`.
    dtype: of the adapters.
    seed: of their values, if the model has values already.
    weights: of experts, those that are adapted.
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
    init: str = "kaiming"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    weights: tuple[str, ...] = _WEIGHTS

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
            None if section.expert_rank == "scaled" else section.expert_rank,
            section.init,
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
        self._check_patterns(candidates, modules.keys() - candidates.keys())
        for path, module in candidates.items():
            if not self.unwanted(path, module) and self.rank_of(module) < 1:
                assert isinstance(module, Experts)
                raise ConfigError(
                    f"an expert's rank would be rank // experts per token = {self.rank} // {module.spec.top_k} = 0",
                    where="lora.expert_rank",
                    mend=f"Set it to a number, or lora.rank to at least {module.spec.top_k}.",
                )

    def _check_patterns(self, candidates: Mapping[str, nn.Module], others: Collection[str]) -> None:
        experts = [path for path, module in candidates.items() if isinstance(module, Experts)]
        names = [path for path in candidates if path not in experts]
        names += [f"{path}.{name}" for path in experts for name in _NAMES]
        for pattern in self.patterns:
            if any(matches(name, pattern) for name in names):
                continue
            if found := sorted(path for path in others if matches(path, pattern)):
                raise ConfigError(
                    f'"{pattern}" names {found[0]}, which never has an adapter',
                    where="lora.target_modules",
                    mend="Linear layers and experts have them; router, embedding, norms and output do not.",
                )
        what = "names of linear layers and weights of experts"
        check_each_matches(self.patterns, names, "lora.target_modules", what)
        for path in experts:
            gate, up = (self._names(f"{path}.{name}") for name in ("gate_proj", "up_proj"))
            if gate != up and "gate_up" not in self.weights_at(path):
                raise ConfigError(
                    f"{'gate_proj' if gate else 'up_proj'} of {path} is named without the other: they share an A",
                    where="lora.target_modules",
                    mend='Name both, or say which others are meant: "shared_experts.gate_proj", for example.',
                )

    def _names(self, path: str) -> bool:
        return not self.patterns or first_match(path, self.patterns) is not None

    def weights_at(self, path: str) -> tuple[str, ...]:
        """Which weights are adapted of experts that have this path."""
        has_gate_up = self._names(f"{path}.gate_up_proj") or all(
            self._names(f"{path}.{name}") for name in ("gate_proj", "up_proj")
        )
        return _WEIGHTS[:1] * has_gate_up + _WEIGHTS[1:] * self._names(f"{path}.down_proj")

    def unwanted(self, path: str, module: nn.Module) -> str:
        is_named = bool(self.weights_at(path)) if isinstance(module, Experts) else self._names(path)
        return "" if is_named else "not in target_modules"

    def parts(self, paths: Collection[str]) -> Iterator[tuple[LoRA, Collection[str]]]:
        for weights in (_WEIGHTS, _WEIGHTS[:1], _WEIGHTS[1:]):
            # A linear layer that is named has everything "in" it named, too.
            yield replace(self, weights=weights), [path for path in paths if self.weights_at(path) == weights]

    @property
    def result(self) -> str:
        kind = "DoRA" if self.use_dora else "LoRA"
        return kind if self.weights == _WEIGHTS else f"{kind} of {self.weights[0]}_proj"

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
            num_in, num_out = module.in_features, module.out_features
            shapes: _Shapes = {"lora": ((rank, num_in), (num_out, rank), (num_out,))}
        else:
            assert isinstance(module, Experts)
            num_experts, dim, hidden_dim = module.spec.num_experts, module.dim, module.spec.hidden_dim
            gate_up = (num_experts, rank, dim), (num_experts, 2, hidden_dim, rank), (num_experts, 2, hidden_dim)
            down = (num_experts, rank, hidden_dim), (num_experts, dim, rank), (num_experts, dim)
            shapes = {f"{weight}_lora": {"gate_up": gate_up, "down": down}[weight] for weight in self.weights}
        return {
            f"{weight}_{name}": shape
            for weight, of_weight in shapes.items()
            for name, shape in zip(("a", "b", "magnitude")[: 2 + self.use_dora], of_weight, strict=False)
        }

    def describe(self, paths: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        parts = [(part, modules[path]) for part, own in self.parts(paths) for path in own]
        ranks = dict.fromkeys(
            f"rank {self.rank_of(module)} (scale {self.scale(module):g}){' in experts' * isinstance(module, Experts)}"
            for module in map(modules.__getitem__, paths)
        )
        experts = [(part, module.spec.num_experts) for part, module in parts if isinstance(module, Experts)]
        of_experts = sum(len(part.weights) * number for part, number in experts)
        told = f"{len(parts) - len(experts) + of_experts:,} adapters"
        if experts:
            told += f", {of_experts:,} of them of {sum(number for _, number in experts):,} experts"
        num_trained = sum(math.prod(shape) for part, module in parts for shape in part.shapes(module).values())
        whole = {id(value): value.numel() for module in modules.values() for value in module.parameters(recurse=False)}
        share = num_trained / (num_trained + sum(whole.values()))
        kind = "DoRA" if self.use_dora else "LoRA"
        return (
            f" get {kind} of {' and '.join(ranks)}: {told}; {num_trained:,} trainable parameters in "
            f"{str(self.dtype).removeprefix('torch.')}, {share:.2%} of all"
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


@register_quantize_module_handler(LoRA)
def _adapt(module: nn.Module, config: LoRA) -> nn.Module:
    device = next(module.parameters()).device
    for name, shape in config.shapes(module).items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=config.dtype, device=device)))
    assert isinstance(module, (Linear, Experts))
    module.adapter_init = config.init
    scale = config.scale(module)
    if isinstance(module, Linear):
        module.feature_dims |= {"lora_a": (None, 1), "lora_b": (0, None), "lora_magnitude": (0, None)}
        module.product = LowRankLinearProduct(module.product, scale)
        module.read = partial(_read_linear, module.read, config.dropout)
        return module
    module.hidden_dims |= {"gate_up_lora_a": None, "gate_up_lora_b": 2, "gate_up_lora_magnitude": 2}
    module.hidden_dims |= {"down_lora_a": 2, "down_lora_b": None, "down_lora_magnitude": None}
    for name in (f"{weight}_product" for weight in config.weights):
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


def _read_experts(read: Any, dropout: float, module: Experts, name: str) -> Any:
    if not hasattr(module, f"{name}_lora_a"):
        return read(module, name)
    magnitude = getattr(module, f"{name}_lora_magnitude", None)
    return Adapted(
        read(module, name),
        local_tensor(getattr(module, f"{name}_lora_a")),
        local_tensor(getattr(module, f"{name}_lora_b")).flatten(1, -2),
        None if magnitude is None else local_tensor(magnitude).flatten(1),
        dropout if module.training else 0.0,
        module.sum_addends if name == "down" else None,
    )
