"""Where a rank's shard of a tensor lies in the whole. The one place that asks DTensor's private utilities.

Checked against torch 2.13: `compute_local_shape_and_global_offset` knows Shard, Replicate and strided shards.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Box:
    """A rectangular region: `offsets[d] <= index[d] < offsets[d] + sizes[d]`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return 0 in self.sizes


def local_box(tensor: Tensor) -> Box:
    """The region of the whole tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offsets), tuple(sizes))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's values: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
