"""Reading a `config.json`: typed values, what most families share, and errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LinearScaling, Llama3Scaling, Rope, YarnScaling

_REQUIRED_OF_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_OPTIONS_OF_YARN = ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor")
_OPTIONS_OF_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": _REQUIRED_OF_LLAMA3,
    "yarn": ("factor", "original_max_position_embeddings", *_OPTIONS_OF_YARN),
}
_OF_ALL_ROPES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class HfConfig:
    """The values of a parsed `config.json`. An absent key and `null` are the same.

    Every method raises ConfigError, naming the key, for a value that is missing or of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, *keys: str, default: int | None = None) -> int:
        """A whole number of at least 1, under the first of the keys that is there."""
        for key in keys:
            if (value := self.values.get(key)) is not None:
                if type(value) is not int or value < 1:
                    raise ConfigError(f"{value!r} is not a positive whole number", where=_where(key))
                return value
        if default is None:
            raise ConfigError(f"{' or '.join(keys)} is missing", where="config.json")
        return default

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{value!r} is not a number", where=_where(key))
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{value!r} is neither true nor false", where=_where(key))
        return value

    def require(self, key: str, *supported: Any, default: Any) -> Any:
        """The value, if it is one of those supported; `default` (which should be one) if the key is absent."""
        value = self.values.get(key, default)
        if value not in supported:
            raise ConfigError(
                f"{key} {value!r} is not supported",
                where=_where(key),
                mend=f"supported: {', '.join(map(repr, supported))}",
            )
        return value

    def refuse_other_than_silu(self) -> None:
        """Refuse what no family here computes: another activation than SwiGLU's, and dropout."""
        self.require("hidden_act", "silu", "swish", default="silu")
        self.require("attention_dropout", 0, default=0)

    def heads(self) -> tuple[int, int]:
        """Query heads, and key-value heads, which divide them."""
        num_heads = self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{num_heads} query heads cannot be dealt to {num_kv_heads} key-value heads",
                where=_where("num_key_value_heads"),
            )
        return num_heads, num_kv_heads

    def experts(self, *keys: str) -> tuple[int, int]:
        """How many experts there are (under one of `keys`), and how many a token chooses."""
        num_experts, top_k = self.integer(*keys), self.integer("num_experts_per_tok")
        if top_k > num_experts:
            raise ConfigError(f"{top_k} of {num_experts} experts cannot be chosen", where=_where("num_experts_per_tok"))
        return num_experts, top_k

    def rope(self, head_dim: int, *, default_theta: float = 1e4, fraction: float = 1.0, **options: Any) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Args:
            head_dim: channels of a head, of which `partial_rotary_factor` are rotated.
            fraction: `partial_rotary_factor` where the config has none.
            options: further fields of the Rope.
        """
        key = "rope_parameters" if "rope_parameters" in self else "rope_scaling"
        given = self.values.get(key, {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"{given!r} is not a table of options", where=_where(key))
        given = HfConfig(given)
        kind = given.values.get("rope_type") or given.values.get("type") or "default"
        if kind not in _OPTIONS_OF_ROPE:
            raise ConfigError(
                f"rope type {kind!r} is not supported",
                where=_where(key),
                mend=f"supported: {', '.join(_OPTIONS_OF_ROPE)}",
            )
        if unknown := sorted(given.values.keys() - {*_OPTIONS_OF_ROPE[kind], *_OF_ALL_ROPES}):
            raise ConfigError(f"option {unknown[0]!r} of rope type {kind!r} is not supported", where=_where(key))
        theta = given.number("rope_theta", self.number("rope_theta", default_theta))
        fraction = given.number("partial_rotary_factor", self.number("partial_rotary_factor", fraction))
        dim = int(head_dim * fraction)
        if dim % 2 or not 0 < dim <= head_dim:
            raise ConfigError(f"{dim} of a head's {head_dim} channels cannot be rotated", where="config.json")
        return Rope(dim, theta, self._scaling(kind, given), **options)

    def _scaling(self, kind: str, given: HfConfig) -> LinearScaling | Llama3Scaling | YarnScaling | None:
        if kind == "default":
            return None
        if kind == "llama3" and (missing := [key for key in _REQUIRED_OF_LLAMA3 if key not in given]):
            raise ConfigError(f"rope type 'llama3' needs {missing[0]}", where="config.json")
        if "factor" not in given:
            raise ConfigError(f"rope type {kind!r} needs factor", where="config.json")
        factor = given.number("factor", 1.0)
        if kind == "linear":
            return LinearScaling(factor)
        length = given.integer(
            "original_max_position_embeddings", default=self.integer("max_position_embeddings", default=2048)
        )
        if kind == "llama3":
            low, high = given.number("low_freq_factor", 1.0), given.number("high_freq_factor", 4.0)
            return Llama3Scaling(factor, low, high, length)
        truncate = given.flag("truncate", True)
        numbers = {key: given.number(key, 0.0) for key in _OPTIONS_OF_YARN if key in given and key != "truncate"}
        return YarnScaling(factor, length, truncate=truncate, **numbers)

    def layers_with_window(self, num_layers: int) -> list[int | None]:
        """Each layer's window, as `layer_types`, or `use_sliding_window` and `max_window_layers`, give them."""
        if "layer_types" in self:
            kinds = self.values["layer_types"]
            known = {"full_attention", "sliding_attention"}
            if not isinstance(kinds, list) or len(kinds) != num_layers or not known.issuperset(kinds):
                raise ConfigError(
                    f"is not a list of {num_layers} of {', '.join(sorted(known))}", where=_where("layer_types")
                )
            is_sliding = [kind == "sliding_attention" for kind in kinds]
        else:
            first = self.values.get("max_window_layers", num_layers)
            is_sliding = [self.flag("use_sliding_window") and index >= first for index in range(num_layers)]
        return [self.integer("sliding_window") if slides else None for slides in is_sliding]


def rope_entries(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for a `config.json`. The fraction of a head that is rotated is the family's."""
    scaling = rope.scaling
    entries: dict[str, Any] | None = None
    if scaling is not None:
        kind = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}[type(scaling)]
        entries = {"rope_type": kind}
        for key, value in asdict(scaling).items():
            if value is not None:
                entries["original_max_position_embeddings" if key == "original_max_seq_len" else key] = value
    return {"rope_theta": rope.theta, "rope_scaling": entries}


def window_entries(spec: DecoderSpec) -> dict[str, Any]:
    """What `HfConfig.layers_with_window` reads, of a model with grouped-query attention."""
    windows = [layer.attention.window for layer in spec.layers if isinstance(layer.attention, GroupedQuery)]
    window = next(filter(None, windows), None)
    if window is None:
        return {"use_sliding_window": False}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}


def _where(key: str) -> str:
    return f"config.json: {key}"
