"""How a key of the job config is declared: its default, its range, and whether this version can honour it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is known of a key beyond its type; kept in the metadata of its dataclass field under `"limits"`.

    Args:
        at_least, more_than, at_most, less_than: the range of a number, or of every number in a list.
        also: values outside of the range that are allowed all the same, such as -1 for "all".
        later: names a feature of a later version. Any value but the default is refused as not supported yet.
        inert: why the key has no effect here. Any value but the default is accepted with one printed line.
    """

    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None
    also: tuple[float, ...] = ()
    later: str = ""
    inert: str = ""

    def accept(self, value: float) -> bool:
        """Whether a number lies in the range. NaN never does, infinity only where `also` names it."""
        return value in self.also or (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.more_than is None or value > self.more_than)
            and (self.at_most is None or value <= self.at_most)
            and (self.less_than is None or value < self.less_than)
        )

    def describe_range(self) -> str:
        """The range in words, "" where there is none."""
        words = ("at least", "more than", "at most", "less than")
        bounds = (self.at_least, self.more_than, self.at_most, self.less_than)
        text = " and ".join(f"{word} {bound}" for word, bound in zip(words, bounds, strict=True) if bound is not None)
        return ", or ".join([text, *(str(value) for value in self.also)]) if text else ""


def key(default: T, **limits: Any) -> T:
    """A dataclass field with `Limits`; typed as its default so that type checkers see an ordinary attribute."""
    field: Any = dataclasses.field(default=default, metadata={"limits": Limits(**limits)})
    return field


def limits_of(field: dataclasses.Field[Any]) -> Limits:
    """The limits declared with `key`; none for a field with a plain default."""
    limits = field.metadata.get("limits", Limits())
    assert isinstance(limits, Limits)
    return limits
