"""The records of metrics.jsonl: their keys, and how they are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Value = float | int | None
"""A figure; None where it is not known."""

JSONL_NAME = "metrics.jsonl"

KEYS = (
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "tflops",
    "mfu",
    "hfu",
    "peak_memory_gib",
    "tokens_seen",
    "data_seconds",
    "expert_load_cv",
)
"""Keys that every training record has, after `step` and in this order; null where there is no value."""


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a metrics.jsonl in file order, and the numbers (from 1) of lines that are none.

    A record is a JSON object with an integer "step"; a line that a kill cut off is no JSON object any more.
    """
    records, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged
