"""The norm of all gradients, exact on any mesh layout, and clipping to it.

`torch.nn.utils.clip_grad_norm_` cannot combine DTensors of different meshes, as experts and the dense parameters are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titanmoe.ops.sharding import local_tensor

# Elements that a CPU converts at a time, so that their float32 copies stay in its cache.
_CPU_BLOCK = 1 << 18


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    pipeline: dist.ProcessGroup | None = None,
    copies: Iterable[nn.Parameter] = (),
) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; return the norm before that.

    The global gradient is that of one process: shards count once each, replicas (HSDP) once altogether. Squares are
    added in float32 or wider, whatever the gradients' dtype; on a CPU in float64, so that every layout rounds to the
    same norm and does not drift from one process by way of the clipping. Parameters without a gradient are allowed, but
    every rank must pass the same parameters in the same order, since each mesh takes part in its own all-reduce; only
    the ranks of a pipeline have different ones.
    Nothing waits for the device. A non-finite norm makes the gradients non-finite, so look at it before the update.

    Args:
        parameters: plain or DTensor parameters, on one device type and any meshes.
        max_norm: the bound; 0, a negative number or infinity only measures.
        pipeline: the ranks that have the other parameters of the model.
        copies: those of the parameters that another rank of the pipeline has too, and counts; they are scaled only.

    Returns:
        The norm, a float32 scalar on the parameters' device, equal on all ranks.
    """
    parameters = list(parameters)
    if not parameters:
        assert pipeline is None, "every stage has parameters"
        return torch.zeros(())
    device = parameters[0].device
    # By what the squares must be summed over: the mesh, and its dims over which the parameter is sharded.
    layouts: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    counted_elsewhere = {id(parameter) for parameter in copies}
    of_copies: list[Tensor] = []
    for parameter in parameters:
        locals_ = layouts.setdefault(_layout(parameter), [])
        if parameter.grad is not None:
            (of_copies if id(parameter) in counted_elsewhere else locals_).append(_local_gradient(parameter))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (mesh, shard_dims), grads in layouts.items():
        square = _sum_of_squares(grads, device)
        for dim in shard_dims:
            assert mesh is not None
            dist.all_reduce(square, group=mesh.get_group(dim))
        total += square
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    norm = total.sqrt().float()

    if 0 < max_norm < float("inf"):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # On a CPU the value is there already: leave the gradients alone if it is 1.
        if device.type != "cpu" or type(factor) is not Tensor or not factor >= 1:
            for grads in filter(None, [*layouts.values(), of_copies]):
                torch._foreach_mul_(grads, factor)
    return norm


def count_nonfinite(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradient holds a NaN or an infinity on this rank.

    Reads every gradient and waits for the device: for the message after a non-finite norm, not for every step.
    """
    grads = [(name, parameter.grad) for name, parameter in named_parameters if parameter.grad is not None]
    return [name for name, grad in grads if not torch.isfinite(local_tensor(grad)).all()]


def _layout(parameter: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    if not isinstance(parameter, DTensor):
        return None, ()
    mesh = parameter.device_mesh
    dims = tuple(dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return mesh, tuple(dim for dim in dims if mesh.size(dim) > 1)


def _local_gradient(parameter: Tensor) -> Tensor:
    """The local shard of the gradient, placed as its parameter is."""
    grad = parameter.grad
    assert grad is not None and isinstance(grad, DTensor) == isinstance(parameter, DTensor)
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
        assert grad.device_mesh == parameter.device_mesh
        if grad.placements != parameter.placements:
            # As for a replicated factor of an adapter whose ranks each saw a slice: its gradient is yet to be summed.
            grad = grad.redistribute(placements=parameter.placements)
            parameter.grad = grad
    return local_tensor(grad)


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """float64 scalar."""
    pieces = [grad for grad in grads if grad.numel()]
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        norms = torch.cat([norm for grad in pieces for norm in _norms_of_rows(grad)])
    else:
        norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32))
    return norms.double().square().sum()


def _norms_of_rows(grad: Tensor) -> list[Tensor]:
    """Norms along the last dim in float32, or of a vector in float64.

    torch adds up a whole tensor on the CPU without a tree: over 16 million elements float32 is wrong by 6e-4, over a
    row by 2e-8. Nor does a row depend on how other dims are sharded, so every layout rounds to the same norm.
    """
    if grad.dim() == 1:
        return [torch.linalg.vector_norm(grad, dtype=torch.float64)[None]]
    rows = grad.reshape(-1, grad.shape[-1])
    blocks = rows.split(max(1, _CPU_BLOCK // rows.shape[1]))
    return [torch.linalg.vector_norm(block.float(), dim=1) for block in blocks]
