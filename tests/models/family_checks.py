"""What every family's config.json must survive, with transformers' config classes as the judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from titanmoe.models.family import Family, family_of_hf_config
from titanmoe.models.spec import DecoderSpec, GroupedQuery


def config_class_of(config: Mapping[str, Any]) -> Any:
    """The object that transformers makes of a `config.json`."""
    import transformers

    values = json.loads(json.dumps(config))
    values.pop("architectures", None)
    return transformers.AutoConfig.for_model(**values)


def filled_by_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` that transformers 5 writes of the given one: every default filled in, RoPE in its new style."""
    return {
        **json.loads(config_class_of(config).to_json_string(use_diff=False)),
        "architectures": config["architectures"],
    }


def check_flavor(family: Family, flavor: str) -> None:
    """A flavor comes back from its config, and from what transformers makes of it."""
    spec = family.flavor(flavor)
    config = json.loads(json.dumps(family.to_hf_config(spec, "bfloat16")))
    assert family_of_hf_config(config) is family
    assert family.from_hf_config(config) == spec
    assert family.from_hf_config(filled_by_transformers(config)) == spec


def windows_of(spec: DecoderSpec) -> list[int | None]:
    return [layer.attention.window for layer in spec.layers if isinstance(layer.attention, GroupedQuery)]
