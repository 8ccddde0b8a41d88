"""One value: from TOML or from command-line text to the type of its key, and back to TOML."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import types
import typing
from typing import Any, Literal

import tomli

from titanmoe.config.errors import ConfigError
from titanmoe.config.schema import Key


class _Mismatch(Exception):
    """A value does not have the type of its key."""


def convert(value: Any, key: Key, where: str) -> Any:
    """The value, as read from TOML, in the type of its key: lists become tuples, whole numbers floats, "none" None.

    Raises:
        ConfigError: wrong type, not one of the allowed values, out of range, or not supported yet.
    """
    try:
        result = _convert(value, key.kind)
    except _Mismatch:
        raise ConfigError(
            f"{describe_value(value)} was given, but it must be {describe_kind(key.kind)}",
            where=where,
            mend=_nearest_choice(value, key.kind),
        ) from None
    numbers = [n for n in (result if isinstance(result, tuple) else (result,)) if _is_number(n)]
    if not all(key.limits.accept(number) for number in numbers):
        raise ConfigError(f"{to_toml_value(result)} was given, but it must be {_describe_range(key)}", where=where)
    if key.limits.later and result != key.default:
        raise _not_supported(key.limits.later, result, key, where)
    return result


def parse_text(text: str, key: Key, where: str) -> Any:
    """The value in command-line text, as TOML would have given it; `convert` then checks it.

    Lists are separated by commas, and the empty text is the empty list; a text that begins with `[` is read as TOML.

    Raises:
        ConfigError: a list with an empty entry, or broken TOML in brackets.
    """
    kind, optional = split_optional(key.kind)
    if optional and _is_none(text):
        return "none"
    if typing.get_origin(kind) is tuple:
        return _parse_list(text, where)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if {int, float} & {kind, *_alternatives(kind)}:
        return _parse_number(text)
    return text


def to_toml_value(value: Any) -> str:
    """A value of a config as TOML; None, which TOML does not have, as "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON strings are TOML strings, except that TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    assert isinstance(value, tuple | list), value
    return "[" + ", ".join(to_toml_value(entry) for entry in value) + "]"


def split_optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); X -> (X, False). X may have alternatives."""
    inner = tuple(arg for arg in _alternatives(kind) if arg is not type(None))
    return (typing.Union[inner], True) if len(inner) < len(_alternatives(kind)) else (kind, False)  # noqa: UP007


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Of a union; () of anything else."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()


def describe_kind(kind: Any) -> str:
    """The type of a key in words."""
    kind, optional = split_optional(kind)
    if _alternatives(kind):
        text = " or ".join(describe_kind(alternative).removeprefix("one of ") for alternative in _alternatives(kind))
    elif typing.get_origin(kind) is Literal:
        text = "one of " + ", ".join(to_toml_value(choice) for choice in typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        entry = typing.get_args(kind)[0]
        text = f"a list, each entry {describe_kind(entry)}"
    else:
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    return f"{text}, or none" if optional else text


def describe_value(value: Any) -> str:
    """What a user wrote, with its type where that may be the mistake."""
    if isinstance(value, str):
        return f"the text {to_toml_value(value)}"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "the list [" + ", ".join(describe_value(entry).removeprefix("the text ") for entry in value) + "]"
    if isinstance(value, bool | int | float):
        return to_toml_value(value)
    return f"the {type(value).__name__} {value}"


def _convert(value: Any, kind: Any) -> Any:
    kind, optional = split_optional(kind)
    if optional and _is_none(value):
        return None
    for alternative in _alternatives(kind):
        with contextlib.suppress(_Mismatch):
            return _convert(value, alternative)
    origin = typing.get_origin(kind)
    if origin is Literal:
        matches = isinstance(value, str) and value in typing.get_args(kind)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(entry, typing.get_args(kind)[0]) for entry in value)
        matches = False
    elif kind is float and _is_number(value):
        return _to_float(value)
    elif kind is int:
        matches = isinstance(value, int) and not isinstance(value, bool)
    else:
        assert kind in (bool, str, float) or _alternatives(kind), kind
        matches = kind in (bool, str) and isinstance(value, kind)
    if not matches:
        raise _Mismatch
    return value


def _to_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _Mismatch from None


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "none"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_number(text: str) -> Any:
    if re.fullmatch(r"[+-]?[0-9](_?[0-9])*", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _parse_list(text: str, where: str) -> Any:
    if text.startswith("["):
        try:
            return tomli.loads(f"list = {text}")["list"]
        except tomli.TOMLDecodeError as error:
            raise ConfigError(f"{to_toml_value(text)} is not a list in TOML: {error}", where=where) from None
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    if "" in entries:
        raise ConfigError(
            f"the list {to_toml_value(text)} has an empty entry",
            where=where,
            mend="Separate entries by single commas: a,b,c",
        )
    return entries


def _not_supported(feature: str, value: Any, key: Key, where: str) -> ConfigError:
    return ConfigError(
        f"{to_toml_value(value)} was given, but {feature} is not supported yet",
        where=where,
        mend=f"Leave it at {to_toml_value(key.default)}.",
    )


def _describe_range(key: Key) -> str:
    kind, optional = split_optional(key.kind)
    return f"{describe_kind(kind)} of {key.limits.describe_range()}" + (", or none" if optional else "")


def _nearest_choice(value: Any, kind: Any) -> str:
    kind, _ = split_optional(kind)
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is not Literal:
        return ""
    given = [str(entry) for entry in (value if isinstance(value, list) else [value])]
    choices = typing.get_args(kind)
    near = [match for entry in given if entry not in choices for match in _closest(entry, choices)]
    return f"Did you mean {to_toml_value(near[0])}?" if near else ""


def _closest(entry: str, choices: tuple[str, ...]) -> list[str]:
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[match] for match in difflib.get_close_matches(entry.lower(), list(by_lower), n=1)]
