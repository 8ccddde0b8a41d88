"""The keys: torchtitan's names and defaults, a help text for each, and the nearest name for a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli

from titanmoe.config.docs import class_doc, field_docs
from titanmoe.config.keys import Limits
from titanmoe.config.schema import Schema

SCHEMA = Schema.of_job_config()
TORCHTITAN = tomli.loads((Path(__file__).parent / "torchtitan_defaults.toml").read_text())

OUR_KEYS = {
    "training.epochs",
    "data.text_key",
    "data.shuffle",
    "data.document_mask",
    "data.append_eos",
    "data.messages_key",
    "data.chat_template",
    "data.loss_on",
    "checkpoint.initial_adapter_path",
    "moe.aux_loss_coeff",
    "moe.bias_update_rate",
    "moe.grouped_mm_backend",
    *(f"lora.{key}" for key in ("rank", "alpha", "dropout", "use_rslora", "use_dora", "target_modules")),
    *(f"lora.{key}" for key in ("expert_rank", "init", "dtype")),
    "quantize.strict",
    "quantize.linear.float8.backend",
    "quantize.linear.mx.backend",
    "quantize.linear.mx.emulate",
    "quantize.grouped_mm.float8.recipe_name",
    "quantize.grouped_mm.float8.backend",
    "quantize.grouped_mm.float8.emulate",
    "quantize.grouped_mm.mx.backend",
    "quantize.grouped_mm.mx.emulate",
    *(f"quantize.frozen.{name}.{key}" for name in ("float8", "mx", "nf4") for key in ("fqns", "filter_fqns")),
    "quantize.frozen.float8.recipe_name",
    "quantize.frozen.float8.backend",
    "quantize.frozen.nf4.block_size",
    "quantize.frozen.nf4.double_quant",
}
OUR_DEFAULTS = {
    "model.name": "qwen3",
    "model.flavor": "debug_moe",
    "model.hf_assets_path": None,
    "training.dataset": "stdlib",
    "validation.dataset": "stdlib",
    "checkpoint.last_save_model_only": False,
    "quantize.grouped_mm.float8.fqns": ("experts",),
    "quantize.grouped_mm.mx.fqns": ("experts",),
}


def flat(table: dict, prefix: str = "") -> dict:
    result = {}
    for name, value in table.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def test_the_keys_are_torchtitans_and_ours():
    assert set(SCHEMA.keys) == set(flat(TORCHTITAN)) | OUR_KEYS


def test_the_defaults_are_torchtitans_except_where_we_say_so():
    differing = {}
    for path, value in flat(TORCHTITAN).items():
        value = None if value == "none" else tuple(value) if isinstance(value, list) else value
        key = SCHEMA.keys[path]
        if (key.default, type(key.default)) != (value, type(value)):
            differing[path] = key.default
    assert differing == OUR_DEFAULTS


def test_every_key_and_section_has_a_help_text():
    for section, cls in SCHEMA.sections.items():
        assert class_doc(cls), section
        docs = field_docs(cls)
        for key in SCHEMA.keys_of(section):
            assert docs.get(key.name, "").endswith("."), f"{key.path} has no sentence under its field"


def test_defaults_lie_in_their_own_range():
    for key in SCHEMA.keys.values():
        if isinstance(key.default, int | float) and not isinstance(key.default, bool):
            assert key.limits.accept(key.default), key.path


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Limits(at_least=1), [1, 2], [0, -1]),
        (Limits(at_least=1, also=(-1,)), [1, -1], [0, -2]),
        (Limits(more_than=0, at_most=1), [0.1, 1], [0, 1.1]),
        (Limits(at_least=0, less_than=1), [0, 0.99], [1]),
        (Limits(), [0.0, -5], [float("nan"), float("inf")]),
        (Limits(more_than=0, also=(float("inf"),)), [float("inf")], [float("-inf"), float("nan")]),
    ],
)
def test_ranges(limits, inside, outside):
    assert all(limits.accept(value) for value in inside)
    assert not any(limits.accept(value) for value in outside)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("training.sequence_len", "training.seq_len?"),
        ("training.lr", "optimizer.lr?"),
        ("training.batch_size", "training.local_batch_size?"),
        ("training.seed", "debug.seed?"),
        ("model.document_mask", "data.document_mask?"),
        ("trainig.steps", "training.steps"),
        ("seq_len", "training.seq_len"),
        ("checkpoint.enable_checkpoint", "enable"),
        ("compile.zzzzzz", "Keys of [compile] are enable, components, backend."),
        ("zzzzzz.qqqqqq", "Sections are job, model"),
    ],
)
def test_the_nearest_key(wrong, right):
    assert right in SCHEMA.suggest_key(wrong)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("traning", "[training]"), ("float8", "[quantize.linear.float8]"), ("qqqqqqq", "Sections are job, model")],
)
def test_the_nearest_section(wrong, right):
    assert right in SCHEMA.suggest_section(wrong)
