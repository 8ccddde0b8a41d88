"""Rows of quantised weights: 8-bit and 4-bit codes, and the scales that multiply them.

A file tensor is seen as a matrix of rows (leading dims flattened). Its scales are a matrix too, whose every entry
belongs to a block of the weight: of 128 x 128 values, of one row (a scale per output channel), of a whole matrix (a
scale per tensor), of 1 x 32 values (MXFP4). A value is `code * scale`, in float32, whatever the scale's name:
`weight_scale_inv` multiplies as well (it is the inverse of what the weight was multiplied with when it was quantised).

Legend: R rows, C columns, S rows of scales, G blocks in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titanmoe.checkpoint.row_source import Files
from titanmoe.checkpoint.safetensors_io import DTYPES, TensorInfo
from titanmoe.config.errors import ConfigError

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class ScaleGrid:
    """Which scale belongs to which value.

    The weight's rows are taken `matrix_rows` at a time: an expert's, or the gate's or up's half of it, or all. Each
    such matrix is tiled by blocks of `block_rows` x `block_columns`, the last of a side being cut off where it ends.
    """

    matrix_rows: int
    block_rows: int
    block_columns: int

    def scale_row(self, row: Tensor) -> Tensor:
        """For rows of the weight (int64), the row of scales that each belongs to."""
        blocks_per_matrix = -(-self.matrix_rows // self.block_rows)
        return row // self.matrix_rows * blocks_per_matrix + row % self.matrix_rows // self.block_rows


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a weight, not yet multiplied.

    Attributes:
        codes_RC: float8_e4m3fn (R, C); or uint8 (R, C / 2), two e2m1 values a byte, the first in the low four bits.
        scales_SG: float32; those that these rows need.
        scale_row_R: int64, each row's row of scales.
        block_columns: a scale belongs to so many values of a row.
    """

    codes_RC: Tensor
    scales_SG: Tensor
    scale_row_R: Tensor
    block_columns: int

    def decode(self) -> Tensor:
        """The values: float32 (R, C)."""
        values_RC = _look_up(self.codes_RC)
        scales_RG = self.scales_SG[self.scale_row_R]
        num_whole, cut_off = divmod(values_RC.shape[1], self.block_columns)
        whole = values_RC[:, : num_whole * self.block_columns].unflatten(1, (num_whole, self.block_columns))
        whole.mul_(scales_RG[:, :num_whole, None])
        if cut_off:
            values_RC[:, -cut_off:].mul_(scales_RG[:, num_whole:])
        return values_RC


def _look_up(codes_RC: Tensor) -> Tensor:
    """What codes stand for before they are scaled: float32 (R, C). A table is several times as fast as a conversion."""
    if codes_RC.dtype == torch.uint8:
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        # Indexed by a byte: first the value of its low four bits, then of its high four.
        table = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    else:
        table = torch.arange(256, dtype=torch.uint8).view(codes_RC.dtype).float()
    indices = codes_RC.view(torch.uint8).reshape(-1).int()
    return table.index_select(0, indices).view(codes_RC.shape[0], -1)


@dataclass(frozen=True)
class QuantizedSource:
    """A tensor of codes with its tensor of scales, which may be in another file.

    Attributes:
        info: the codes.
        shape: of the values.
        scale_info: of dtype F32, BF16, F16; or F8_E8M0 or U8, which are exponents of two, biased by 127.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    scale_info: TensorInfo
    grid: ScaleGrid

    def rows(self, files: Files, first: int, count: int) -> Tensor:
        """`count` rows from row `first` on, decoded: float32 (R, C).

        Raises:
            ConfigError: reading failed; a scale is negative, infinite, or not a number.
        """
        return self.quantized_rows(files, first, count).decode()

    def quantized_rows(self, files: Files, first: int, count: int) -> QuantizedRows:
        """`count` rows from row `first` on, as they are in the file. Raises as `rows`."""
        packed = self.info.dtype == "U8"
        num_bytes = self.shape[-1] // 2 if packed else self.shape[-1]
        codes_RC = torch.empty(count, num_bytes, dtype=DTYPES[self.info.dtype])
        files.read(self.info, first * num_bytes, codes_RC)
        scale_row_R = self.grid.scale_row(torch.arange(first, first + count))
        first_scale, last_scale = (int(scale_row_R[0]), int(scale_row_R[-1])) if count else (0, -1)
        scales_SG = self._scales(files, first_scale, last_scale + 1 - first_scale)
        return QuantizedRows(codes_RC, scales_SG, scale_row_R - first_scale, self.grid.block_columns)

    def _scales(self, files: Files, first: int, count: int) -> Tensor:
        scales_SG = torch.empty(
            count, -(-self.shape[-1] // self.grid.block_columns), dtype=DTYPES[self.scale_info.dtype]
        )
        files.read(self.scale_info, first * scales_SG.shape[1] * scales_SG.element_size(), scales_SG)
        if scales_SG.dtype == torch.uint8:
            scales_SG = scales_SG.view(torch.float8_e8m0fnu)
        scales_SG = scales_SG.float()
        bad = ~(scales_SG.isfinite() & (scales_SG >= 0))
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ConfigError(
                f"a scale is {scales_SG[row, column].item()} (row {first + row}, column {column}, leading dims "
                "flattened); scales are finite and not negative",
                where=f"{self.scale_info.path}: {self.scale_info.key}",
                mend="The checkpoint is damaged: copy or download the file again.",
            )
        return scales_SG
