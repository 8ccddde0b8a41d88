"""What PEFT's files call an adapter's tensors and how they arrange them, derived from a family's rules for its weights.

Two layouts. "peft" is that of the experts as transformers 5 has them, stacked, each weight a parameter of one module
(`target_parameters`, peft.tuners.lora.layer.ParamWrapper of PEFT 0.21): of E experts with rank r, A is (r * E, in) with
the expert slowest, B (out, r * E) with the expert fastest. The wrapper of the second parameter is around that of the
first, which is then found under `base_layer`. "peft-per-expert" has a pair for every linear of every expert.

Shape suffixes: E experts, r rank, D model dim, H hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from titanmoe.config.errors import ConfigError
from titanmoe.models.family import Family
from titanmoe.models.keys import Axes, Piece, Rule, pieces_of

PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

# PEFT takes a stacked weight as (E, out, in) unless its module has `is_transposed`. In transformers 5, the experts of
# this family are (E, in, out) and do not say so: PEFT exchanges inputs and outputs.
_TRANSPOSED_UNSAID = ("llama4",)
_INNER = ".base_layer"
_STACKED_ENDINGS = {"gate_up": ".gate_up_proj", "down": ".down_proj"}


def is_of_experts(name: str) -> bool:
    """Whether an adapter's parameter is that of stacked experts."""
    return "_lora_" in name.rpartition(".")[2]


def linear_rules(family: Family) -> Iterator[Rule]:
    """Adapters of linears, the same in both layouts."""
    for rule in family.rules:
        if rule.pattern.endswith(".weight") and not rule.at and rule.axes is None:
            module, ours = PREFIX + rule.file_pattern.removesuffix("weight"), rule.pattern.removesuffix("weight")
            yield Rule(module + A, f"{ours}lora_a")
            yield Rule(module + B, f"{ours}lora_b")
            yield Rule(module + MAGNITUDE, f"{ours}lora_magnitude")


def stacked_rules(family: Family) -> Iterator[Rule]:
    """Adapters of all experts in one pair."""
    for name in _STACKED_ENDINGS:
        rule = _stacked_rule(family, name)
        if rule is None:
            continue
        ours, usual = ("e g h d", "e (g h) d") if name == "gate_up" else ("e d h", "e d h")
        inputs, outputs = ("d", "g h") if name == "gate_up" else ("h", "d")
        _, rows, columns = (rule.axes or Axes(usual, ours)).groups
        is_transposed = columns != (inputs,)
        their_outputs = _text(columns if is_transposed else rows)
        first, second = (f"e r {inputs}", f"{rule.pattern}_lora_a"), (f"e {outputs} r", f"{rule.pattern}_lora_b")
        if is_transposed and family.name in _TRANSPOSED_UNSAID:
            # What PEFT calls the first multiplies the outputs.
            inputs, their_outputs, first, second = their_outputs, inputs, second, first
        module = PREFIX + rule.file_pattern.removesuffix(_STACKED_ENDINGS[name])
        module += _INNER if name == "gate_up" else ""
        yield Rule(f"{module}.{A}", first[1], axes=Axes(f"(e r) {inputs}", first[0]))
        yield Rule(f"{module}.{B}", second[1], axes=Axes(f"{their_outputs} (r e)", second[0]))


def per_expert_rules(family: Family) -> Iterator[Rule]:
    """Adapters of every expert. Gate and up have an A each in files: both belong to the one A of `gate_up`."""
    for rules in family.layouts:
        found = [rule for rule in rules if rule.at[:1] == ("e",)]
        for rule in found:
            module = PREFIX + rule.file_pattern.removesuffix("weight")
            yield Rule(module + A, f"{rule.pattern}_lora_a", at=("e",))
            yield replace(rule, file_pattern=module + B, pattern=f"{rule.pattern}_lora_b")
            yield replace(rule, file_pattern=module + MAGNITUDE, pattern=f"{rule.pattern}_lora_magnitude")
        if found:
            return


def stacked_parameter(family: Family, name: str) -> str:
    """What transformers calls the stacked weight ("gate_up" or "down") within a layer, such as
    "mlp.experts.gate_up_proj"; "" if it has none."""
    rule = _stacked_rule(family, name)
    return "" if rule is None else rule.file_pattern.partition("{i}.")[2]


def pieces_by_name(rules: Sequence[Rule], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Piece]]:
    """The file tensors of each of a model's adapter parameters; none for those that the layout has no place for.

    Gate and up of stacked experts are a `base_layer` only where down has an adapter, too.
    """
    found = {}
    for name, shape in shapes.items():
        pieces = pieces_of(rules, name, shape)
        if name.replace("gate_up_lora_", "down_lora_") not in shapes:
            pieces = [replace(piece, file_key=piece.file_key.replace(_INNER, "")) for piece in pieces]
        found[name] = pieces
    return found


def layouts(family: Family) -> dict[str, list[Rule]]:
    """The rules of each layout that the family has, by its name."""
    linears = list(linear_rules(family))
    has_experts = any(rule.pattern.endswith(".experts.down") for rule in family.rules)
    by_name = {"peft": [*linears, *stacked_rules(family)], "peft-per-expert": [*linears, *per_expert_rules(family)]}
    return {name: rules for name, rules in by_name.items() if not has_experts or len(rules) > len(linears)}


def rules_of(family: Family, layout: str) -> list[Rule]:
    """
    Raises:
        ConfigError: the family has no such layout.
    """
    found = layouts(family)
    if layout not in found:
        raise ConfigError(
            f"experts of family {family.name!r} have no names of their own in any file",
            where=f"--format {layout}",
            mend=f"Choose {' or '.join(found)}, or merge the adapters (--merge).",
        )
    return found[layout]


def _stacked_rule(family: Family, name: str) -> Rule | None:
    ours, theirs = f".experts.{name}", _STACKED_ENDINGS[name]
    of_all = (rule for rules in family.layouts for rule in rules)
    return next(
        (rule for rule in of_all if rule.pattern.endswith(ours) and rule.file_pattern.endswith(theirs) and not rule.at),
        None,
    )


def _text(group: tuple[str, ...]) -> str:
    return f"({' '.join(group)})" if len(group) > 1 else group[0]
