"""TOML files: finding them, reading them, and following `base`."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from titanmoe.config.errors import ConfigError

BASE = "base"

_SYNTAX_MENDS = (
    ("Cannot overwrite", "This key is already set in this section."),
    ("Cannot declare", "This section is already in the file; put all its keys in one place."),
    ("Invalid value", 'Texts are written in quotes ("..."), booleans true or false, lists [..., ...].'),
)


@dataclass(frozen=True)
class TomlFile:
    """A file that was read: its path, as it is shown to the user, and its tables without `base`."""

    path: Path
    tables: dict[str, Any]


def train_configs_folders() -> list[Path]:
    """The folders of ready-made TOMLs that exist: in a checkout beside the package, in a wheel inside it."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "train_configs", package / "train_configs")
    return [folder for folder in folders if folder.is_dir()]


def find_config_file(name: str, beside: Path | None = None) -> Path:
    """The file that a user named: as a path (from the folder `beside`, or the current one), else, for a bare file name,
    in train_configs.

    Raises:
        ConfigError: there is no such file; lists the ready-made ones.
    """
    path = (beside or Path()) / os.path.expanduser(name)
    if name and os.path.lexists(path):
        return path
    is_bare = name not in ("", ".", "..") and Path(name).name == name
    shipped = {file.name: file for folder in train_configs_folders() for file in sorted(folder.glob("*.toml"))}
    if is_bare and name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(Path(name).name, shipped, n=1)
    mend = f"Did you mean {near[0]}? " if near else ""
    mend += f"Ready-made configs: {', '.join(sorted(shipped)) or 'none found'}."
    raise ConfigError("there is no such config file", where=name or '""', mend=mend)


def read_with_bases(path: Path) -> list[TomlFile]:
    """The file and all that it inherits from, the farthest base first.

    Raises:
        ConfigError: a file is missing, unreadable or not TOML, `base` is not a text, or files inherit in a circle.
    """
    files: list[TomlFile] = []
    seen: list[tuple[Path, str]] = []  # as shown to the user, and the real path
    following: Path | None = path
    while following is not None:
        real = os.path.realpath(following)
        if real in (earlier for _, earlier in seen):
            chain = " -> ".join(str(shown) for shown, _ in [*seen, (following, real)])
            raise ConfigError(f"files inherit from each other in a circle: {chain}", where=f"{seen[-1][0]}, {BASE}")
        seen.append((following, real))
        tables = read_toml(following)
        base = tables.pop(BASE, None)
        files.append(TomlFile(following, tables))
        following = None if base is None else _find_base(base, following)
    return files[::-1]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of one file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or is not TOML (with line and column).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        found = ", ".join(sorted(file.name for file in path.glob("*.toml"))) or "none"
        raise ConfigError(
            "this is a directory, not a TOML file", where=str(path), mend=f"TOML files in it: {found}."
        ) from None
    except OSError as error:
        raise ConfigError(f"the config file cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"byte {error.object[error.start]:#04x} is not valid UTF-8",
            where=f"{path}:{line}",
            mend="Save the file as UTF-8.",
        ) from None
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        raise ConfigError("lists or tables are nested too deeply", where=str(path)) from None


def _find_base(base: Any, path: Path) -> Path:
    if not isinstance(base, str):
        raise ConfigError(f"must be one file name, not {base!r}", where=f"{path}, {BASE}")
    try:
        return find_config_file(base, beside=path.parent)
    except ConfigError as error:
        raise ConfigError(
            f'"{base}": {error.what}',
            where=f"{path}, {BASE}",
            mend=f"It is looked for relative to {path.parent}. {error.mend}",
        ) from None


def _syntax_error(path: Path, text: str, error: tomli.TOMLDecodeError) -> ConfigError:
    lines = text.splitlines() or [""]
    in_text = error.lineno <= len(lines)
    found = f"in: {lines[error.lineno - 1].strip()}" if in_text else "at the end of the file"
    mend = next((mend for start, mend in _SYNTAX_MENDS if error.msg.startswith(start)), "")
    return ConfigError(f"{error.msg}, {found}", where=f"{path}:{error.lineno}:{error.colno}", mend=mend)
