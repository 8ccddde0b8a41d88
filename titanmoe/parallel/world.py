"""This process among the others: rank, device, process group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from titanmoe.config.errors import ConfigError
from titanmoe.parallel.host_memory import keep_freed_memory


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size_from_env() -> int:
    """How many processes the launcher started, read without touching torch.distributed."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_world(timeout_seconds: int) -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Without these variables this is the only process, and no port is opened. Tensors on the CPU always have gloo, so
    that small agreements between hosts need no device. Without a GPU, freed memory stays with the process from now on.

    Raises:
        ConfigError: the port is taken, there are more processes on this machine than devices, or the process group
            exists already.
    """
    if dist.is_initialized():
        raise ConfigError(
            "this process has a process group already",
            where="torch.distributed",
            mend="a job makes its own and destroys it: call destroy_process_group() first",
        )
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    size = world_size_from_env()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
                where="NGPU",
                mend="start at most one process per GPU",
            )
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    timeout = timedelta(seconds=timeout_seconds)
    try:
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    except (dist.DistNetworkError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"the ranks cannot meet at {address}: {str(error).splitlines()[0]}",
            where="MASTER_ADDR, MASTER_PORT",
            mend="the port may be in use by another job: choose another one (RDZV_ENDPOINT=host:port)",
        ) from error
    return World(rank, local_rank, size, device)


def close_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(seconds: int) -> None:
    """Shorten how long a collective may hang, once start-up (which may be slow) is over."""
    # Private in torch 2.11 to 2.13: there is no public way to change a group's timeout.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def sum_over_ranks(*values: int) -> list[int]:
    """Sum integers over all ranks, on the host: costs a gloo round trip and no device synchronisation."""
    totals = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(totals)
    return totals.tolist()


def max_over_ranks(value: int) -> int:
    """The largest of an integer over all ranks, on the host."""
    largest = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
