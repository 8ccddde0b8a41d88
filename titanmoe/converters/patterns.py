"""Naming modules of a model by whole segments of their paths."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from titanmoe.config.errors import ConfigError

_ELSEWHERE = {
    **{"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"},
    **{"wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj", "wkv_b": "kv_b_proj"},
    **{"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    **{"self_attn": "attention", "mlp": "moe"},
}
"""What modules are called in torchtitan and transformers, and here."""


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` names a module or something that it is in.

    A pattern is one or more segments, each perhaps with wildcards: `experts` is `layers.0.moe.experts`, and is not
    `layers.0.moe.shared_experts`; `layers.[0-3].attention` has everything in four attentions.
    """
    segments, wanted = path.split("."), pattern.split(".")
    starts = range(len(segments) - len(wanted) + 1)
    return any(
        all(fnmatch.fnmatchcase(*pair) for pair in zip(segments[start:], wanted, strict=False)) for start in starts
    )


def first_match(path: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if matches(path, pattern)), None)


def check_each_matches(patterns: Sequence[str], paths: Sequence[str], where: str, what: str) -> None:
    """
    Args:
        paths: of the modules that may be named.
        where: the key that holds the patterns.
        what: the modules, for people.

    Raises:
        ConfigError: a pattern that names none of them.
    """
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            raise ConfigError(
                f'"{pattern}" matches none of the {len(paths)} {what}', where=where, mend=_suggest(pattern, paths)
            )


def _suggest(pattern: str, paths: Sequence[str]) -> str:
    """The name that another's became here, or else the nearest run of as many segments."""
    renamed = ".".join(_ELSEWHERE.get(segment, segment) for segment in pattern.split("."))
    length = pattern.count(".") + 1
    runs = dict.fromkeys(
        ".".join(segments[start : start + length])
        for segments in (path.split(".") for path in paths)
        for start in range(len(segments) - length + 1)
    )
    nearest = difflib.get_close_matches(pattern, [run for run in runs if not run.isdigit()], n=1, cutoff=0.5)
    if any(matches(path, renamed) for path in paths):
        nearest = [renamed]
    hint = f' Did you mean "{nearest[0]}"?' if nearest else ""
    example = f' They are named like "{max(paths, key=len)}".' if paths else ""
    return f"An entry is one or more whole segments of a path.{hint}{example}"
