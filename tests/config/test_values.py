"""Values: from TOML and from text to the type of a key."""

from __future__ import annotations

import math

import pytest

from titanmoe.config import ConfigError
from titanmoe.config.schema import Schema
from titanmoe.config.values import convert, parse_text, to_toml_value

KEYS = Schema.of_job_config().keys


def from_text(path: str, text: str):
    return convert(parse_text(text, KEYS[path], "here"), KEYS[path], "here")


@pytest.mark.parametrize(
    ("path", "given", "wanted"),
    [
        ("optimizer.lr", 1, 1.0),
        ("optimizer.lr", 1e-4, 1e-4),
        ("training.steps", 7, 7),
        ("training.epochs", 2, 2.0),
        ("training.epochs", "none", None),
        ("training.max_norm", math.inf, math.inf),
        ("compile.enable", True, True),
        ("compile.components", ["loss"], ("loss",)),
        ("compile.components", [], ()),
        ("debug.seed", "none", None),
        ("debug.seed", 0, 0),
        ("lora.expert_rank", 4, 4),
        ("lora.expert_rank", "scaled", "scaled"),
        ("parallelism.context_parallel_load_balancer", "none", None),
        ("parallelism.context_parallel_load_balancer", "ptrr", "ptrr"),
        ("parallelism.module_fqns_per_model_part", [["a"], ["b", "c"]], (("a",), ("b", "c"))),
    ],
)
def test_toml_values_that_fit(path, given, wanted):
    value = convert(given, KEYS[path], "here")
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("training.steps", 1.5, "1.5 was given, but it must be a whole number"),
        ("training.steps", True, "true was given, but it must be a whole number"),
        ("training.steps", "7", 'the text "7" was given, but it must be a whole number'),
        ("training.steps", 0, "0 was given, but it must be a whole number of at least 1"),
        ("training.global_batch_size", -2, "at least 1, or -1"),
        ("training.seq_len", 1, "at least 2"),
        ("training.epochs", 0, "a number of more than 0, or none"),
        ("training.max_norm", math.nan, "nan was given"),
        ("optimizer.lr", math.inf, "inf was given"),
        ("optimizer.lr", 10**400, "must be a number"),
        ("optimizer.lr", False, "false was given, but it must be a number"),
        ("optimizer.beta1", 1.0, "at least 0 and less than 1"),
        ("lr_scheduler.decay_ratio", 1.5, "more than 0 and at most 1"),
        ("moe.bias_update_rate", -0.1, "at least 0"),
        ("debug.seed", -1, "at least 0"),
        ("compile.enable", 1, "1 was given, but it must be true or false"),
        ("compile.enable", "true", 'the text "true" was given, but it must be true or false'),
        ("job.description", 3, "3 was given, but it must be a text"),
        ("compile.components", "model", "a list, each entry one of"),
        ("compile.components", ["modle"], 'Did you mean "model"?'),
        ("training.dtype", "bf16", 'one of "bfloat16", "float32"'),
        ("optimizer.name", "adamw", 'Did you mean "AdamW"?'),
        ("training.steps", {"a": 1}, "a section was given"),
        ("training.steps", [3], "the list [3] was given"),
        ("training.gc_debug", True, "reporting garbage collection in detail is not supported yet"),
        ("parallelism.expert_parallel_comm_backend", "deepep", "DeepEP is not supported yet"),
        ("model.converters", "float8", "a list, each entry a text"),
        ("quantize.linear.float8.recipe_name", "row", 'Did you mean "rowwise"?'),
        ("fault_tolerance.enable", True, "not supported yet"),
        ("lora.expert_rank", "many", 'but it must be "scaled" or a whole number'),
        ("lora.expert_rank", 0, "at least 1"),
        ("lora.expert_rank", 1.5, "a whole number"),
    ],
)
def test_toml_values_that_do_not_fit(path, given, message):
    with pytest.raises(ConfigError) as error:
        convert(given, KEYS[path], f"x.toml, {path}")
    assert str(error.value).startswith(f"x.toml, {path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "1", 1.0),
        ("training.max_norm", "inf", math.inf),
        ("training.steps", "1_000", 1000),
        ("training.global_batch_size", "-1", -1),
        ("compile.enable", "False", False),
        ("compile.components", "model,loss", ("model", "loss")),
        ("compile.components", " loss ", ("loss",)),
        ("compile.components", "", ()),
        ("compile.components", '["loss"]', ("loss",)),
        ("parallelism.module_fqns_per_model_part", '[["a"], ["b"]]', (("a",), ("b",))),
        ("debug.seed", "None", None),
        ("model.hf_assets_path", "none", None),
        ("job.description", "none", "none"),
        ("job.description", "a=b, c", "a=b, c"),
        ("activation_checkpoint.selective_ac_option", "2", "2"),
        ("lora.expert_rank", "4", 4),
        ("lora.expert_rank", "scaled", "scaled"),
    ],
)
def test_texts_that_fit(path, text, wanted):
    value = from_text(path, text)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("training.steps", "1e3", "1000.0 was given, but it must be a whole number"),
        ("training.steps", "ten", 'the text "ten" was given'),
        ("training.steps", "none", 'the text "none" was given'),
        ("optimizer.lr", "fast", "must be a number"),
        ("optimizer.lr", "nan", "must be a number"),
        ("compile.enable", "yes", "must be true or false"),
        ("compile.components", "model,,loss", "empty entry"),
        ("compile.components", '["model"', "not a list in TOML"),
        ("compile.components", "[1]", "the list [1] was given"),
    ],
)
def test_texts_that_do_not_fit(path, text, message):
    with pytest.raises(ConfigError, match="here: ") as error:
        from_text(path, text)
    assert message in str(error.value)


def test_every_unsupported_key_is_refused_and_takes_its_default():
    later = [key for key in KEYS.values() if key.limits.later]
    assert len(later) > 5
    other = {bool: lambda d: not d, int: lambda d: d + 1, str: lambda d: d + "x", tuple: lambda d: ["x"]}
    for key in later:
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        assert convert(default, key, "here") == key.default
        one_of = {"comm.mode": "fake_backend", "parallelism.expert_parallel_comm_backend": "deepep"}
        changed = one_of.get(key.path) or other[type(key.default)](default)
        with pytest.raises(ConfigError, match="not supported yet"):
            convert(changed, key, "here")


def test_toml_texts_are_escaped():
    assert to_toml_value('a"b\\c\n\x7f\u20ac') == '"a\\"b\\\\c\\n\\u007f\u20ac"'
