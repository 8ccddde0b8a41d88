"""Names of tensors in Hugging Face files, and of parameters here: one list of rules, used in both directions.

A rule's patterns hold placeholders: `{i}` is a layer, `{e}` an expert. A rule without `at` maps one file tensor to
one parameter. With `at`, it maps one file tensor to one *slice* of a parameter, given by its leading indices: gate
and up of expert e are slices [e, 0] and [e, 1] of `layers.{i}.moe.experts.gate_up`. With `axes`, the file holds the
slice in another order of dims. Readers, writers, and the coverage tests are written once against `Rule`; a family only
lists rules.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from string import Formatter
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Axes:
    """How a file arranges the dims of a parameter, in einops' notation: `Axes("e d (g h)", "e g h d")`.

    `file` names the file tensor's dims, those in parentheses merged into one; `parameter` names the dims of the
    parameter (of the slice at `at`, if the rule has one). Both have the same names.
    """

    file: str
    parameter: str

    def __post_init__(self) -> None:
        names = self.parameter.split()
        assert sorted(sum(self.groups, ())) == sorted(names), f"{self}: both sides must name the same dims"

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The names in each dim of the file tensor."""
        return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", self.file))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """For each dim of the unmerged file tensor, which dim of the parameter it is."""
        names = self.parameter.split()
        return tuple(names.index(name) for group in self.groups for name in group)

    def merge(self, unmerged: Sequence[int]) -> tuple[int, ...]:
        """The file tensor's shape, from that with nothing merged."""
        sizes = iter(unmerged)
        return tuple(prod(next(sizes) for _ in group) for group in self.groups)


@dataclass(frozen=True)
class Piece:
    """One file tensor, and the parameter's slice that it fills: leading indices (() is all of it), order of dims."""

    file_key: str
    at: tuple[int, ...] = ()
    axes: Axes | None = None

    def shape(self, parameter_shape: Sequence[int]) -> tuple[int, ...]:
        """The file tensor's shape, given the (global) shape of the parameter that it belongs to."""
        unmerged = self.unmerged(parameter_shape[len(self.at) :])
        return unmerged if self.axes is None else self.axes.merge(unmerged)

    def unmerged(self, of_slice: Sequence[T]) -> tuple[T, ...]:
        """Sizes or offsets of the slice's dims, in the file's order: the file tensor's shape with nothing merged."""
        return tuple(of_slice) if self.axes is None else tuple(of_slice[dim] for dim in self.axes.order)

    def in_file_order(self, of_slice: Tensor) -> Tensor:
        """A view of the slice (or of a region of it) with dims as the unmerged file tensor has them."""
        return of_slice if self.axes is None else of_slice.permute(self.axes.order)


@dataclass(frozen=True)
class Rule:
    """`at` holds integers and placeholder names ("e"), one per leading dim of the parameter that is indexed."""

    file_pattern: str
    pattern: str
    at: tuple[int | str, ...] = ()
    axes: Axes | None = None

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
            yield Piece(self.file_pattern.format(**match.groupdict(), **placeholders), at, self.axes)


def pieces_of(rules: Sequence[Rule], name: str, shape: Sequence[int]) -> list[Piece]:
    """Every file tensor that makes up parameter `name`; empty if no rule knows the name."""
    return [piece for rule in rules for piece in rule.pieces(name, shape)]


def map_keys(
    layouts: Sequence[Sequence[Rule]], shapes: Mapping[str, Sequence[int]], present: Container[str] = ()
) -> tuple[dict[str, tuple[str, Piece]], list[str]]:
    """The whole correspondence for a model, given the (global) shape of each of its tensors.

    Args:
        layouts: lists of rules; the first, which knows every name, is how the family's files are written. For each
            parameter, the first layout of which any key is `present` is taken, and the first of all if none is.
        present: the keys that files hold.

    Returns:
        File key -> (parameter name, piece), in the order of `shapes`; and the names that no rule knows.

    A family whose rules give one file tensor to two slices, or leave part of a parameter unfilled, is a bug of that
    family: AssertionError.
    """
    by_file_key: dict[str, tuple[str, Piece]] = {}
    unknown = []
    for name, shape in shapes.items():
        candidates = [pieces for rules in layouts if (pieces := pieces_of(rules, name, shape))]
        if not candidates:
            unknown.append(name)
            continue
        found = (pieces for pieces in candidates if any(piece.file_key in present for piece in pieces))
        pieces = next(found, candidates[0])
        assert sum(prod(piece.shape(shape)) for piece in pieces) == prod(shape), f"{name}: rules do not fill it"
        for piece in pieces:
            assert piece.file_key not in by_file_key, f"{piece.file_key} belongs to {name} and to another slice"
            by_file_key[piece.file_key] = (name, piece)
    return by_file_key, unknown


def _placeholders(pattern: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(pattern) if field is not None}
