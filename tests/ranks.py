"""Run a function on several gloo ranks, in processes of their own, and get their return values back."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; all must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def pretend(rank: int, world_size: int) -> Iterator[None]:
    """Be one of so many ranks, the others of which do not exist: collectives do nothing. For what has no values."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Else what a forked rank does on a mesh of this shape would be done on these processes, which are gone.
        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks with a gloo process group; return the results in rank order.

    Results must be picklable (plain tensors, numbers, lists). The first rank that fails fails the test, with its
    traceback; a hang fails it after `timeout` seconds.

    Processes are forked, which costs a tenth of a second. With `fresh` they begin anew and import torch, which takes
    seconds: where memory is measured, which else depends on what the tests before have left in the process.
    """
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            process = context.Process(target=_rank_main, args=(function, rank, world_size, args, folder))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        failures = sorted(Path(folder).glob("error-*.txt"))
        if failures:
            raise AssertionError("\n".join(f"--- {path.stem}\n{path.read_text()}" for path in failures))
        assert not hung, f"ranks {hung} did not finish within {timeout} s"
        codes = [process.exitcode for process in processes]
        assert not any(codes), f"ranks ended with exit codes {codes}"
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        torch.save(function(*args), Path(folder) / f"result-{rank}.pt")
    except BaseException:
        (Path(folder) / f"error-{rank}.txt").write_text(traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    os._exit(0)
