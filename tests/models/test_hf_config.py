"""Reading config.json: typed values, RoPE and windows as transformers understands them, families by either name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.models.family_checks import config_class_of
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import FAMILIES, family_of_hf_config, get_family
from titanmoe.models.hf_config import HfConfig, decoder_entries, rope_entries, window_entries
from titanmoe.models.spec import (
    DecoderSpec,
    Dense,
    GroupedQuery,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
)

_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def test_values_are_read() -> None:
    config = HfConfig({"a": 3, "b": 2.5, "c": True, "d": None, "e": [0, 2], "f": 0})
    assert (config.integer("a"), config.integer("z", "a"), config.integer("d", default=4)) == (3, 3, 4)
    assert config.integer("f", least=0) == 0
    assert (config.number("a", 1.0), config.number("b", 1.0), config.number("d", 1.5)) == (3.0, 2.5, 1.5)
    assert type(config.number("a", 1.0)) is float
    assert (config.flag("c"), config.flag("d"), config.flag("z", True)) == (True, False, True)
    assert (config.integers("e"), config.integers("d")) == ([0, 2], [])
    assert (config.require("a", 3, 4, default=3), config.require("d", "x", default="x")) == (3, "x")
    assert "a" in config and "d" not in config and "z" not in config


@pytest.mark.parametrize(
    ("read", "values", "message"),
    [
        (lambda c: c.integer("k"), {}, "config.json: k: k is missing"),
        (lambda c: c.integer("k"), {"k": None}, "config.json: k: k is missing"),
        (lambda c: c.integer("k", "l"), {}, "k or l is missing"),
        (lambda c: c.integer("j", "k"), {"k": 2.0}, "config.json: k: 2.0 is not a positive whole number"),
        (lambda c: c.integer("k"), {"k": "2"}, "config.json: k: '2'"),
        (lambda c: c.integer("k"), {"k": True}, "config.json: k: True"),
        (lambda c: c.integer("k"), {"k": 0}, "config.json: k: 0 is not a positive"),
        (lambda c: c.integer("k", least=0), {"k": -1}, "config.json: k: -1 is not a whole number of at least 0"),
        (lambda c: c.number("k", 1.0), {"k": "1e-6"}, "config.json: k: '1e-6' is not a number"),
        (lambda c: c.number("k", 1.0), {"k": False}, "config.json: k: False is not a number"),
        (lambda c: c.number("k", 1.0), {"k": float("nan")}, "config.json: k: nan is not a number"),
        (lambda c: c.number("k", 1.0, positive=True), {"k": 0}, "config.json: k: 0 is not a positive number"),
        (lambda c: c.flag("k"), {"k": 1}, "config.json: k: 1 is neither"),
        (lambda c: c.flag("k"), {"k": "false"}, "config.json: k: 'false' is neither"),
        (lambda c: c.integers("k"), {"k": 3}, "config.json: k: 3 is not a list"),
        (lambda c: c.integers("k"), {"k": [1, 2.0]}, "config.json: k: .* is not a list of whole"),
        (lambda c: c.require("k", "x", default="x"), {"k": "y"}, "config.json: k: k 'y' is not supported"),
        (lambda c: c.require("k", "x", default="x"), {"k": ["y"]}, "config.json: k: k .'y'. is not supported"),
        (lambda c: c.refuse_unsupported(), {"hidden_act": "gelu"}, "config.json: hidden_act"),
        (lambda c: c.refuse_unsupported(), {"attention_dropout": 0.1}, "config.json: attention_dropout"),
        (lambda c: c.refuse_unsupported(), {"is_causal": False}, "config.json: is_causal"),
        (lambda c: c.refuse_unsupported(), {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        (lambda c: c.heads(), {}, "num_attention_heads is missing"),
        (lambda c: c.heads(), {"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads: 6 query"),
        (lambda c: c.experts("n"), {"n": 4}, "num_experts_per_tok is missing"),
        (lambda c: c.experts("n"), {"num_experts_per_tok": 4}, "n is missing"),
        (lambda c: c.experts("n"), {"n": 4, "num_experts_per_tok": 5}, "num_experts_per_tok: 5 of 4 experts"),
        (lambda c: c.decoder("x", (), default_max_seq_len=9), {"hidden_size": 4}, "vocab_size is missing"),
        (lambda c: c.decoder("x", (), default_max_seq_len=9), {**_LLAMA, "rms_norm_eps": 0}, "rms_norm_eps: 0"),
        (lambda c: c.grouped_query(), {**_LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor: 8 of"),
        (lambda c: c.grouped_query(), {**_LLAMA, "head_dim": 15}, "head_dim: 15 of a head's 15"),
    ],
)
def test_errors_name_the_key(read: Callable[[HfConfig], Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(HfConfig(values))


def test_heads_and_experts() -> None:
    assert HfConfig({"num_attention_heads": 6, "num_key_value_heads": 2}).heads() == (6, 2)
    assert HfConfig({"num_attention_heads": 6, "num_key_value_heads": None}).heads() == (6, 6)
    assert HfConfig({"n": 4, "num_experts_per_tok": 4}).experts("m", "n") == (4, 4)


_LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_ROPES = {
    "none": ({}, Rope(16, 1e4)),
    "theta": ({"rope_theta": 500000, "rope_scaling": None}, Rope(16, 5e5)),
    "empty": ({"rope_theta": 5e5, "rope_scaling": {}}, Rope(16, 5e5)),
    "default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(16, 5e5)),
    "theta of the table goes first": ({"rope_theta": 2e4, "rope_parameters": {"rope_theta": 3e4}}, Rope(16, 3e4)),
    "theta beside the table": ({"rope_theta": 2e4, "rope_parameters": {"rope_type": "default"}}, Rope(16, 2e4)),
    "the old table goes first": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        Rope(16, 1e4, LinearScaling(2.0)),
    ),
    "linear, old name": ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope(16, 1e4, LinearScaling(4.0))),
    "both names": (
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}},
        Rope(16, 1e4, LinearScaling(4.0)),
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
        Rope(16, 5e5, Llama3Scaling(8.0, 1.0, 4.0, 32)),
    ),
    "llama3, new style": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}},
        Rope(16, 5e5, Llama3Scaling(8.0, 1.0, 4.0, 32)),
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        Rope(16, 1e4, YarnScaling(4.0, 32)),
    ),
    "yarn without the original length": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        Rope(16, 1e4, YarnScaling(4.0, 128)),
    ),
    "the length beside the table goes first": (
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        Rope(16, 1e4, YarnScaling(4.0, 64)),
    ),
    "yarn, factor null": (
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
        Rope(16, 1e4, YarnScaling(4.0, 32)),
    ),
    "yarn, everything": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 40,
                "original_max_position_embeddings": 32,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 0.7,
                "mscale_all_dim": 0.9,
                "attention_factor": 1.1,
                "truncate": False,
            }
        },
        Rope(16, 1e6, YarnScaling(40.0, 32, 16.0, 2.0, False, 0.7, 0.9, 1.1)),
    ),
    "yarn, zeros and nulls": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": None,
                "beta_slow": 0,
                "mscale": 0.7,
                "mscale_all_dim": 0,
                "attention_factor": None,
            }
        },
        Rope(16, 1e4, YarnScaling(4.0, 32, mscale=0.7)),
    ),
}


@pytest.mark.parametrize("name", _ROPES)
def test_ropes_of_both_styles(name: str) -> None:
    values, rope = _ROPES[name]
    values = {**_LLAMA, **values}
    assert HfConfig(values).rope(16) == rope
    assert HfConfig({**_LLAMA, **rope_entries(rope)}).rope(16) == rope


@pytest.mark.parametrize("name", _ROPES)
def test_ropes_are_those_of_transformers(name: str) -> None:
    """Frequencies and the factor on cos and sin, of its own functions and its own reading of the config, to the bit."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values, rope = _ROPES[name]
    transformers.utils.logging.set_verbosity_error()
    results = []
    for entries in (values, rope_entries(rope)):
        config = config_class_of({"model_type": "llama", **_LLAMA, **entries})
        kind = config.rope_parameters["rope_type"]
        default = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
        frequencies, factor = ROPE_INIT_FUNCTIONS.get(kind, default)(config)
        results.append((kind, frequencies.tolist(), factor))
        standardised = json.loads(json.dumps(config.rope_parameters))
        assert HfConfig({**_LLAMA, "rope_parameters": standardised}).rope(16) == rope
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling: 'yarn' is not a table"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters: rope type .'yarn'."),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "option 'mrope_section' of rope type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "option 'beta_fast' of rope type 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "option 'full_attention'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: rope type 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: '2' is not a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor: 0 is not a positive"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": "x"}}, "rope_scaling.beta_fast: 'x'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, "rope_scaling.truncate: 1 is neither"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0}},
            "attention_factor: 0 is not a positive",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 3.5}},
            "rope_scaling.original_max_position_embeddings: 3.5",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": None},
            "needs original_max_position_embeddings",
        ),
        ({"rope_theta": "1e6"}, "config.json: rope_theta: '1e6'"),
        ({"rope_theta": -1.0}, "config.json: rope_theta: -1.0 is not a positive"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta: '1e6'"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor: 5 of"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor: 32 of"),
        ({"rope_parameters": {"partial_rotary_factor": 0.0}}, "partial_rotary_factor: 0 of"),
    ],
)
def test_ropes_that_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HfConfig({**_LLAMA, "head_dim": 18, **values}).rope(18 if "0.3" in str(values) else 16)


def test_a_part_of_a_head_can_rotate() -> None:
    assert HfConfig({}).rope(16, fraction=0.5).dim == 8
    assert HfConfig({"partial_rotary_factor": 0.25}).rope(16, fraction=0.5).dim == 4
    assert HfConfig({"rope_parameters": {"partial_rotary_factor": 0.25}}).rope(16).dim == 4


_WINDOWS: list[dict[str, Any]] = [
    {},
    {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    {"use_sliding_window": True, "sliding_window": 7},
    {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    {"use_sliding_window": False, "sliding_window": 7, "layer_types": ["full_attention"] * 3},
]


@pytest.mark.parametrize("values", _WINDOWS)
@pytest.mark.parametrize("num_layers", [3, 30])
def test_windows_are_those_of_transformers(values: dict[str, Any], num_layers: int) -> None:
    if "layer_types" in values:
        values = {**values, "layer_types": values["layer_types"] * (num_layers // 3)}
    config = config_class_of({"model_type": "qwen2", **_LLAMA, "num_hidden_layers": num_layers, **values})
    expected = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    windows = HfConfig(values).layers_with_window(num_layers)
    assert windows == expected
    layers = tuple(LayerSpec(GroupedQuery(4, 2, 16, None, window=window), Dense(56)) for window in windows)
    entries = window_entries(DecoderSpec(48, 97, layers))
    assert HfConfig(entries).layers_with_window(num_layers) == windows


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types: is not a list of 3"),
        ({"layer_types": "full_attention"}, "layer_types: is not a list of 3"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types: is not"),
        ({"layer_types": ["full_attention", ["x"], "full_attention"]}, "layer_types: is not"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is missing"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "use_sliding_window: layer_types"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_window is missing"),
        ({"use_sliding_window": True, "max_window_layers": "1", "sliding_window": 7}, "max_window_layers: '1'"),
        ({"use_sliding_window": 1}, "use_sliding_window: 1"),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 0}, "sliding_window: 0"),
    ],
)
def test_windows_that_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HfConfig(values).layers_with_window(3)


def test_decoder_entries_are_read_back() -> None:
    attention = GroupedQuery(4, 2, 16, Rope(16, 2e4, LinearScaling(2.0)))
    spec = DecoderSpec(48, 97, (LayerSpec(attention, Dense(56)),) * 3, 1e-4, True, 123, "x")
    entries = decoder_entries(spec, "XForCausalLM", "x", "bfloat16")
    config = HfConfig(json.loads(json.dumps(entries)))
    layers = [LayerSpec(config.grouped_query(), Dense(56))] * config.integer("num_hidden_layers")
    assert config.decoder("x", layers, default_max_seq_len=9) == spec
    assert (entries["architectures"], entries["model_type"]) == (["XForCausalLM"], "x")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_without_architectures_goes_by_its_model_type(name: str) -> None:
    family = get_family(name)
    for flavor, spec in family.flavors.items():
        config = family.to_hf_config(spec, "bfloat16")
        assert config["model_type"] in family.model_types, flavor
        for architectures in (None, []):
            nameless = {**config, "architectures": architectures}
            assert family_of_hf_config(nameless) is family
            assert family.from_hf_config(nameless) == spec
        del nameless["architectures"]
        assert family_of_hf_config(nameless) is family
        assert family.from_hf_config(nameless) == spec


@pytest.mark.parametrize(
    ("config", "message", "supported"),
    [
        ({"model_type": "gpt2"}, "model_type: model type gpt2 is not", "qwen3_moe"),
        ({}, "model_type: model type .none named. is not", "qwen3_moe"),
        ({"architectures": ["A", "B"], "model_type": "qwen3"}, "architectures: architecture A, B is not", "Qwen3Moe"),
        ({"architectures": "GPT2LMHeadModel"}, "architecture GPT2LMHeadModel is not", "LlamaForCausalLM"),
        ({"architectures": 3}, "architecture 3 is not", "LlamaForCausalLM"),
        ({"model_type": ["qwen3"], "architectures": None}, "model_type", "qwen3_moe"),
    ],
)
def test_architectures_that_are_not_supported(config: dict[str, Any], message: str, supported: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        family_of_hf_config(config)
    assert supported in caught.value.mend
