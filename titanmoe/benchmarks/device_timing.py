"""Timing calls in turn in this process, and what a plain product of the same machine reaches meanwhile."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping

import torch

from titanmoe.config import ConfigError
from titanmoe.parallel.host_memory import keep_freed_memory

_TURN_SECONDS, _MOST_CALLS = 0.02, 50
_NUM_WARM_UPS = 2


def pick_device(name: str | None = None) -> torch.device:
    """By default a GPU if there is one.

    Raises:
        ConfigError: there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here", where="--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe_machine(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {"device": name, "threads": torch.get_num_threads()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_in_turn(
    contenders: Mapping[str, Callable[[], object]], num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call of each contender in every round: A B C, A B C, ... after warm-up.

    A turn is as many calls as take 20 ms, at most 50. On a GPU, events on its stream tell the time.
    """
    if device.type == "cpu":
        keep_freed_memory()
    num_calls = {}
    for name, run in contenders.items():
        for _ in range(_NUM_WARM_UPS):
            run()
        num_calls[name] = max(1, min(_MOST_CALLS, round(_TURN_SECONDS / _seconds(run, 1, device))))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds):
        for name, run in contenders.items():
            seconds[name].append(_seconds(run, num_calls[name], device))
    return seconds


def _seconds(run: Callable[[], object], num_calls: int, device: torch.device) -> float:
    synchronize(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(num_calls):
            run()
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) / 1e3 / num_calls
    start = time.perf_counter()
    for _ in range(num_calls):
        run()
    return (time.perf_counter() - start) / num_calls


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory of a GPU that was in use during a second call, all that was in use before included; None on a CPU."""
    if device.type != "cuda":
        return None
    run()  # makes what is kept from call to call
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def plain_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A square product large enough to be the machine's best, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3
