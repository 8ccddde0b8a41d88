"""The mesh: which ranks hold which part of the model and of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """Ranks in row-major order of (dp_replicate, dp_shard).

    Attributes:
        dp_replicate: groups of ranks that hold the same shards.
        dp_shard: ranks over which parameters, gradients and optimizer state are split.
    """

    dp_replicate: int
    dp_shard: int
    device_mesh: DeviceMesh

    @classmethod
    def build(cls, device: torch.device, *, dp_replicate: int, dp_shard: int) -> Mesh:
        """The degrees' product must be the world size; a process group must exist."""
        device_mesh = init_device_mesh(
            device.type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        return cls(dp_replicate, dp_shard, device_mesh)

    @property
    def num_data_ranks(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """Which part of every batch this rank reads."""
        replica, shard = (self.device_mesh.get_local_rank(axis) for axis in ("dp_replicate", "dp_shard"))
        return replica * self.dp_shard + shard

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 shards over: one axis, or (replicate, shard) for HSDP and for plain replication."""
        return self.device_mesh["dp_shard"] if self.dp_replicate == 1 else self.device_mesh

    def describe(self) -> dict[str, int]:
        return {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
