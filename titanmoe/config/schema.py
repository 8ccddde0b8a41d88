"""The sections and keys of JobConfig as flat tables, and the search for the name that a user meant."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from titanmoe.config.job_config import JobConfig
from titanmoe.config.keys import Limits, limits_of


@dataclass(frozen=True)
class Key:
    """One key: its dotted path (`training.dataloader.num_workers`), resolved type, default and limits."""

    path: str
    kind: Any
    default: Any
    limits: Limits

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Schema:
    """All sections (dotted path -> dataclass, parents before children) and all keys (dotted path -> Key)."""

    sections: Mapping[str, type]
    keys: Mapping[str, Key]

    @classmethod
    def of_job_config(cls) -> Schema:
        sections: dict[str, type] = {}
        keys: dict[str, Key] = {}
        _collect(JobConfig, "", sections, keys)
        return cls(sections, keys)

    def keys_of(self, section: str) -> list[Key]:
        """The keys directly in a section, in the order of their declaration."""
        return [key for key in self.keys.values() if key.section == section]

    def suggest_section(self, path: str) -> str:
        """A sentence with the nearest section, or with all of them."""
        name = path.rpartition(".")[2]
        near = [s for s in self.sections if s.rpartition(".")[2] == name] or _nearest(path, self.sections)
        if near:
            return f"Did you mean [{near[0]}]?"
        return "Sections are " + ", ".join(s for s in self.sections if "." not in s) + "."

    def suggest_key(self, path: str) -> str:
        """A sentence with the nearest key: of the same name elsewhere, else of a like name, here or elsewhere."""
        section, _, name = path.rpartition(".")
        same_name = [key.path for key in self.keys.values() if key.name == name]
        siblings = {key.name: key.path for key in self.keys_of(section)}
        if same_name and not _nearest(name, siblings, cutoff=0.8):
            return f"Did you mean {' or '.join(same_name[:4])}?"
        like_name = [siblings[near] for near in _nearest(name, siblings)]
        near_paths = like_name or _nearest(path, self.keys) or self._like_leaf(name)
        if near_paths:
            return f"Did you mean {near_paths[0]}?"
        if siblings:
            return f"Keys of [{section}] are {', '.join(siblings)}."
        return self.suggest_section(section or path)

    def _like_leaf(self, name: str) -> list[str]:
        names = _nearest(name, {key.name for key in self.keys.values()})
        return [key.path for near in names for key in self.keys.values() if key.name == near]


def _collect(cls: type, prefix: str, sections: dict[str, type], keys: dict[str, Key]) -> None:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, path = kinds[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            sections[path] = kind
            _collect(kind, path + ".", sections, keys)
        else:
            keys[path] = Key(path, kind, field.default, limits_of(field))


def _nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> list[str]:
    return difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
