"""What a rank sends, and where its host would wait for a device, counted while a piece of the program runs.

Collectives are seen where torch dispatches them, whoever asks for them: FSDP2, autograd or this package. So are the
operations that read values of a tensor on the host. On a CPU nothing waits; what is counted is what would.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from titanmoe.parallel.volumes import Kind, num_sent

# Operators of torch 2.11 to 2.13: kind, and the argument that holds the whole message (gathered, or yet to be dealt).
_COLLECTIVES: dict[str, tuple[Kind, str]] = {
    "c10d::_allgather_base_": ("all-gather", "output_tensor"),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", "input_tensor"),
    "c10d::allreduce_": ("all-reduce", "tensors"),
    "c10d::alltoall_base_": ("all-to-all", "input"),
    "c10d::send": ("send", "tensors"),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", "input"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", "input"),
    "_c10d_functional::all_reduce": ("all-reduce", "input"),
    "_c10d_functional::all_to_all_single": ("all-to-all", "input"),
}
_SILENT = {"c10d::recv_", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
_PACKAGE = Path(__file__).parents[1]


@dataclass
class Counts:
    """Of one rank.

    Attributes:
        calls, sent: collectives and the bytes that this rank sent, by kind and ranks that took part.
        waits: places in the package that read values of tensors, and how often, as module.function.
    """

    calls: Counter[tuple[Kind, tuple[int, ...]]] = field(default_factory=Counter)
    sent: dict[tuple[Kind, tuple[int, ...]], Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    waits: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count until the end of the block, on this thread."""
    counts = Counts()
    with _Watch(counts), _watched_methods(counts):
        yield counts


class _Watch(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_message(func, args)
        elif _reads_values(func, args, kwargs):
            self.counts.waits[_place()] += 1
        return func(*args, **kwargs)

    def _count_message(self, func: Any, args: tuple) -> None:
        name = func.name()
        if name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise RuntimeError(f"{name} is a collective that nobody knows how to count")
        kind, argument = _COLLECTIVES[name]
        given = {known.name: value for known, value in zip(func._schema.arguments, args, strict=False)}
        group = _group(given)
        ranks = tuple(dist.get_process_group_ranks(group))
        message = given[argument]
        tensors = [message] if isinstance(message, Tensor) else message
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if kind == "all-gather" and name.startswith("_c10d_functional"):
            num_bytes *= len(ranks)
        splits = given.get("input_split_sizes")
        if kind == "all-to-all" and splits:
            num_rows = sum(splits)
            sent = Fraction(num_bytes * (num_rows - splits[group.rank()]), max(num_rows, 1))
        else:
            sent = num_sent(kind, num_bytes, len(ranks))
        self.counts.calls[kind, ranks] += 1
        self.counts.sent[kind, ranks] += sent


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    if "group_name" in given:
        return _resolve_process_group(given["group_name"])
    return dist.ProcessGroup.unbox(given["process_group"])


def _reads_values(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the host must know values before it can go on, if only to know a size."""
    name = func.name().partition(".")[0]
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return name in (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
    )


@contextlib.contextmanager
def _watched_methods(counts: Counts) -> Iterator[None]:
    """Methods that copy to the host, and that a CPU tensor answers without dispatching anything."""
    originals = {name: getattr(Tensor, name) for name in ("tolist", "cpu")}

    def watched(name: str) -> Any:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts.waits[_place()] += 1
            return originals[name](tensor, *args, **kwargs)

        return method

    for name in originals:
        setattr(Tensor, name, watched(name))
    try:
        yield
    finally:
        for name in originals:
            delattr(Tensor, name)


def _place() -> str:
    """The innermost function of the package, outside the benchmarks, that is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.parent.name != "benchmarks" and frame.f_code.co_name[0] != "<":
            return ".".join((*path.relative_to(_PACKAGE).with_suffix("").parts, frame.f_code.co_name))
        frame = frame.f_back
    return "elsewhere"
