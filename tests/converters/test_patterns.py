"""Patterns name modules by whole segments of their paths."""

from __future__ import annotations

import pytest

from titanmoe.config import ConfigError
from titanmoe.converters.patterns import check_each_matches, first_match, matches

PATHS = [
    "tok_embeddings",
    "layers.1",
    "layers.1.attention",
    "layers.1.attention.q_proj",
    "layers.12.attention.k_proj",
    "layers.12.moe.router.gate",
    "layers.12.moe.experts",
    "layers.12.moe.shared_experts.gate_proj",
    "output",
]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("experts", ["layers.12.moe.experts"]),
        ("shared_experts", ["layers.12.moe.shared_experts.gate_proj"]),
        ("*experts", ["layers.12.moe.experts", "layers.12.moe.shared_experts.gate_proj"]),
        ("gate", ["layers.12.moe.router.gate"]),
        ("router.gate", ["layers.12.moe.router.gate"]),
        ("layers.1", ["layers.1", "layers.1.attention", "layers.1.attention.q_proj"]),
        ("layers.1.attention.q_proj", ["layers.1.attention.q_proj"]),
        ("layers.*.attention.?_proj", ["layers.1.attention.q_proj", "layers.12.attention.k_proj"]),
        ("layers.1[0-9].attention", ["layers.12.attention.k_proj"]),
        ("attention.*", ["layers.1.attention.q_proj", "layers.12.attention.k_proj"]),
        ("output", ["output"]),
        # A wildcard stands for one segment at most, and a piece of a segment is none.
        ("layers.*.k_proj", []),
        ("proj", []),
        ("attention.q", []),
        ("model.layers.1", []),
        ("Experts", []),
        ("", []),
    ],
)
def test_what_a_pattern_names(pattern: str, named: list[str]) -> None:
    assert [path for path in PATHS if matches(path, pattern)] == named


def test_the_first_pattern_that_matches_is_named() -> None:
    assert first_match("layers.1.attention.q_proj", ["output", "attention", "layers"]) == "attention"
    assert first_match("layers.1.attention.q_proj", ["output", "experts"]) is None


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("expert", "experts"),
        ("router.gates", "router.gate"),
        ("layers.1.attention.qproj", "layers.1.attention.q_proj"),
        ("wk", "k_proj"),
        ("attention.wq", "attention.q_proj"),
        ("layers.12.moe.shared_experts.w1", "layers.12.moe.shared_experts.gate_proj"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, meant: str) -> None:
    """torchtitan's names are known; else the nearest name is told."""
    check_each_matches(["experts", "output"], PATHS, "here", "modules")
    with pytest.raises(ConfigError) as error:
        check_each_matches(["experts", pattern], PATHS, "x.fqns", "modules")
    assert str(error.value).startswith(f'x.fqns: "{pattern}" matches none of the 9 modules\n')
    assert f'Did you mean "{meant}"?' in error.value.mend
    assert '"layers.12.moe.shared_experts.gate_proj"' in error.value.mend


def test_nothing_near_is_no_suggestion() -> None:
    with pytest.raises(ConfigError) as error:
        check_each_matches(["zzzzzz"], PATHS, "x.fqns", "modules")
    assert "Did you mean" not in error.value.mend
