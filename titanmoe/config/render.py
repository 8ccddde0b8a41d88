"""A config as text: resolved TOML, TOML with explanations, and the help of all keys."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from titanmoe.config.docs import class_doc, field_docs
from titanmoe.config.job_config import JobConfig
from titanmoe.config.resolve import CONFIG_FILE, Resolved
from titanmoe.config.schema import Key, Schema
from titanmoe.config.values import describe_kind, split_optional, to_toml_value

_EXPLAIN_WIDTH = 120


def to_toml(config: JobConfig) -> str:
    """Every key of the config as TOML, which reads back to an equal config.

    None is written as "none". `job.config_file` is left out, as whoever reads the text names another file, and so is
    `training.steps` where `training.epochs` replaces it.
    """
    return "\n".join(_toml_lines(config, None, Schema.of_job_config()))


def to_explained_toml(resolved: Resolved) -> str:
    """As `to_toml`, with the help of each key above it and where its value came from behind it, both as comments."""
    return "\n".join(_toml_lines(resolved.config, resolved.origins, Schema.of_job_config()))


def help_text(usage: str, width: int = 100) -> str:
    """The usage, how options are written, and all keys by section with type, default and meaning.

    Args:
        usage: the first lines, without the heading.
        width: columns of the terminal.
    """
    schema = Schema.of_job_config()
    lines = [
        f"usage: {usage}",
        "",
        *textwrap.wrap(
            "Options are written --section.key=value or --section.key value, with dashes or underscores; booleans also "
            "--section.key and --section.no_key; lists separated by commas; none where a key may be unset. "
            'An option wins over the TOML file, the file over what it inherits from (base = "other.toml"), and that '
            "over the defaults.",
            width,
        ),
    ]
    for section, cls in schema.sections.items():
        keys = schema.keys_of(section)
        if keys:
            lines += ["", *textwrap.wrap(f"[{section}] {class_doc(cls)}", width, subsequent_indent="  ")]
            docs = field_docs(cls)
            for key in keys:
                default = "none" if key.default is None else to_toml_value(key.default)
                lines.append(f"  --{key.path}  {_describe_type(key)} (default: {default})")
                text = docs[key.name] + _describe_support(key)
                lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _toml_lines(config: JobConfig, origins: Mapping[str, str] | None, schema: Schema) -> Iterator[str]:
    """The lines of a TOML; with comments if `origins` is given."""
    for section, cls in schema.sections.items():
        keys = [key for key in schema.keys_of(section) if not _is_left_out(key, config)]
        if not keys:
            continue
        docs = {}
        if origins is not None:
            docs = field_docs(cls)
            yield from _comment(class_doc(cls))
        yield f"[{section}]"
        for key in keys:
            line = f"{key.name} = {to_toml_value(_value_at(config, key.path))}"
            if origins is None:
                yield line
            else:
                yield ""
                yield from _comment(docs[key.name] + _describe_support(key))
                yield f"{line}  # {origins[key.path]}"
        yield ""


def _is_left_out(key: Key, config: JobConfig) -> bool:
    return key.path == CONFIG_FILE or (key.path == "training.steps" and config.training.epochs is not None)


def _value_at(config: JobConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), config)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _EXPLAIN_WIDTH, initial_indent="# ", subsequent_indent="# ")


def _describe_type(key: Key) -> str:
    kind, optional = split_optional(key.kind)
    bounds = key.limits.describe_range()
    return describe_kind(kind) + (f", {bounds}" if bounds else "") + (", or none" if optional else "")


def _describe_support(key: Key) -> str:
    if key.limits.later:
        return " Not supported yet: must be left at its default."
    return f" No effect, as {key.limits.inert}." if key.limits.inert else ""
