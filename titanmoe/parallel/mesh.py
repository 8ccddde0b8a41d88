"""The mesh: which ranks hold which part of the model and of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanmoe.config.sizes import Degrees

PIPELINE, REPLICATE, FSDP, TENSOR = "pp", "dp_replicate", "fsdp", "tp"
EXPERT, EXPERT_TENSOR = "ep", "etp"
CONTEXT, _PARTS, _OTHERS = "cp", "parts", "others"
"""Names of axes, as the DTensors of parameters have them."""


@dataclass(frozen=True)
class Mesh:
    """The ranks in row-major order of (pp, dp_replicate, dp_shard, cp, tp), and this rank's place.

    They are seen in several ways, each of which has only the axes that are longer than 1, and always fsdp:

    - most parameters: (pp, dp_replicate, fsdp, tp), where fsdp is dp_shard x cp;
    - experts: (pp, dp_replicate, fsdp, ep, etp), where the last three are dp_shard x cp x tp;
    - parts of sequences: cp x tp ranks have those of the same sequences.
    """

    degrees: Degrees
    _dense: DeviceMesh
    _sparse: DeviceMesh
    _context: DeviceMesh | None
    _parts: DeviceMesh | None

    @classmethod
    def build(cls, device: torch.device, degrees: Degrees) -> Mesh:
        """The process group must have as many ranks as `degrees`; every rank must call this."""
        sizes, fsdp = degrees, degrees.dp_shard * degrees.cp
        assert dist.get_world_size() == sizes.num_ranks and fsdp * sizes.tp % (sizes.ep * sizes.etp) == 0, "validated"
        outer = {PIPELINE: sizes.pp, REPLICATE: sizes.dp_replicate}
        dense = sparse = _axes(device, outer | {FSDP: fsdp, TENSOR: sizes.tp})
        if sizes.shards_experts_apart:
            fsdp_of_experts = fsdp * sizes.tp // (sizes.ep * sizes.etp)
            sparse = _axes(device, outer | {FSDP: fsdp_of_experts, EXPERT: sizes.ep, EXPERT_TENSOR: sizes.etp})
        num_parts = sizes.cp * sizes.tp
        others = {_OTHERS: sizes.num_ranks // num_parts}
        context = _axes(device, others | {CONTEXT: sizes.cp, TENSOR: sizes.tp}) if sizes.cp > 1 else None
        parts = _axes(device, others | {_PARTS: num_parts}) if num_parts > 1 else None
        return cls(sizes, dense, sparse, context, parts)

    @property
    def num_ranks(self) -> int:
        return self.degrees.num_ranks

    @property
    def data_rank(self) -> int:
        """Which sequences of every batch this rank reads; all stages and tensor ranks of a group read the same."""
        replica, shard = self._place(REPLICATE), self._place(FSDP)
        return replica * self.degrees.dp_shard + shard // self.degrees.cp

    @property
    def context_rank(self) -> int:
        """Which part of them it is given."""
        return self._place(FSDP) % self.degrees.cp

    @property
    def pipeline_rank(self) -> int:
        return self._place(PIPELINE)

    @property
    def counts_data(self) -> bool:
        """Whether what this rank reads counts, where a sum over all ranks is to count everything once."""
        return self._place(PIPELINE) == 0 and self._place(TENSOR) == 0

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 shards over: one axis, or (replicate, shard) for HSDP and for plain replication."""
        return _slice(self._dense, REPLICATE, FSDP)

    @property
    def fsdp_of_experts(self) -> DeviceMesh:
        """What FSDP2 shards experts over: what `expert` leaves. Only where `degrees.shards_experts_apart`."""
        return _slice(self._sparse, REPLICATE, FSDP)

    @property
    def tensor(self) -> DeviceMesh:
        """What layers are split over. Only where tp > 1."""
        return self._dense[TENSOR]

    @property
    def expert(self) -> DeviceMesh:
        """What experts are dealt over (ep), and what each of them is split over (etp). Only where one is > 1."""
        return _slice(self._sparse, EXPERT, EXPERT_TENSOR)

    @property
    def context(self) -> DeviceMesh:
        """What attention's sequences are cut over. Only where cp > 1."""
        assert self._context is not None
        return self._context[CONTEXT]

    @property
    def parts(self) -> DeviceMesh:
        """The ranks that each have a part of the same sequences between the layers. Only where cp or tp > 1."""
        assert self._parts is not None
        return self._parts[_PARTS]

    @property
    def pipeline(self) -> DeviceMesh:
        """What layers are dealt over. Only where pp > 1."""
        return self._dense[PIPELINE]

    def describe(self) -> dict[str, int]:
        """Sizes by name, for people; the ranks of ep are among the others."""
        always = ("dp_replicate", "dp_shard")
        return {name: size for name, size in self.degrees.named().items() if size > 1 or name in always}

    def _place(self, axis: str) -> int:
        assert self._dense.mesh_dim_names is not None
        return self._dense.get_local_rank(axis) if axis in self._dense.mesh_dim_names else 0


def _axes(device: torch.device, sizes: Mapping[str, int]) -> DeviceMesh:
    """A mesh of all ranks, without the axes of size 1: each group costs time to set up."""
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == FSDP}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _slice(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """Those of the axes that the mesh has."""
    assert mesh.mesh_dim_names is not None
    return mesh[tuple(axis for axis in axes if axis in mesh.mesh_dim_names)]
