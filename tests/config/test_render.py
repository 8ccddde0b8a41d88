"""The config as text: TOML that reads back to the same config, explanations, help."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import pytest
import tomli

from titanmoe.config import JobConfig, help_text, load_config, resolve, to_explained_toml, to_toml
from titanmoe.config.schema import Schema
from titanmoe.config.values import split_optional

SCHEMA = Schema.of_job_config()


def other_value(key, default):
    """A value that is allowed, supported and not the default; the default where there is none."""
    kind, optional = split_optional(key.kind)
    if key.limits.later:
        return default
    if optional and default is not None:
        return None
    if typing.get_origin(kind) is Literal:
        return next((choice for choice in typing.get_args(kind) if choice != default), default)
    if typing.get_origin(kind) is tuple:
        entry = typing.get_args(kind)[0]
        if typing.get_origin(entry) is tuple:
            return (("a", "b"), ())
        return typing.get_args(entry)[-1:] if typing.get_origin(entry) is Literal else ("a,b", 'c"d', "")
    if typing.get_origin(kind) is typing.Union:
        return 3 if isinstance(default, str) else default
    if kind is bool:
        return not default
    if kind is str:
        return 'quote " backslash \\ newline \n tab \t del \x7f \u20ac \U0001f600 # none'
    for value in (default, 3, 0.3, 7e-12, 1.5e300):
        candidate = kind(value or 0)
        if value != default and key.limits.accept(candidate) and candidate != default:
            return candidate
    raise AssertionError(key.path)


def with_other_values(cls=JobConfig, prefix=""):
    built = {}
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        if path in SCHEMA.sections:
            built[field.name] = with_other_values(SCHEMA.sections[path], path + ".")
        else:
            key = SCHEMA.keys[path]
            built[field.name] = other_value(key, key.default)
    return cls(**built)


def read_back(text: str, tmp_path) -> JobConfig:
    (tmp_path / "resolved.toml").write_text(text, encoding="utf-8")
    return load_config(str(tmp_path / "resolved.toml"))


def test_the_defaults_read_back(tmp_path):
    text = to_toml(JobConfig())
    assert read_back(text, tmp_path) == JobConfig()
    assert to_toml(read_back(text, tmp_path)) == text


@pytest.mark.parametrize("epochs", [None, 2.5])
def test_every_key_reads_back_with_another_value(tmp_path, epochs):
    config = with_other_values()
    steps = 3 if epochs is None else JobConfig().training.steps
    data = {"dataset": "text"}
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, epochs=epochs, steps=steps, **data),
        validation=dataclasses.replace(config.validation, **data),
    )
    text = to_toml(config)
    assert read_back(text, tmp_path) == config
    assert to_toml(read_back(text, tmp_path)) == text
    changed = [key for key in SCHEMA.keys.values() if not key.limits.later]
    assert len(changed) > 100


def test_infinity_reads_back(tmp_path):
    config = load_config(None, ["--training.max_norm=inf"])
    assert "max_norm = inf" in to_toml(config)
    assert read_back(to_toml(config), tmp_path) == config


def test_the_text_has_every_key_but_the_file_it_was_read_from():
    tables = tomli.loads(to_toml(JobConfig()))

    def flat(table, prefix=""):
        for name, value in table.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    assert set(flat(tables)) == set(SCHEMA.keys) - {"job.config_file"}


def test_explanations_read_back_and_name_origins(tmp_path):
    (tmp_path / "a.toml").write_text("[training]\nseq_len = 64\n")
    resolved = resolve([f"--job.config_file={tmp_path / 'a.toml'}", "--optimizer.lr=1"])
    text = to_explained_toml(resolved)
    assert read_back(text, tmp_path) == resolved.config
    lines = text.splitlines()
    assert f"seq_len = 64  # {tmp_path / 'a.toml'}" in lines
    assert "lr = 1.0  # command line" in lines
    assert lines[lines.index("lr = 1.0  # command line") - 1] == "# Learning rate at its peak."
    assert max(map(len, (line for line in lines if line.startswith("#")))) <= 120


def test_help_names_every_key_with_its_default_and_meaning():
    text = help_text("titanmoe config", width=80)
    for key in SCHEMA.keys.values():
        assert f"  --{key.path}  " in text
    assert "--training.seq_len  a whole number, at least 2 (default: 2048)\n      Tokens per sequence.\n" in text
    assert "--debug.seed  a whole number, at least 0 and less than 9223372036854775808, or none (default: none)" in text
    assert "Not supported yet" in text and "No effect, as " in text
