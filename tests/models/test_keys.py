"""Rules between file tensors and parameters; every published size of every family is covered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from titanmoe.models.build import build_model
from titanmoe.models.family import FAMILIES, Family, family_of_hf_config, get_family
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


def _transformers_model(config: dict[str, Any], folder: Path) -> nn.Module:
    """The model that transformers builds from this config.json, on the meta device."""
    import transformers

    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))


def _file_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers writes of its model."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = model.state_dict()
    for name in getattr(model, "all_tied_weights_keys", {}):
        del tensors[name]
    return {key: tuple(tensor.shape) for key, tensor in revert_weight_conversion(model, tensors).items()}


# Names that mean the same model are tested once.
_FLAVORS = list(
    {
        spec: (family, flavor)
        for family in reversed(FAMILIES)
        for flavor, spec in reversed(get_family(family).flavors.items())
    }.values()
)[::-1]


def check_file_tensors(family: Family, flavor: str, folder: Path) -> None:
    """A flavor's parameters are the tensors that transformers writes of the model of its config.json."""
    spec = family.flavor(flavor)
    config = json.loads(json.dumps(family.to_hf_config(spec, "bfloat16")))
    assert family_of_hf_config(config) is family
    assert family.from_hf_config(config) == spec

    model = build_model(spec, device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    by_file_key, unknown = map_keys([family.rules], shapes)
    assert unknown == []
    theirs = _transformers_model(config, folder)
    assert {key: piece.shape(shapes[name]) for key, (name, piece) in by_file_key.items()} == _file_shapes(theirs)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(("family_name", "flavor"), _FLAVORS)
def test_every_flavor_has_exactly_the_file_tensors_of_transformers(
    family_name: str, flavor: str, tmp_path: Path
) -> None:
    check_file_tensors(get_family(family_name), flavor, tmp_path)


@pytest.mark.parametrize(("family_name", "flavor"), [one for one in _FLAVORS if one[1].startswith("debug")])
def test_every_layout_that_is_read_has_a_place_for_every_value(family_name: str, flavor: str) -> None:
    """A layout fills whole parameters, and beside the first layout each of its file tensors keeps its meaning."""
    family = get_family(family_name)
    model = build_model(family.flavor(flavor), device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for rules in family.also_reads:
        known = {name: shape for name, shape in shapes.items() if pieces_of(rules, name, shape)}
        by_file_key, unknown = map_keys([rules], known)
        assert not unknown
        present = map_keys([rules, family.rules], shapes, by_file_key)[0]
        assert by_file_key.items() <= present.items()
