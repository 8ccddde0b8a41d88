"""The mesh: which ranks hold which part of the model and of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_REPLICATE, _FSDP, _EXPERT, _CONTEXT = "dp_replicate", "fsdp", "ep", "cp"


@dataclass(frozen=True)
class Mesh:
    """The ranks in row-major order of (dp_replicate, dp_shard, cp), where (dp_shard, cp) together are fsdp.

    For experts, fsdp is (fsdp / ep, ep).

    Attributes:
        dp_replicate: groups of ranks that hold the same shards.
        dp_shard: ranks, or groups of cp ranks, that read different sequences of one replica's.
        cp: neighbouring ranks that each compute a part of the same sequences.
        ep: neighbouring ranks of an fsdp group that each have some of the experts.
    """

    dp_replicate: int
    dp_shard: int
    cp: int
    ep: int
    _dense: DeviceMesh
    _sparse: DeviceMesh
    _sequence: DeviceMesh

    @classmethod
    def build(cls, device: torch.device, *, dp_replicate: int, dp_shard: int, cp: int = 1, ep: int = 1) -> Mesh:
        """dp_replicate * dp_shard * cp must be the world size, ep divide dp_shard * cp; a process group must exist."""
        fsdp = dp_shard * cp
        assert fsdp % ep == 0, "validated"

        def axes(**sizes: int) -> DeviceMesh:
            return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

        dense = sparse = sequence = axes(dp_replicate=dp_replicate, fsdp=fsdp)
        if ep > 1:
            sparse = axes(dp_replicate=dp_replicate, fsdp=fsdp // ep, ep=ep)
        if cp > 1:
            sequence = axes(data=dp_replicate * dp_shard, cp=cp)
        return cls(dp_replicate, dp_shard, cp, ep, dense, sparse, sequence)

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of them, that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_ranks(self) -> int:
        return self.num_data_ranks * self.cp

    @property
    def data_rank(self) -> int:
        """Which sequences of every batch this rank reads."""
        replica, shard = (self._dense.get_local_rank(axis) for axis in (_REPLICATE, _FSDP))
        return replica * self.dp_shard + shard // self.cp

    @property
    def context_rank(self) -> int:
        """Which part of them it computes."""
        return self._dense.get_local_rank(_FSDP) % self.cp

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 shards over: one axis, or (replicate, shard) for HSDP and for plain replication."""
        return self._dense[_FSDP] if self.dp_replicate == 1 else self._dense

    @property
    def fsdp_of_experts(self) -> DeviceMesh:
        """What FSDP2 shards experts over: what `expert` leaves. Only where ep > 1."""
        return self._sparse[_FSDP] if self.dp_replicate == 1 else self._sparse[_REPLICATE, _FSDP]

    @property
    def expert(self) -> DeviceMesh:
        """What experts are dealt over. Only where ep > 1."""
        return self._sparse[_EXPERT]

    @property
    def context(self) -> DeviceMesh:
        """What sequences are cut over. Only where cp > 1."""
        return self._sequence[_CONTEXT]

    def describe(self) -> dict[str, int]:
        """Sizes by name, for people; the ranks of ep are among the others."""
        sizes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
        return sizes | {name: size for name, size in (("cp", self.cp), ("ep", self.ep)) if size > 1}
