"""From a spec to a model: on the meta device first, then memory, then values."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn as nn
from torch import Tensor

from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.sharding import local_box, local_tensor

_STD = 0.02
_BLOCK_NUMEL = 1 << 22


def build_model(
    spec: DecoderSpec,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    part: Part | None = None,
) -> Decoder:
    """A Decoder, or a part of one, without meaningful values. Everything but float32 buffers has dtype `dtype`."""
    with torch.device("meta"):
        model = Decoder(spec, part)
    for parameter_name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(parameter_name.rpartition(".")[0])
        name = parameter_name.rpartition(".")[2]
        setattr(owner, name, nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad))
    return model if torch.device(device).type == "meta" else materialize(model, device)


def materialize(model: Decoder, device: torch.device | str) -> Decoder:
    """Give a meta model memory on `device`: parameters undefined, buffers zero."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    return model


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Fill every parameter: norms 1, biases and sinks 0, weights normal.

    The standard deviation is 0.02, divided by sqrt(2 L) for the projections that write into the residual stream of L
    layers (Radford et al. 2019, GPT-2). A value depends only on the seed, the parameter's name and its place in the
    parameter, not on how the parameter is sharded: every layout starts from the same model.
    """
    residual_std = _STD / math.sqrt(2 * len(model.spec.layers))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(("bias", "sinks")):
            parameter.zero_()
        else:
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
            _fill_normal(parameter, residual_std if writes_residual else _STD, seed ^ zlib.crc32(name.encode()))


def _fill_normal(parameter: Tensor, std: float, seed: int) -> None:
    """Draw the parameter in blocks of rows, each from its own generator, and keep what belongs to this shard."""
    box, local = local_box(parameter), local_tensor(parameter)
    if box.is_empty:
        return
    row_shape = parameter.shape[1:]
    rows_per_block = max(1, _BLOCK_NUMEL // row_shape.numel())
    first, end = box.offsets[0], box.offsets[0] + box.sizes[0]
    inner = tuple(slice(offset, offset + size) for offset, size in zip(box.offsets[1:], box.sizes[1:], strict=True))
    for block in range(first // rows_per_block, (end - 1) // rows_per_block + 1):
        start = block * rows_per_block
        stop = min(start + rows_per_block, parameter.shape[0])
        generator = torch.Generator(device=local.device).manual_seed(seed * 1_000_003 + block)
        values = torch.empty((stop - start, *row_shape), dtype=torch.float32, device=local.device)
        values.normal_(0.0, std, generator=generator)
        low, high = max(start, first), min(stop, end)
        wanted = (slice(low - start, high - start), *inner)
        local[low - first : high - first].copy_(values[wanted])
