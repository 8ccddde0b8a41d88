"""What a family is, and which families there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.keys import Rule
from titanmoe.models.spec import DecoderSpec

FAMILIES = ("qwen3", "qwen2", "llama3", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "llama4", "gpt_oss", "mixtral")
"""Every family, by the name of its file in `families/`."""


@dataclass(frozen=True)
class Family:
    """Everything that is particular to a family of models.

    Attributes:
        name: what `model.name` calls it.
        architectures: the names in a `config.json` that mean this family.
        model_types: its names there under `model_type`, which count where no architecture is named.
        flavors: the sizes that `model.flavor` can name.
        from_hf_config: a parsed `config.json` -> spec; raises ConfigError for options that are not supported.
        to_hf_config: (spec, dtype name such as "bfloat16") -> what `config.json` holds.
        rules: file tensors <-> parameters, as the family's checkpoints are written.
        also_reads: other layouts of some or all parameters that checkpoints come in.
        ignored_keys: patterns (fnmatch) of file tensors that carry nothing, such as recomputable buffers.
        extra_layer_key: a file key, with {i}, that only a layer beyond the model's has (a multi-token prediction
            layer); all tensors of such a layer are dropped.
    """

    name: str
    architectures: tuple[str, ...]
    flavors: Mapping[str, DecoderSpec]
    from_hf_config: Callable[[Mapping[str, Any]], DecoderSpec]
    to_hf_config: Callable[[DecoderSpec, str], dict[str, Any]]
    rules: Sequence[Rule]
    also_reads: Sequence[Sequence[Rule]] = ()
    ignored_keys: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    extra_layer_key: str | None = None
    model_types: tuple[str, ...] = ()

    @property
    def layouts(self) -> tuple[Sequence[Rule], ...]:
        """Every layout that is read; the first is the one that is written."""
        return (self.rules, *self.also_reads)

    def flavor(self, name: str) -> DecoderSpec:
        """The spec of a named size.

        Raises:
            ConfigError: no such flavor.
        """
        if name not in self.flavors:
            raise ConfigError(
                f"family {self.name!r} has no flavor {name!r}",
                where="model.flavor",
                mend=f"choose one of: {', '.join(self.flavors)}",
            )
        return self.flavors[name]


def get_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        ConfigError: no such family.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"no model family is called {name!r}",
            where="model.name",
            mend=f"choose one of: {', '.join(FAMILIES)}, auto",
        )
    return importlib.import_module(f"titanmoe.models.families.{name}").FAMILY


def family_of_hf_config(config: Mapping[str, Any]) -> Family:
    """The family whose architecture a parsed `config.json` names or, if it names none, whose `model_type`.

    Raises:
        ConfigError: the architecture is missing or not supported.
    """
    families = [get_family(name) for name in FAMILIES]
    named = config.get("architectures")
    key = "architectures" if named else "model_type"
    names = named if named and isinstance(named, list) else [named or config.get("model_type") or "(none named)"]
    supported: list[str] = []
    for family in families:
        known = family.architectures if key == "architectures" else family.model_types
        if any(name in known for name in names):
            return family
        supported += known
    what = "architecture" if key == "architectures" else "model type"
    raise ConfigError(
        f"{what} {', '.join(map(str, names))} is not supported",
        where=f"config.json: {key}",
        mend=f"supported are: {', '.join(supported)}",
    )
