"""Rules between file tensors and parameters; every published size of every family is covered."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch

from titanmoe.models.build import build_model
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.keys import Piece, Rule, map_keys, pieces_of

_RULES = (
    Rule("embed.weight", "tok.weight"),
    Rule("h.{i}.norm.weight", "layers.{i}.norm.weight"),
    Rule("h.{i}.experts.{e}.gate", "layers.{i}.gate_up", at=("e", 0)),
    Rule("h.{i}.experts.{e}.up", "layers.{i}.gate_up", at=("e", 1)),
    Rule("h.{i}.experts.{e}.down", "layers.{i}.down", at=("e",)),
)


def test_a_plain_rule_renames() -> None:
    assert pieces_of(_RULES, "tok.weight", (7, 3)) == [Piece("embed.weight")]
    assert pieces_of(_RULES, "layers.12.norm.weight", (3,)) == [Piece("h.12.norm.weight")]
    assert Piece("embed.weight").shape((7, 3)) == (7, 3)


def test_a_stacking_rule_names_one_piece_per_index() -> None:
    pieces = pieces_of(_RULES, "layers.3.gate_up", (2, 2, 5, 4))
    assert set(pieces) == {
        Piece("h.3.experts.0.gate", (0, 0)),
        Piece("h.3.experts.1.gate", (1, 0)),
        Piece("h.3.experts.0.up", (0, 1)),
        Piece("h.3.experts.1.up", (1, 1)),
    }
    assert {piece.shape((2, 2, 5, 4)) for piece in pieces} == {(5, 4)}


@pytest.mark.parametrize(
    "name", ["tok.weights", "tokxweight", "layers.a.norm.weight", "layers.1.2.norm.weight", "x.tok.weight"]
)
def test_only_whole_names_match(name: str) -> None:
    assert pieces_of(_RULES, name, (3,)) == []


def test_map_keys_goes_both_ways_and_names_what_it_does_not_know() -> None:
    shapes = {"tok.weight": (7, 3), "layers.0.down": (2, 3, 5), "layers.0.expert_bias": (2,)}
    by_file_key, unknown = map_keys([_RULES], shapes)
    assert by_file_key == {
        "embed.weight": ("tok.weight", Piece("embed.weight")),
        "h.0.experts.0.down": ("layers.0.down", Piece("h.0.experts.0.down", (0,))),
        "h.0.experts.1.down": ("layers.0.down", Piece("h.0.experts.1.down", (1,))),
    }
    assert unknown == ["layers.0.expert_bias"]


def test_rules_that_overlap_or_leave_gaps_are_bugs() -> None:
    with pytest.raises(AssertionError, match="do not fill"):
        map_keys([_RULES[:3]], {"layers.0.gate_up": (2, 2, 5, 4)})
    with pytest.raises(AssertionError, match="do not fill"):
        map_keys([(*_RULES, Rule("again", "tok.weight"))], {"tok.weight": (7, 3)})
    with pytest.raises(AssertionError, match="another slice"):
        map_keys([(*_RULES, Rule("embed.weight", "output.weight"))], {"tok.weight": (7, 3), "output.weight": (7, 3)})
    with pytest.raises(AssertionError, match="same placeholders"):
        Rule("h.{j}.weight", "layers.{i}.weight")
    with pytest.raises(AssertionError, match="same placeholders"):
        Rule("h.{i}.weight", "layers.{i}.weight", at=("e",))


def _file_shapes_of_transformers(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them, from its own model on the meta device."""
    import transformers

    kind = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind)
    shapes = {}
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # Stacked in its memory; one tensor per expert, and gate and up apart, in its files.
            prefix, _, name = key.rpartition(".")
            parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
            for expert in range(shape[0]):
                for part in parts:
                    shapes[f"{prefix}.{expert}.{part}.weight"] = (shape[1] // len(parts), *shape[2:])
        else:
            shapes[key] = shape
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes


_FLAVORS = [(family, flavor) for family in FAMILIES for flavor in get_family(family).flavors]


@pytest.mark.parametrize(("family_name", "flavor"), _FLAVORS)
def test_every_flavor_has_exactly_the_file_tensors_of_transformers(family_name: str, flavor: str) -> None:
    family = get_family(family_name)
    spec = family.flavor(flavor)
    model = build_model(spec, device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    by_file_key, unknown = map_keys([family.rules], shapes)
    assert unknown == []
    ours = {key: piece.shape(shapes[name]) for key, (name, piece) in by_file_key.items()}
    config = json.loads(json.dumps(family.to_hf_config(spec, "bfloat16")))
    assert ours == _file_shapes_of_transformers(config)
    assert sum(map(prod, ours.values())) == sum(parameter.numel() for parameter in model.parameters())
    assert family.from_hf_config(config) == spec
