"""What a folder in Hugging Face layout will hold: the file tensors of a model, their dtypes, and their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from titanmoe.config.errors import ConfigError
from titanmoe.models.family import Family
from titanmoe.models.keys import Piece, map_keys, pieces_of
from titanmoe.ops.scaled_casts import BLOCK_SIZE, FP8

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_BESIDE_FP8 = torch.bfloat16
_QUANTIZED_ENDINGS = ("_proj.weight", ".experts.gate_up", ".experts.down")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One file tensor to write: the slice of parameter `name` that `piece` says, and its scales if `dtype` is FP8."""

    key: str
    name: str
    piece: Piece
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def scale_key(self) -> str:
        return f"{self.key}_scale_inv"

    @property
    def tensors(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Key, dtype and shape of what it puts into a file."""
        weight = [(self.key, self.dtype, self.shape)]
        if self.dtype != FP8:
            return weight
        return [*weight, (self.scale_key, torch.float32, tuple(-(-size // BLOCK_SIZE) for size in self.shape))]

    @property
    def num_bytes(self) -> int:
        return sum(prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors)

    def row_blocks(self, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Its values, out of the whole parameter: (first row, rows) for some rows (slices along dim 0) at a time.

        Rows that the parameter holds in this order are views; others are copied. A block is at most 1 MiB of float32,
        or one slice of the parameter if that is more; for FP8, it begins with a block of scales.
        """
        unmerged = self.piece.in_file_order(whole[self.piece.at])
        rows_per_slice = self.shape[0] // unmerged.shape[0]
        step = BLOCK_SIZE if self.dtype == FP8 else 1
        at_once = max(1, _BYTES_AT_ONCE * unmerged.shape[0] // (4 * prod(self.shape) * step)) * step
        for begin in range(0, unmerged.shape[0], at_once):
            part = unmerged[begin : begin + at_once]
            yield begin * rows_per_slice, part.reshape(part.shape[0] * rows_per_slice, *self.shape[1:])


def entries_of(tensors: Mapping[str, Tensor], family: Family, dtype: torch.dtype | None) -> list[Entry]:
    """Everything to write, in the model's order.

    Args:
        dtype: of the parameters; None leaves them as they are. FP8 is for the linears of attention, feed-forwards and
            experts (blocks of 128 x 128 with scales); the other parameters then become bfloat16. Buffers keep theirs.

    Raises:
        ConfigError: a dtype that is not written, or FP8 for a family whose files have no such form.
    """
    dtypes = {name: _written_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    for name, written in dtypes.items():
        if written not in (*_PLAIN_DTYPES, FP8):
            raise ConfigError(
                f"cannot be written as {written}",
                where=name,
                mend="Choose float32, bfloat16, float16 or float8_e4m3fn.",
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    by_file_key, _ = map_keys([family.rules], shapes)
    entries = [
        Entry(key, name, piece, dtypes[name], piece.shape(shapes[name])) for key, (name, piece) in by_file_key.items()
    ]
    for entry in entries:
        if entry.dtype == FP8 and (entry.piece.axes is not None or len(entry.shape) != 2):
            raise ConfigError(
                f"files of family {family.name!r} hold {entry.key} stacked or transposed, and no format with FP8 "
                "blocks is known for that",
                mend="Choose bfloat16 or float32.",
            )
    return entries


def _written_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not isinstance(tensor, nn.Parameter):
        return tensor.dtype
    if dtype == FP8:
        return FP8 if name.endswith(_QUANTIZED_ENDINGS) else _DTYPE_BESIDE_FP8
    return dtype


def split_into_shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """The entries of each file, of at most `max_bytes` or of one entry."""
    shards: list[list[Entry]] = [[]]
    num_bytes = 0
    for entry in entries:
        if shards[-1] and num_bytes + entry.num_bytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(entry)
        num_bytes += entry.num_bytes
    return shards


def config_entries(tensors: Mapping[str, Tensor], family: Family, entries: Sequence[Entry]) -> dict[str, Any]:
    """The `quantization_config` of what is written, if it needs one, under that key."""
    if all(entry.dtype != FP8 for entry in entries):
        return {}
    plain = [entry.key for entry in entries if entry.dtype != FP8 and len(entry.shape) == 2]
    if _OUTPUT not in tensors:
        # A tied output is in no file, but is a linear that readers must leave alone.
        plain += [piece.file_key for piece in pieces_of(family.rules, _OUTPUT, tensors[_EMBEDDING].shape)]
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
        "modules_to_not_convert": [key.removesuffix(".weight") for key in plain],
    }
    return {"quantization_config": quantization}


def main_dtype_name(entries: Iterable[Entry]) -> str:
    """The dtype of most of the bytes, as config.json names it; beside FP8, that of the other parameters."""
    num_bytes: Counter[torch.dtype] = Counter()
    for entry in entries:
        num_bytes[_DTYPE_BESIDE_FP8 if entry.dtype == FP8 else entry.dtype] += entry.num_bytes
    return str(num_bytes.most_common(1)[0][0]).removeprefix("torch.")
