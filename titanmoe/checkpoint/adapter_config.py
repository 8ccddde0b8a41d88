"""adapter_config.json: what PEFT makes of a base model to load an adapter, and what a product is multiplied with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from titanmoe.checkpoint.adapter_names import (
    PREFIX,
    A,
    is_of_experts,
    layouts,
    pieces_by_name,
    rules_of,
    stacked_parameter,
)
from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.config.errors import ConfigError
from titanmoe.config.sections.lora import LoRA
from titanmoe.models.build import build_model
from titanmoe.models.family import Family
from titanmoe.models.spec import DecoderSpec

PER_EXPERT = "peft-per-expert"

# PEFT takes these names for those of experts in models that have any, in their dense layers too (PEFT 0.21,
# peft.utils.transformers_weight_conversion). As parameters they are left alone, and computed with alike.
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSettings:
    """What the tensors of a model's adapters do not tell: `[lora]` of the config.

    The alpha of experts is to `alpha` as their rank is to `rank`.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False

    @staticmethod
    def of(section: LoRA) -> AdapterSettings:
        return AdapterSettings(section.rank, section.alpha, section.use_rslora, section.use_dora)

    def alpha_of(self, rank: int) -> float:
        return self.alpha * rank / self.rank

    def scale_of(self, rank: int) -> float:
        """What the product of B and A of this rank is multiplied with."""
        return self.alpha_of(rank) / (sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class _Target:
    """What PEFT adapts: a module, or a parameter (of the whole model), and what names it in any layer."""

    name: str
    short: str
    rank: int
    is_parameter: bool
    is_of_experts: bool


def adapter_config(
    family: Family,
    spec: DecoderSpec,
    shapes: Mapping[str, tuple[int, ...]],
    settings: AdapterSettings,
    layout: str,
    base: str | None,
) -> dict[str, Any]:
    """The contents of the file.

    Args:
        shapes: of the adapters' parameters, by name.
        layout: see `adapter_names`.
        base: the base model's folder or name.

    Raises:
        ConfigError: DoRA on parameters, which PEFT does not have.
    """
    has_experts = any(name.endswith(".experts.down") for name in whole_shapes(spec))
    targets = list(_targets(family, layout, shapes, has_experts))
    parameters = [target for target in targets if target.is_parameter]
    if settings.use_dora and parameters:
        weights = [sum(name.endswith(f".{weight}_lora_a") for name in shapes) for weight in ("gate_up", "down")]
        goes_by_expert = PER_EXPERT in layouts(family) and weights[0] == weights[1]
        raise ConfigError(
            "PEFT has no DoRA for stacked experts, nor for linear layers beside them",
            where=parameters[0].name,
            mend="Merge it into the weights (--merge)"
            + (f", or choose --format {PER_EXPERT}." if goes_by_expert else "."),
        )
    of_whole = _targets(family, layout, whole_shapes(spec), has_experts)
    names = _shortened(targets, of_whole)
    ranks = {}
    for target in targets:
        if target.is_of_experts and target.rank != settings.rank:
            key = target.short if layout != PER_EXPERT else rf"experts\.\d+\.{target.short}"
            ranks[key] = target.rank
            if layout == PER_EXPERT:
                # transformers 5 stacks them, and gate and up together are of twice the rank.
                ranks |= {r"experts\.gate_up_proj": 2 * target.rank, r"experts\.down_proj": target.rank}
    one_scale = settings.scale_of(settings.rank)
    use_rslora = settings.use_rslora and layout != PER_EXPERT

    def alpha_of(rank: int) -> float:
        return settings.alpha_of(rank) if use_rslora else one_scale * rank

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": alpha_of(settings.rank),
        "lora_dropout": 0.0,
        "use_rslora": use_rslora,
        "use_dora": settings.use_dora,
        "target_modules": [name for name, is_parameter in names.items() if not is_parameter],
        "target_parameters": [name for name, is_parameter in names.items() if is_parameter] or None,
        "rank_pattern": ranks,
        "alpha_pattern": {key: alpha_of(rank) for key, rank in ranks.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _targets(
    family: Family, layout: str, shapes: Mapping[str, tuple[int, ...]], has_experts: bool
) -> Iterator[_Target]:
    factors = {name: shape for name, shape in shapes.items() if name.endswith("lora_a")}
    pieces = pieces_by_name(rules_of(family, layout), factors)
    for name, shape in factors.items():
        of_experts = is_of_experts(name)
        if of_experts and layout != PER_EXPERT:
            short = stacked_parameter(family, "gate_up" if name.endswith("gate_up_lora_a") else "down")
            layer = name.partition("layers.")[2].partition(".")[0]
            yield _Target(f"layers.{layer}.{short}", short, shape[-2], True, True)
            continue
        for piece in pieces[name]:
            module = piece.file_key.removeprefix(PREFIX).removesuffix(f".{A}")
            short = module.rpartition(".")[2]
            if has_experts and short in _TAKEN_FOR_EXPERTS and layout != PER_EXPERT:
                in_layer = module.partition("layers.")[2].partition(".")[2]
                yield _Target(f"{module}.weight", f"{in_layer}.weight", shape[-2], True, of_experts)
            else:
                yield _Target(module, short, shape[-2], False, of_experts)


def _shortened(targets: list[_Target], of_whole: Iterator[_Target]) -> dict[str, bool]:
    """Short names of those that are adapted wherever they are, whole names of others; and which are parameters."""
    everywhere = defaultdict(set)
    for target in of_whole:
        everywhere[target.short].add(target.name)
    for target in targets:
        everywhere[target.short].discard(target.name)
    return {target.name if everywhere[target.short] else target.short: target.is_parameter for target in targets}


def whole_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The shapes that A and B would have if all of the model were adapted with rank one, and those of the experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model_tensors(build_model(spec)).items():
        *outputs, inputs = tensor.shape or (0,)
        if name.endswith((".experts.gate_up", ".experts.down")):
            shapes |= {name: tuple(tensor.shape), f"{name}_lora_a": (outputs[0], 1, inputs)}
            shapes[f"{name}_lora_b"] = (*outputs, 1)
        elif name.endswith(".weight") and tensor.dim() == 2:
            linear = name.removesuffix("weight")
            shapes |= {f"{linear}lora_a": (1, inputs), f"{linear}lora_b": (*outputs, 1)}
    return shapes
