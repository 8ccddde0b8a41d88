"""The mesh: which ranks hold which part of the model and of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_REPLICATE, _SHARD, _EXPERT = "dp_replicate", "dp_shard", "ep"
_EXPERT_SHARD = "dp_shard_of_experts"


@dataclass(frozen=True)
class Mesh:
    """The ranks in row-major order of (dp_replicate, dp_shard); for experts, dp_shard is (dp_shard / ep, ep).

    Attributes:
        dp_replicate: groups of ranks that hold the same shards.
        dp_shard: ranks over which parameters, gradients and optimizer state are split.
        ep: neighbouring ranks of a dp_shard group that each have some of the experts; their shards of an expert are
            split over the dp_shard / ep groups of such ranks.
    """

    dp_replicate: int
    dp_shard: int
    ep: int
    _dense: DeviceMesh
    _sparse: DeviceMesh

    @classmethod
    def build(cls, device: torch.device, *, dp_replicate: int, dp_shard: int, ep: int = 1) -> Mesh:
        """dp_replicate * dp_shard must be the world size, and ep divide dp_shard; a process group must exist."""
        assert dp_shard % ep == 0, "validated"
        dense = init_device_mesh(device.type, (dp_replicate, dp_shard), mesh_dim_names=(_REPLICATE, _SHARD))
        sparse = dense
        if ep > 1:
            names = (_REPLICATE, _EXPERT_SHARD, _EXPERT)
            sparse = init_device_mesh(device.type, (dp_replicate, dp_shard // ep, ep), mesh_dim_names=names)
        return cls(dp_replicate, dp_shard, ep, dense, sparse)

    @property
    def num_data_ranks(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """Which part of every batch this rank reads."""
        replica, shard = (self._dense.get_local_rank(axis) for axis in (_REPLICATE, _SHARD))
        return replica * self.dp_shard + shard

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 shards over: one axis, or (replicate, shard) for HSDP and for plain replication."""
        return self._dense[_SHARD] if self.dp_replicate == 1 else self._dense

    @property
    def fsdp_of_experts(self) -> DeviceMesh:
        """What FSDP2 shards experts over: what `expert` leaves. Only where ep > 1."""
        return self._sparse[_EXPERT_SHARD] if self.dp_replicate == 1 else self._sparse[_REPLICATE, _EXPERT_SHARD]

    @property
    def expert(self) -> DeviceMesh:
        """What experts are dealt over. Only where ep > 1."""
        return self._sparse[_EXPERT]

    def describe(self) -> dict[str, int]:
        """Sizes by name, for people; ranks that ep takes are counted in dp_shard already."""
        return {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard} | ({"ep": self.ep} if self.ep > 1 else {})
