"""Operations, copies and bytes of an MoE layer's forward and backward: python -m titanmoe.benchmarks.moe_path [--json].

Counts every operation that touches memory, which is a kernel on a GPU, by what it does, beside the least that a layer
needs: rows are gathered, multiplied, activated, multiplied and summed; the same again backward. With the experts in one
process, and as it is with expert parallelism (in a group of this process alone, so that nothing travels). Time is the
median over the rounds; on a GPU the profiler counts the kernels that really ran, and adds up their time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from titanmoe.models.moe.layer import MoELayer
from titanmoe.models.spec import MoE, Router
from titanmoe.parallel.expert import AllToAllDispatcher

PRODUCTS, COPIES, SUMS, NUMBERS = "products", "copies", "sums of rows", "other numbers"
INDICES, COLLECTIVES, READS = "indices", "collectives", "reads by the host"
KINDS = (PRODUCTS, COPIES, SUMS, NUMBERS, INDICES, COLLECTIVES, READS)

_SUMS = ("_embedding_bag", "_embedding_bag_forward_only")
_KIND_OF = {
    **dict.fromkeys(("mm", "addmm", "bmm", "rows_times_weights", "rows_times_rows"), PRODUCTS),
    **dict.fromkeys(_SUMS, SUMS),
    **dict.fromkeys(("copy_", "clone", "_to_copy", "cat", "stack", "constant_pad_nd"), COPIES),
    **dict.fromkeys(("index_select", "index", "gather", "index_copy_", "index_put_", "scatter"), COPIES),
}
_PICKS = ("index_select", "index", "gather")  # read as much of their input as they write
_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")

Counts = dict[str, dict[str, int]]
"""Number and bytes by kind."""


def main(args: Sequence[str] | None = None) -> int:
    options = _parse(args)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype)
    spec = MoE(options.experts, options.top_k, options.hidden, Router(normalize=True))
    paths = {}
    for path in ("one process", "expert parallel"):
        layer = _layer(options.dim, spec, device, dtype)
        if path == "expert parallel":
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            assert dist.group.WORLD is not None
            layer.dispatcher = AllToAllDispatcher(spec.num_experts, dist.group.WORLD)
        try:
            paths[path] = _measure(layer, options.tokens, options.rounds)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    report = {
        "benchmark": "moe_path",
        "sizes": {name: getattr(options, name) for name in ("tokens", "dim", "hidden", "experts", "top_k")},
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "least": least(options.tokens, options.dim, spec, dtype.itemsize),
        "paths": paths,
    }
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titanmoe.benchmarks.moe_path", description=__doc__.splitlines()[0])
    # The ratios of Qwen3-30B-A3B, with an eighth of its channels.
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=96, help="hidden features of an expert")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(args)


def _layer(dim: int, spec: MoE, device: torch.device, dtype: torch.dtype) -> MoELayer:
    layer = MoELayer(dim, spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.05, generator=generator)
    return layer.to(device=device, dtype=dtype)


def least(num_tokens: int, dim: int, spec: MoE, item_bytes: int) -> dict[str, Counts]:
    """What a layer needs at least, with one operation for each thing to be done; routing aside."""
    num_rows = num_tokens * spec.top_k
    x, gate_up, h = num_rows * dim, num_rows * 2 * spec.hidden_dim, num_rows * spec.hidden_dim
    up_weight, down_weight = spec.num_experts * 2 * spec.hidden_dim * dim, spec.num_experts * dim * spec.hidden_dim
    gather, scatter = 2 * x, x + num_tokens * dim
    up, down = x + up_weight + gate_up, h + down_weight + x
    forward = {COPIES: [gather], PRODUCTS: [up, down], NUMBERS: [gate_up + h], SUMS: [scatter]}
    backward = {COPIES: [gather], PRODUCTS: [up, down] * 2, NUMBERS: [2 * gate_up + 2 * h], SUMS: [scatter]}
    return {
        phase: {kind: {"calls": len(sizes), "bytes": sum(sizes) * item_bytes} for kind, sizes in each.items()}
        for phase, each in (("forward", forward), ("backward", backward))
    }


def _measure(layer: MoELayer, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    parameter = layer.experts.down
    shape = (1, num_tokens, parameter.shape[1])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(parameter).requires_grad_()
    dy = torch.randn(shape, generator=generator).to(parameter)

    def forward() -> Tensor:
        y: Tensor = layer(x)
        return y

    def both(around: Callable[[Callable[[], Any]], Any]) -> tuple[Any, Any]:
        """What `around` makes of the forward and of the backward pass."""
        results: list[Tensor] = []
        first = around(lambda: results.append(forward()))
        second = around(lambda: results[0].backward(dy))
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        return first, second

    for _ in range(3):
        both(lambda run: run())
    counts = both(_counts)
    seconds = [both(_seconds) for _ in range(num_rounds)]
    result = {}
    for index, phase in enumerate(("forward", "backward")):
        kinds, operations = counts[index]
        result[phase] = {
            "kinds": kinds,
            "operations": operations,
            "seconds": statistics.median(each[index] for each in seconds),
        }
    if x.is_cuda:
        for phase, kernels in zip(result, both(_kernels), strict=True):
            result[phase] |= kernels
    return result


def _seconds(run: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _kernels(run: Callable[[], Any]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(kernels), "kernel_seconds": sum(event.device_time for event in kernels) / 1e6}


def _counts(run: Callable[[], Any]) -> tuple[Counts, dict[str, int]]:
    """By kind, and the number of calls of every operation."""
    with _Operations() as operations:
        run()
    return operations.kinds, operations.calls


class _Operations(TorchDispatchMode):
    """Sees the operations below autograd; those of a custom operator count as one."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counts = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = _kind(func, result)
        if kind is not None:
            counts = self.kinds.setdefault(kind, {"calls": 0, "bytes": 0})
            counts["calls"] += 1
            counts["bytes"] += _num_bytes(func, args, kwargs, result)
            name = f"{func.namespace}.{func.overloadpacket.__name__}".removeprefix("aten.")
            self.calls[name] = self.calls.get(name, 0) + 1
        return result


def _kind(func: Any, result: Any) -> str | None:
    """None for what touches no memory: views and allocations."""
    name = func.overloadpacket.__name__
    if func.namespace in ("c10d", "_c10d_functional"):
        return None if name in ("wait_tensor", "_wrap_tensor_autograd") else COLLECTIVES
    returns = func._schema.returns
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    if is_view or name in _ALLOCATIONS or name == "detach" or func.namespace == "profiler":
        return None
    if name == "_local_scalar_dense":
        return READS
    tensors = _tensors(result)
    if not tensors:
        return None
    if not any(tensor.is_floating_point() for tensor in tensors):
        return INDICES
    return _KIND_OF.get(name, NUMBERS)


def _num_bytes(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Read and written. Of what rows are picked from, only as much as is picked."""
    name = func.overloadpacket.__name__
    total = 0
    for index, argument in enumerate(func._schema.arguments):
        given = _tensors(kwargs.get(argument.name, args[index] if index < len(args) else None))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if name in _PICKS and index == 0:
            given = _tensors(result)
        elif name in _SUMS and index == 0:
            total += args[1].numel() * given[0].shape[1] * given[0].element_size()
            continue
        elif is_written and name in ("index_copy_", "index_put_", "index_fill_", "scatter_"):
            given = _tensors(args[-1])
        elif is_written and argument.name not in ("out", "grad_input") and name not in ("copy_", "zero_", "fill_"):
            given *= 2  # changed in place: read, and written
        total += sum(map(_size, given))
    results = result if isinstance(result, tuple) else (result,)
    new = [value for each, value in zip(func._schema.returns, results, strict=False) if each.alias_info is None]
    return total + sum(map(_size, _tensors(new)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _size(tensor: Tensor) -> int:
    """Bytes, without what an expanded tensor repeats."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride != 0 else 1
    return numel * tensor.element_size()


def _table(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    lines = [
        f"{sizes['tokens']} tokens of {sizes['dim']}, {sizes['experts']} experts of {sizes['hidden']}, top "
        f"{sizes['top_k']}; {report['dtype']}, {report['device']}, {report['threads']} threads, torch "
        f"{report['torch']}",
        "",
        f"{'':34}{'least':>14}{'':8}" + "".join(f"{path:>22}" for path in report["paths"]),
    ]
    for phase in ("forward", "backward"):
        least_of, paths = report["least"][phase], [path[phase] for path in report["paths"].values()]
        lines.append(phase)
        columns = [least_of, *(path["kinds"] for path in paths)]
        for kind in (*KINDS, "all"):
            cells = []
            for kinds in columns:
                chosen = list(kinds.values()) if kind == "all" else [kinds[kind]] if kind in kinds else []
                calls, num_bytes = (sum(each[name] for each in chosen) for name in ("calls", "bytes"))
                cells.append(f"{calls:9} {num_bytes / 1e6:8.2f} MB" if chosen else "")
            if any(cells):
                lines.append(f"  {kind:32}" + "".join(f"{cell:>22}" for cell in cells))
        lines.append(f"  {'milliseconds':32}{'':22}" + "".join(f"{1e3 * path['seconds']:22.2f}" for path in paths))
        if all("kernels" in path for path in paths):
            kernels = (f"{path['kernels']} in {1e3 * path['kernel_seconds']:.2f} ms" for path in paths)
            lines.append(f"  {'kernels':32}{'':22}" + "".join(f"{cell:>22}" for cell in kernels))
        for index, path in enumerate(report["paths"]):
            calls = ", ".join(f"{name} {count}" for name, count in sorted(paths[index]["operations"].items()))
            lines.append(f"  {path}: {calls}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
