"""From a spec to a model: on the meta device first, then memory, then values."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from titanmoe.models.adapters import is_adapter
from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.frozen_storage import Stored
from titanmoe.ops.sharding import local_box, local_tensor

_STD = 0.02
_BLOCK_NUMEL = 1 << 22

Draw = Callable[[Tensor, torch.Generator], object]


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
    """Fill every parameter: norms 1, biases and sinks 0, weights normal; adapters as `init_adapters` does.

    The standard deviation is 0.02, divided by sqrt(2 L) for the projections that write into the residual stream of L
    layers (Radford et al. 2019, GPT-2). A value depends only on the seed, the parameter's name and its place in the
    parameter, not on how the parameter is sharded: every layout starts from the same model. Weights that are stored in
    another form are what these values become in it.
    """
    residual_std = _STD / math.sqrt(2 * len(model.spec.layers))

    def normal(name: str) -> Draw:
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
        return partial(_draw_normal, residual_std if writes_residual else _STD)

    parts: set[str] = set()
    for path, module in model.named_modules():
        for stored in getattr(module, "stored", {}).values():
            name = f"{path}.{stored.name}"
            _fill_stored(module, stored, _seed_of(name, seed), normal(name))
            parts.update(f"{path}.{part}" for part in stored.part_names)
    for name, parameter in model.named_parameters():
        if is_adapter(name) or name in parts:
            continue
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(("bias", "sinks")):
            parameter.zero_()
        else:
            _fill(parameter, _seed_of(name, seed), normal(name))
    init_adapters(model, seed)


@torch.no_grad()
def init_adapters(model: Decoder, seed: int) -> None:
    """Fill A and B as their module's `adapter_init` says, and magnitudes with NaN: they are norms of weights
    (`init_magnitudes`), once these are there. B A is zero, bit for bit in any product.

    "kaiming" and "gaussian" are PEFT's: A is uniform up to 1 / sqrt(inputs) (He et al., arXiv 1502.01852), or normal
    with standard deviation 1 / rank, and B is zero. "orthogonal" is PEFT's but for a rotation of the ranks, so that
    nothing is rounded: A is normal in even ranks, B in odd ones, with standard deviation 0.1, and zero elsewhere.
    As in `init_weights`, every layout starts from the same values.
    """
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            continue
        init, is_a = model.get_submodule(name.rpartition(".")[0]).adapter_init, name.endswith("lora_a")
        if name.endswith("magnitude"):
            parameter.fill_(math.nan)
        elif init != "orthogonal" and not is_a:
            parameter.zero_()
        elif init == "kaiming":
            _fill(parameter, _seed_of(name, seed), partial(_draw_uniform, parameter.shape[-1] ** -0.5))
        else:
            std = 1 / parameter.shape[-2] if init == "gaussian" else 0.1
            _fill(parameter, _seed_of(name, seed), partial(_draw_normal, std))
        if init == "orthogonal" and not name.endswith("magnitude"):
            dim = parameter.dim() - (2 if is_a else 1)
            first = (local_box(parameter).offsets[dim] + is_a) % 2
            local_tensor(parameter).movedim(dim, 0)[first::2] = 0.0


def _draw_normal(std: float, values: Tensor, generator: torch.Generator) -> None:
    values.normal_(0.0, std, generator=generator)


def _draw_uniform(most: float, values: Tensor, generator: torch.Generator) -> None:
    values.uniform_(-most, most, generator=generator)


def _seed_of(name: str, seed: int) -> int:
    return seed ^ zlib.crc32(name.encode())


def _fill(parameter: Tensor, seed: int, draw: Draw) -> None:
    """Draw the parameter in blocks of rows, each from its own generator, and keep what belongs to this shard."""
    box, local = local_box(parameter), local_tensor(parameter)
    if box.is_empty:
        return
    first, end = box.offsets[0], box.offsets[0] + box.sizes[0]
    inner = tuple(slice(offset, offset + size) for offset, size in zip(box.offsets[1:], box.sizes[1:], strict=True))
    rows_per_block = _rows_per_block(parameter.shape)
    for block in range(first // rows_per_block, (end - 1) // rows_per_block + 1):
        start = block * rows_per_block
        values = _draw_block(parameter.shape, block, seed, draw, local.device)
        low, high = max(start, first), min(start + values.shape[0], end)
        wanted = (slice(low - start, high - start), *inner)
        local[low - first : high - first].copy_(values[wanted])


def _fill_stored(module: nn.Module, stored: Stored, seed: int, draw: Draw) -> None:
    """The same for a weight in another form."""
    device = local_tensor(stored.parameters(module)[0]).device
    rows_per_block, drawn, values = _rows_per_block(stored.shape), -1, torch.empty(0)
    for matrix, rows in stored.pieces(module):
        first, end = (matrix[0], matrix[0] + 1) if matrix else (rows.start, rows.stop)
        some = []
        for block in range(first // rows_per_block, (end - 1) // rows_per_block + 1):
            if block != drawn:
                drawn, values = block, _draw_block(stored.shape, block, seed, draw, device)
            start = block * rows_per_block
            some.append(values[max(first - start, 0) : end - start])
        wanted = torch.cat(some)
        stored.fill(module, matrix, rows.start, wanted[0][matrix[1:]][rows] if matrix else wanted)


def _rows_per_block(shape: Sequence[int]) -> int:
    return max(1, _BLOCK_NUMEL // math.prod(shape[1:]))


def _draw_block(shape: Sequence[int], block: int, seed: int, draw: Draw, device: torch.device) -> Tensor:
    start = block * _rows_per_block(shape)
    num_rows = min(_rows_per_block(shape), shape[0] - start)
    values = torch.empty((num_rows, *shape[1:]), dtype=torch.float32, device=device)
    draw(values, torch.Generator(device=device).manual_seed(seed * 1_000_003 + block))
    return values
