"""Names of tensors in Hugging Face files, and of parameters here: one list of rules, used in both directions.

A rule's patterns hold placeholders: `{i}` is a layer, `{e}` an expert. A rule without `at` maps one file tensor to
one parameter. With `at`, it maps one file tensor to one *slice* of a parameter, given by its leading indices: gate
and up of expert e are slices [e, 0] and [e, 1] of `layers.{i}.moe.experts.gate_up`. Readers, writers, and the
coverage tests are written once against `Rule`; a family only lists rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from string import Formatter


@dataclass(frozen=True)
class Piece:
    """One file tensor, and the leading indices of the parameter's slice that it fills (() is all of it)."""

    file_key: str
    at: tuple[int, ...] = ()

    def shape(self, parameter_shape: Sequence[int]) -> tuple[int, ...]:
        """The file tensor's shape, given the (global) shape of the parameter that it belongs to."""
        return tuple(parameter_shape[len(self.at) :])


@dataclass(frozen=True)
class Rule:
    """`at` holds integers and placeholder names ("e"), one per leading dim of the parameter that is indexed."""

    file_pattern: str
    pattern: str
    at: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        known = _placeholders(self.pattern) | {index for index in self.at if isinstance(index, str)}
        assert _placeholders(self.file_pattern) == known, f"{self}: both sides must name the same placeholders"

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(self.pattern)))

    def pieces(self, name: str, shape: Sequence[int]) -> Iterator[Piece]:
        """The file tensors that this rule puts into parameter `name` of (global) shape `shape`."""
        match = self._regex.fullmatch(name)
        if match is None:
            return
        choices = [range(shape[dim]) if isinstance(index, str) else (index,) for dim, index in enumerate(self.at)]
        for at in product(*choices):
            placeholders = {index: value for index, value in zip(self.at, at, strict=True) if isinstance(index, str)}
            yield Piece(self.file_pattern.format(**match.groupdict(), **placeholders), at)


def pieces_of(rules: Sequence[Rule], name: str, shape: Sequence[int]) -> list[Piece]:
    """Every file tensor that makes up parameter `name`; empty if no rule knows the name."""
    return [piece for rule in rules for piece in rule.pieces(name, shape)]


def map_keys(
    rules: Sequence[Rule], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[str, Piece]], list[str]]:
    """The whole correspondence for a model, given the (global) shape of each of its tensors.

    Returns:
        File key -> (parameter name, piece), in the order of `shapes`; and the names that no rule knows.

    A family whose rules give one file tensor to two slices, or leave part of a parameter unfilled, is a bug of that
    family: AssertionError.
    """
    by_file_key: dict[str, tuple[str, Piece]] = {}
    unknown = []
    for name, shape in shapes.items():
        pieces = pieces_of(rules, name, shape)
        if not pieces:
            unknown.append(name)
            continue
        assert sum(prod(piece.shape(shape)) for piece in pieces) == prod(shape), f"{name}: rules do not fill it"
        for piece in pieces:
            assert piece.file_key not in by_file_key, f"{piece.file_key} belongs to {name} and to another slice"
            by_file_key[piece.file_key] = (name, piece)
    return by_file_key, unknown


def _placeholders(pattern: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(pattern) if field is not None}
