"""Where the parts of a frozen weight are: parameters of its module, each perhaps sharded, cut wherever it may be.

Values come into them some rows of a matrix at a time, as float32, and are quantised on the way; every process keeps
what it has a place for. A cut may go through what shares a scale: whoever has a part of it is given all of it.

Shape suffixes: R rows, C columns of a matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titanmoe.ops.frozen import FrozenWeight
from titanmoe.ops.frozen_formats import Format, row_multiple
from titanmoe.ops.sharding import local_box, local_tensor

_NUMEL_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Stored:
    """A weight of a module as its parts, which are parameters of it.

    Attributes:
        name: that the weight has had, or would have: "weight", "gate_up".
        format: of its parts.
        shape: of the whole weight, in all processes: (..., R, C).
        is_stack: whether dim 0 is that of experts.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    is_stack: bool

    @property
    def part_names(self) -> list[str]:
        return [f"{self.name}_{part.suffix}" for part in self.format.parts]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        sizes = (math.prod(part.shape(*self.shape[-2:])) for part in self.format.parts)
        return math.prod(self.shape[:-2]) * sum(sizes)

    def add_to(self, module: nn.Module, device: torch.device) -> None:
        """Give the module the parameters, in the place of the weight."""
        setattr(module, self.name, None)
        for name, part in zip(self.part_names, self.format.parts, strict=True):
            empty = torch.empty(*self.shape[:-2], *part.shape(*self.shape[-2:]), dtype=torch.uint8, device=device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def parameters(self, module: nn.Module) -> list[Tensor]:
        return [getattr(module, name) for name in self.part_names]

    def read(self, module: nn.Module) -> FrozenWeight:
        """What this process has of the weight."""
        return FrozenWeight(self.format, tuple(map(local_tensor, self.parameters(module))), self.is_stack)

    def pieces(self, module: nn.Module) -> Iterator[tuple[tuple[int, ...], slice]]:
        """(matrix, rows) of what is to be written here, about 2 ** 17 values at a time.

        Matrices are leading indices, and rows those of the whole matrix: none of them shares a scale with others.
        """
        num_rows, num_columns = self.shape[-2:]
        boxes = [
            (local_box(parameter), part.rows)
            for parameter, part in zip(self.parameters(module), self.format.parts, strict=True)
        ]
        boxes = [(box, rows) for box, rows in boxes if not box.is_empty]
        if not boxes:
            return
        multiple = row_multiple(self.format)
        step = max(1, _NUMEL_AT_ONCE // (num_columns * multiple)) * multiple
        first = min(box.offsets[-2] * rows for box, rows in boxes) // multiple * multiple
        last = max((box.offsets[-2] + box.sizes[-2]) * rows for box, rows in boxes)
        last = min(-(-last // multiple) * multiple, num_rows)
        lead = [
            range(min(box.offsets[dim] for box, _ in boxes), max(box.offsets[dim] + box.sizes[dim] for box, _ in boxes))
            for dim in range(len(self.shape) - 2)
        ]
        for matrix in itertools.product(*lead):
            for start in range(first, last, step):
                yield matrix, slice(start, min(start + step, last))

    def fill(self, module: nn.Module, matrix: tuple[int, ...], first_row: int, values_RC: Tensor) -> None:
        """Quantise rows as `pieces` has them, float32, of whole length.

        Raises:
            ValueError: some are not finite.
        """
        self.put(module, matrix, first_row, self.format.quantize(values_RC))

    def put(self, module: nn.Module, matrix: tuple[int, ...], first_row: int, parts: Sequence[Tensor]) -> None:
        """Write the parts of such rows."""
        for parameter, kind, part in zip(self.parameters(module), self.format.parts, parts, strict=True):
            _put(parameter.detach(), matrix, first_row // kind.rows, part)


def _put(parameter: Tensor, matrix: tuple[int, ...], first_row: int, part_RC: Tensor) -> None:
    box, local = local_box(parameter), local_tensor(parameter)
    at = [index - begin for index, begin in zip(matrix, box.offsets, strict=False)]
    if not all(0 <= index < size for index, size in zip(at, box.sizes, strict=False)):
        return
    begin, end = box.offsets[-2], box.offsets[-2] + box.sizes[-2]
    low, high = max(first_row, begin), min(first_row + part_RC.shape[0], end)
    if low < high:
        columns = slice(box.offsets[-1], box.offsets[-1] + box.sizes[-1])
        local[tuple(at)][low - begin : high - begin].copy_(part_RC[low - first_row : high - first_row, columns])
