"""Which settings decide what a model learns, and how two configs differ in them."""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from typing import Any

from titanmoe.config.job_config import JobConfig
from titanmoe.config.schema import Schema
from titanmoe.config.sections.quantize import CONVERTERS
from titanmoe.config.values import to_toml_value

_SECTIONS = ("model", "training", "data", "optimizer", "lr_scheduler", "moe", "compile", "quantize", "lora", "debug")
_OTHER_KEYS = frozenset(
    {
        "model.print_after_conversion",
        "quantize.strict",
        "training.steps",
        "training.epochs",
        "training.local_batch_size",
        "training.gc_freq",
        "training.gc_debug",
    }
)


def learning_settings(config: JobConfig) -> dict[str, Any]:
    """The values, by dotted key, that change what is learned at a step.

    Left out are names and folders, what is logged and saved and how often, the length of the run, and how the work is
    spread over ranks and memory, which gives equal losses.
    """
    paths = [path for path, key in Schema.of_job_config().keys.items() if not key.limits.inert]
    unused = set(CONVERTERS).difference(config.model.converters)
    paths = [path for path in paths if path.rpartition(".")[0] not in unused]
    return {path: _value(config, path) for path in paths if _matters(path)}


def config_fingerprint(config: JobConfig) -> str:
    """A hash that two configs share if, and only if, their learning settings are equal."""
    return hashlib.sha256(json.dumps(learning_settings(config), sort_keys=True).encode()).hexdigest()


def changes(before: JobConfig, after: JobConfig) -> list[str]:
    """What differs in the learning settings, such as `optimizer.lr: 0.001 -> 0.002`."""
    old, new = learning_settings(before), learning_settings(after)
    both = [path for path in new if path in old]  # not the settings of a converter that is new: it is told itself
    return [f"{path}: {_text(old[path])} -> {_text(new[path])}" for path in both if old[path] != new[path]]


def _matters(path: str) -> bool:
    is_chosen = path.startswith(tuple(f"{section}." for section in _SECTIONS))
    return is_chosen and path not in _OTHER_KEYS and not path.startswith("training.dataloader.")


def _value(config: JobConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), config)


def _text(value: Any) -> str:
    return "none" if value is None else to_toml_value(value)
