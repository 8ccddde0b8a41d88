"""Whether a checkpoint and a model are of one kind, asked before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from titanmoe.checkpoint.dcp_storage import StoredTensor
from titanmoe.config.errors import ConfigError
from titanmoe.parallel.ranks import Ranks

_MAX_LISTED = 5


def check_match(
    path: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], parts: Collection[str], ranks: Ranks
) -> None:
    """Compare names and shapes of what the checkpoint has of `parts` with what all ranks together want.

    Raises ConfigError listing both sides where they differ. Numbers that change their type are logged.
    """
    mine = {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in wanted.items()}
    of_all = {name: kind for of_rank in ranks.gather(mine) for name, kind in of_rank.items()}
    shapes = {name: kind.shape for name, kind in of_all.items()}
    there = {name: tensor.shape for name, tensor in stored.items() if name.partition(".")[0] in parts}
    lines = [
        *_listed("only in the checkpoint", [f"{name} {there[name]}" for name in there if name not in shapes]),
        *_listed("only in the model", [f"{name} {shapes[name]}" for name in shapes if name not in there]),
        *_listed(
            "of another shape",
            [f"{name} {there[name]} in the checkpoint, {shape} in the model"
             for name, shape in shapes.items() if name in there and there[name] != shape],
        ),
    ]  # fmt: skip
    if lines:
        raise ConfigError(
            "this checkpoint is of another model or optimizer:\n  " + "\n  ".join(lines),
            where=str(path),
            mend="use the model and optimizer settings it was saved with, or another checkpoint.folder",
        )
    cast = [name for name in of_all if name.startswith("model.") and stored[name].dtype != of_all[name].dtype]
    if cast:
        first = cast[0]
        text = "%d tensors change their type: %s is %s in the checkpoint and %s in the model"
        ranks.log(logging.WARNING, text, len(cast), first, stored[first].dtype, of_all[first].dtype)


def _listed(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return [f"{title}: {'; '.join(sorted(items)[:_MAX_LISTED])}{more}"]
