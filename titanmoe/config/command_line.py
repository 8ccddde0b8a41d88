"""Command-line options `--section.key=value`, `--section.key value`, `--section.flag`, `--section.no_flag`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.config.schema import Key, Schema
from titanmoe.config.values import parse_text

COMMAND_LINE = "command line"
_TRUTH = ("true", "false")


@dataclass(frozen=True)
class Option:
    """One option: the key it sets, its value as TOML would have given it, and how it was written."""

    key: Key
    value: Any
    written: str


def wants_help(args: Sequence[str]) -> bool:
    """Whether `--help` or `-h` is among the arguments."""
    return "--help" in args or "-h" in args


def parse_command_line(args: Sequence[str], schema: Schema) -> tuple[list[Option], list[ConfigError]]:
    """The options in the order given, and what is wrong with the arguments that are none."""
    options: list[Option] = []
    errors: list[ConfigError] = []
    rest = list(args)
    while rest:
        try:
            options.append(_take_option(rest, schema))
        except ConfigError as error:
            errors.append(error)
    return options, errors


def _take_option(rest: list[str], schema: Schema) -> Option:
    """Takes one option, with its value, off the front of the list; at least one argument, also when it raises."""
    argument = rest.pop(0)
    if not argument.isascii() and any("\ud800" <= char <= "\udfff" for char in argument):
        raise ConfigError(f"{argument!r} is not valid UTF-8", where=COMMAND_LINE)
    if not argument.startswith("--"):
        mend = "Options are written --section.key=value or --section.key value."
        if argument.endswith(".toml"):
            mend = f"Did you mean --job.config_file={argument}?"
        elif argument.partition("=")[0] in schema.keys:
            mend = f"Did you mean --{argument}?"
        raise ConfigError(f'"{argument}" is not an option', where=COMMAND_LINE, mend=mend)
    written, has_value, text = argument.partition("=")
    path = written[2:].replace("-", "_")
    where = f"{COMMAND_LINE}, {written}"
    key, negated = _find_key(path, schema)
    if key is None:
        if not has_value:
            _take_value(rest)
        if path in schema.sections:
            mend = f"Its keys are {', '.join(k.name for k in schema.keys_of(path))}."
            raise ConfigError("this is a section, not a key", where=where, mend=mend)
        raise ConfigError("unknown key", where=where, mend=schema.suggest_key(path))
    if negated:
        if has_value:
            raise ConfigError("takes no value", where=where, mend=f"Write --{key.path}=true or --{key.path}=false.")
        return Option(key, False, written)
    if key.kind is bool and not has_value:
        follows = rest[0].lower() if rest else ""
        return Option(key, rest.pop(0).lower() == "true" if follows in _TRUTH else True, written)
    if not has_value:
        value = _take_value(rest)
        if value is None:
            raise ConfigError("has no value", where=where, mend=f"Write {written}=VALUE.")
        text = value
    return Option(key, parse_text(text, key, where), written)


def _take_value(rest: list[str]) -> str | None:
    """The next argument if it can be a value: anything but another option."""
    return rest.pop(0) if rest and not rest[0].startswith("--") else None


def _find_key(path: str, schema: Schema) -> tuple[Key | None, bool]:
    """The key of an option and whether it is written as `no_key`."""
    if path in schema.keys:
        return schema.keys[path], False
    section, _, name = path.rpartition(".")
    key = schema.keys.get(f"{section}.{name.removeprefix('no_')}")
    if key is not None and key.kind is bool and name.startswith("no_"):
        return key, True
    return None, False
