"""Reading and writing `config.json`: typed values, what most families share, and errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.spec import (
    DecoderSpec,
    GroupedQuery,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
)

_REQUIRED_OF_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_OPTIONS_OF_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
_OPTIONS_OF_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": (*_REQUIRED_OF_LLAMA3, "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "truncate", *_OPTIONS_OF_YARN),
}
_OF_ALL_ROPES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_DEFAULT_MAX_WINDOW_LAYERS = 28
"""Of transformers' Qwen2Config and Qwen3Config."""


class HfConfig:
    """The values of a parsed `config.json`, or of a table in it. An absent key and `null` are the same.

    Every method raises ConfigError, naming the key, for a value that is missing or of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], *, table: str = "") -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.table = table
        """The key whose value this is; "" for the whole file."""

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def where(self, key: str) -> str:
        """A key's place, for messages."""
        return f"config.json: {self.table}.{key}" if self.table else f"config.json: {key}"

    def integer(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`, under the first of the keys that is there."""
        for key in keys:
            if (value := self.values.get(key)) is not None:
                if type(value) is not int or value < least:
                    kind = "positive whole number" if least == 1 else f"whole number of at least {least}"
                    raise ConfigError(f"{value!r} is not a {kind}", where=self.where(key))
                return value
        if default is None:
            raise ConfigError(f"{' or '.join(keys)} is missing", where=self.where(keys[0]))
        return default

    def number(self, key: str, default: float, *, positive: bool = False) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{value!r} is not a number", where=self.where(key))
        if positive and value <= 0:
            raise ConfigError(f"{value!r} is not a positive number", where=self.where(key))
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{value!r} is neither true nor false", where=self.where(key))
        return value

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; empty if the key is absent."""
        values = self.values.get(key, [])
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise ConfigError(f"{values!r} is not a list of whole numbers", where=self.where(key))
        return values

    def require(self, key: str, *supported: Any, default: Any) -> Any:
        """The value, if it is one of those supported; `default` (which should be one) if the key is absent."""
        value = self.values.get(key, default)
        if value not in supported:
            raise ConfigError(
                f"{key} {value!r} is not supported",
                where=self.where(key),
                mend=f"supported: {', '.join(map(repr, supported))}",
            )
        return value

    def refuse_unsupported(self) -> None:
        """Refuse what no family here computes, whichever reads it.

        Another activation than SwiGLU's, dropout, attention to later tokens, and layers with options of their own.
        """
        self.require("hidden_act", "silu", "swish", default="silu")
        self.require("attention_dropout", 0, default=0)
        self.require("is_causal", True, default=True)
        self.require("per_layer_config", {}, [], default={})

    def heads(self) -> tuple[int, int]:
        """Query heads, and key-value heads, which divide them."""
        num_heads = self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{num_heads} query heads cannot be dealt to {num_kv_heads} key-value heads",
                where=self.where("num_key_value_heads"),
            )
        return num_heads, num_kv_heads

    def experts(self, *keys: str) -> tuple[int, int]:
        """How many experts there are (under one of `keys`), and how many a token chooses."""
        num_experts, top_k = self.integer(*keys), self.integer("num_experts_per_tok")
        if top_k > num_experts:
            raise ConfigError(
                f"{top_k} of {num_experts} experts cannot be chosen", where=self.where("num_experts_per_tok")
            )
        return num_experts, top_k

    def rope(self, head_dim: int, *, default_theta: float = 1e4, fraction: float = 1.0, **options: Any) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Args:
            head_dim: channels of a head, of which `partial_rotary_factor` are rotated.
            fraction: `partial_rotary_factor` where the config has none.
            options: further fields of the Rope.
        """
        key = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        table = self.values.get(key, {})
        if not isinstance(table, Mapping):
            raise ConfigError(f"{table!r} is not a table of options", where=self.where(key))
        given = HfConfig(table, table=f"{self.table}.{key}" if self.table else key)
        kind = given.values.get("rope_type") or given.values.get("type") or "default"
        if kind not in tuple(_OPTIONS_OF_ROPE):
            raise ConfigError(
                f"rope type {kind!r} is not supported",
                where=self.where(key),
                mend=f"supported: {', '.join(_OPTIONS_OF_ROPE)}",
            )
        if unknown := sorted(given.values.keys() - {*_OPTIONS_OF_ROPE[kind], *_OF_ALL_ROPES}):
            raise ConfigError(f"option {unknown[0]!r} of rope type {kind!r} is not supported", where=self.where(key))
        theta = given.number("rope_theta", self.number("rope_theta", default_theta, positive=True), positive=True)
        fraction = given.number("partial_rotary_factor", self.number("partial_rotary_factor", fraction))
        dim = int(head_dim * fraction)
        if dim % 2 or not 0 < dim <= head_dim:
            where = self.where("partial_rotary_factor" if fraction != 1 else "head_dim")
            raise ConfigError(f"{dim} of a head's {head_dim} channels cannot be rotated", where=where)
        return Rope(dim, theta, self._scaling(kind, given), **options)

    def _scaling(self, kind: str, given: HfConfig) -> LinearScaling | Llama3Scaling | YarnScaling | None:
        if kind == "default":
            return None
        # YaRN alone has a meaning without a factor: that of the two lengths.
        required = {"linear": ("factor",), "llama3": _REQUIRED_OF_LLAMA3, "yarn": ()}[kind]
        if missing := [key for key in required if key not in given]:
            raise ConfigError(f"rope type {kind!r} needs {missing[0]}", where=given.where(missing[0]))
        factor = given.number("factor", 1.0, positive=True)
        if kind == "linear":
            return LinearScaling(factor)
        # A key beside the table goes before the same key in it, as in transformers.
        original = "original_max_position_embeddings"
        sources = ((self, original), (given, original), (self, "max_position_embeddings"))
        length = next((config.integer(key) for config, key in sources if key in config), None)
        if length is None:
            raise ConfigError(f"rope type {kind!r} needs {original}", where=given.where(original))
        if kind == "llama3":
            low, high = given.number("low_freq_factor", 1.0), given.number("high_freq_factor", 4.0)
            return Llama3Scaling(factor, low, high, length)
        if "factor" not in given:
            factor = self.integer("max_position_embeddings") / length
        given.number("attention_factor", 1.0, positive=True)
        # The other numbers mean nothing when zero.
        numbers = {key: value for key in _OPTIONS_OF_YARN if (value := given.number(key, 0.0))}
        return YarnScaling(factor, length, truncate=given.flag("truncate", True), **numbers)

    def grouped_query(self, *, head_dim: int | None = None, default_theta: float = 1e4, **options: Any) -> GroupedQuery:
        """Attention that rotates whole heads; windows are `layers_with_window`'s.

        Args:
            head_dim: `head_dim` where the config has none; None: what `hidden_size` leaves to each head.
            default_theta: `rope_theta` where the config has none.
            options: further fields of the GroupedQuery.
        """
        num_heads, num_kv_heads = self.heads()
        head_dim = self.integer("head_dim", default=head_dim or max(1, self.integer("hidden_size") // num_heads))
        rope = self.rope(head_dim, default_theta=default_theta)
        if rope.dim != head_dim:
            raise ConfigError(
                f"{rope.dim} of a head's {head_dim} channels rotated is not supported for this family",
                where=self.where("partial_rotary_factor"),
            )
        return GroupedQuery(num_heads, num_kv_heads, head_dim, rope, **options)

    def layers_with_window(self, num_layers: int) -> list[int | None]:
        """Each layer's window, as `layer_types`, or `use_sliding_window` and `max_window_layers`, give them."""
        if "layer_types" in self:
            kinds = self.values["layer_types"]
            known = ("full_attention", "sliding_attention")
            if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
                raise ConfigError(
                    f"is not a list of {num_layers} of {', '.join(known)}", where=self.where("layer_types")
                )
            is_sliding = [kind == "sliding_attention" for kind in kinds]
            if any(is_sliding) and not self.flag("use_sliding_window", True):
                raise ConfigError(
                    "layer_types has layers with a window, but use_sliding_window is false",
                    where=self.where("use_sliding_window"),
                )
        elif self.flag("use_sliding_window"):
            first = self.integer("max_window_layers", default=_DEFAULT_MAX_WINDOW_LAYERS, least=0)
            is_sliding = [index >= first for index in range(num_layers)]
        else:
            is_sliding = [False] * num_layers
        return [self.integer("sliding_window") if slides else None for slides in is_sliding]

    def decoder(
        self, family: str, layers: Iterable[LayerSpec], *, default_max_seq_len: int, default_eps: float = 1e-6
    ) -> DecoderSpec:
        """The model around the layers. The defaults stand in for `max_position_embeddings` and `rms_norm_eps`."""
        return DecoderSpec(
            dim=self.integer("hidden_size"),
            vocab_size=self.integer("vocab_size"),
            layers=tuple(layers),
            norm_eps=self.number("rms_norm_eps", default_eps, positive=True),
            tie_embeddings=self.flag("tie_word_embeddings"),
            max_seq_len=self.integer("max_position_embeddings", default=default_max_seq_len),
            family=family,
        )


def decoder_entries(spec: DecoderSpec, architecture: str, model_type: str, dtype_name: str) -> dict[str, Any]:
    """What `HfConfig.decoder` and `grouped_query` read, of a model whose layers differ in masks and RoPE at most."""
    attention = spec.layers[0].attention
    num_kv_heads = attention.num_kv_heads if isinstance(attention, GroupedQuery) else attention.num_heads
    rope = next((layer.attention.rope for layer in spec.layers if layer.attention.rope is not None), None)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        **({"head_dim": attention.head_dim} if isinstance(attention, GroupedQuery) else {}),
        "hidden_act": "silu",
        "hidden_size": spec.dim,
        "initializer_range": 0.02,
        "max_position_embeddings": spec.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": spec.norm_eps,
        **(rope_entries(rope) if rope else {}),
        "tie_word_embeddings": spec.tie_embeddings,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


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
