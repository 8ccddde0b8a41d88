"""Quantised checkpoints as they are published, small and random, with the values that they stand for.

The values are computed here, block by block and number by number, from the codes and scales that are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil, frexp
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.models.build import build_model
from titanmoe.models.family import Family
from titanmoe.models.keys import Rule, map_keys
from titanmoe.models.spec import DecoderSpec

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
FP8_MAX = 448.0


@dataclass
class Checkpoint:
    """What is in the files, and the float32 values of every weight by its (logical) key."""

    files: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def add_plain(self, key: str, values: Tensor) -> None:
        self.files[key] = self.values[key] = values

    def add_fp8(
        self, key: str, values: Tensor, block: Sequence[int], scale_key: str, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        """Quantise (..., rows, columns) by blocks of the last two dims, which may be cut off at the ends."""
        codes, scales, decoded = quantize_fp8(values, block, scale_dtype)
        self.files[key], self.files[scale_key], self.values[key] = codes, scales, decoded

    def add_mxfp4(self, key: str, values: Tensor) -> None:
        """Quantise (..., columns) by 32 columns; `key` is that of the blocks."""
        blocks, scales, decoded = quantize_mxfp4(values)
        scale_key = key.removesuffix("_blocks") + "_scales"
        self.files[key], self.files[scale_key], self.values[key] = blocks, scales, decoded


def quantize_fp8(
    values: Tensor, block: Sequence[int], scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales (..., ceil(rows / block[0]), ceil(columns / block[1])), and what they stand for.

    A scale of dtype uint8 or float8_e8m0fnu is the next power of two.
    """
    *lead, num_rows, num_columns = values.shape
    grid = ceil(num_rows / block[0]), ceil(num_columns / block[1])
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*lead, *grid, dtype=scale_dtype)
    decoded = torch.empty(values.shape)
    for index in product(*(range(size) for size in lead)):
        for row, column in product(range(grid[0]), range(grid[1])):
            tile = (
                *index,
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scale = max(values[tile].abs().max().item() / FP8_MAX, 1e-6)
            if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
                exponent = frexp(scale)[1]
                scale = 2.0**exponent
                byte = torch.tensor(exponent + 127, dtype=torch.uint8)
                scales[(*index, row, column)] = byte.view(scale_dtype)
            else:
                scales[(*index, row, column)] = scale
                scale = scales[(*index, row, column)].float().item()
            codes[tile] = (values[tile] / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            decoded[tile] = codes[tile].float() * torch.tensor(scale)
    return codes, scales, decoded


def quantize_mxfp4(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks (..., G, 16) and scales (..., G) of (..., G * 32), and what they stand for."""
    groups = values.unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).clamp(min=1e-30).log2().floor().int() - 2
    scaled = groups / 2.0 ** exponents[..., None].double()
    nibbles = (scaled[..., None] - torch.tensor(E2M1, dtype=torch.float64)).abs().argmin(-1)
    blocks = (nibbles[..., 0::2] + 16 * nibbles[..., 1::2]).to(torch.uint8)
    decoded = torch.tensor(E2M1, dtype=torch.float64)[nibbles] * 2.0 ** exponents[..., None].double()
    return blocks, (exponents + 127).to(torch.uint8), decoded.flatten(-2).float()


def random_weights(family: Family, spec: DecoderSpec, rules: Sequence[Rule] | None = None) -> dict[str, Tensor]:
    """A random tensor for each that a checkpoint holds, in the family's own layout or in that of `rules`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(build_model(spec, device="meta")).items()}
    layouts = [*([rules] if rules else []), *family.layouts]
    by_file_key, _ = map_keys(layouts, shapes)
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(piece.shape(shapes[name]), generator=generator) * 0.1
        for key, (name, piece) in by_file_key.items()
    }


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shard_of: Callable[[str], int] = lambda key: 0,
) -> Path:
    """Write config.json, shards and their index; `shard_of` gives each key's shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        shards.setdefault(f"model-{shard_of(key):05}.safetensors", {})[key] = tensor.contiguous()
    for name, shard in shards.items():
        save_file(shard, folder / name, {"format": "pt"})
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
