"""Products with frozen weights that are stored in few bits.

A weight is dequantised for a product, a piece at a time, and the pieces are freed after it: neither they nor the
operands of a gradient of the weight are saved for the backward pass, which dequantises once more. There is no gradient
of the weight. Where `FrozenKernels` multiply what is stored as it is (see `frozen_native`), nothing is dequantised.

Shape suffixes: R rows (sorted by expert), E experts, N outputs, K inputs, H outputs of one matrix, C an operand's
columns; `...` any leading shape. FLOPs: 2 R N K forward and as many for the gradient of x. Bytes: the weight's few in
each, and what is dequantised of it written and read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from titanmoe.ops.frozen_formats import Format, column_multiple, format_named, matrix_shape, row_multiple
from titanmoe.ops.grouped_mm import Kernel, PlainGroupedProduct, rows_times_weights
from titanmoe.ops.partial_backward import wants_gradient

_TILE_NUMEL = {"cpu": 1 << 22}
_DEVICE_TILE_NUMEL = 1 << 29
"""Values that are dequantised at a time: 8 MiB in bfloat16 on the CPU, near to its caches; 1 GiB on accelerators,
a small part of their memory, and enough for all experts of a layer of Qwen3-30B-A3B at once."""


@dataclass(frozen=True)
class FrozenWeight:
    """A weight as `read` gives it to a product: the parts that are in this process.

    Attributes:
        format: of the parts.
        parts: uint8 (..., rows, bytes), of matrices (..., H, K).
        is_stack: whether dim 0 is that of experts.
    """

    format: Format
    parts: tuple[Tensor, ...]
    is_stack: bool = False

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(..., H, K); of experts' gate and up (E, 2, H, K)."""
        return matrix_shape(self.format, self.parts[0].shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K), as of the weight that a product wants."""
        sizes = self.matrix_shape
        stack = sizes[:1] if self.is_stack else ()
        return *stack, math.prod(sizes[len(stack) : -1]), sizes[-1]

    @property
    def numel(self) -> int:
        return math.prod(self.matrix_shape)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def experts(self, which: int | slice) -> FrozenWeight:
        """Of a stack: one of the weights, (N, K), or some of them, (E, N, K)."""
        parts = tuple(part[which] for part in self.parts)
        return FrozenWeight(self.format, parts, is_stack=isinstance(which, slice))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, of the shape of `shape`. Large: see `row_tiles` and `experts` for less of them."""
        values = self.format.dequantize(self.parts, dtype)
        return values.flatten(1, -2) if self.is_stack else values.flatten(0, -2)

    def row_tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows of N, their values) of one weight (N, K), a bounded number of values at a time."""
        assert not self.is_stack
        *lead, num_rows, num_columns = self.matrix_shape
        limit = tile_numel(self.device)
        if self.numel <= limit:
            yield slice(0, self.shape[0]), self.dequantize(dtype)
            return
        multiple = row_multiple(self.format)
        step = max(1, limit // (num_columns * multiple)) * multiple
        matrices = [part.flatten(0, -3) if lead else part[None] for part in self.parts]
        for matrix in range(math.prod(lead)):
            for start in range(0, num_rows, step):
                rows = slice(start, min(start + step, num_rows))
                kinds = zip(self.format.parts, matrices, strict=True)
                cut = [part[matrix, kind.row_slice(rows)] for kind, part in kinds]
                first = matrix * num_rows
                yield slice(first + rows.start, first + rows.stop), self.format.dequantize(cut, dtype)

    def column_tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(columns of K, their values (N, columns)), likewise."""
        assert not self.is_stack
        num_outputs, num_columns = self.shape
        multiple = column_multiple(self.format)
        step = max(1, tile_numel(self.device) // (num_outputs * multiple)) * multiple
        for start in range(0, num_columns, step):
            columns = slice(start, min(start + step, num_columns))
            kinds = zip(self.format.parts, self.parts, strict=True)
            cut = [part[..., kind.column_slice(columns)].contiguous() for kind, part in kinds]
            yield columns, self.format.dequantize(cut, dtype).flatten(0, -2)


def tile_numel(device: torch.device) -> int:
    """How many values are dequantised at a time."""
    return _TILE_NUMEL.get(device.type, _DEVICE_TILE_NUMEL)


Parts = Sequence[Tensor]
"""Of a `FrozenWeight`."""


class FrozenKernels(Protocol):
    """What multiplies with the parts of a weight as they are stored. Without offsets there is one weight (N, K).

    Attributes:
        name: for people.
        feature_multiple: what K and N must be multiples of.
    """

    name: str
    feature_multiple: int

    def product(self, x_RK: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        """y (R, N), in bfloat16 or in the dtype of x. See `grouped_mm` for offsets and `num_rows`."""

    def input_gradient(self, dy_RN: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        """dx (R, K), likewise."""


class FrozenLinearProduct:
    """In the place of `F.linear`, for a `FrozenWeight`.

    Args:
        kernels: what multiplies; None if the weight is to be dequantised.
    """

    def __init__(self, kernels: FrozenKernels | None = None) -> None:
        self.kernels = kernels

    def __call__(self, x: Tensor, w: FrozenWeight, bias_N: Tensor | None = None) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        y_TN = _FrozenProduct.apply(x_TK, None, 0, "auto", self.kernels, w.format.name, *_three(w.parts))
        y = y_TN.view(*x.shape[:-1], y_TN.shape[-1])
        return y if bias_N is None else y + bias_N.to(y.dtype)


class FrozenGroupedProduct:
    """In the place of a `PlainGroupedProduct`, whose kernel still multiplies what is dequantised.

    On the CPU, experts without rows are not dequantised. On other devices there is no wait for the offsets if all
    experts here are dequantised at once, which depends on their size; else there is one.
    """

    def __init__(self, plain_kernel: Kernel = "auto", kernels: FrozenKernels | None = None) -> None:
        self.plain = PlainGroupedProduct(plain_kernel)
        self.kernels = kernels

    def __call__(self, x_RK: Tensor, w: FrozenWeight, offsets_E: Tensor, num_rows: int = 0) -> Tensor:
        return _FrozenProduct.apply(
            x_RK, offsets_E, num_rows, self.plain.kernel, self.kernels, w.format.name, *_three(w.parts)
        )

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        return self.plain.row_multiple(x, False)


class _FrozenProduct(torch.autograd.Function):
    """What it saves is offsets and the parts, which are parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        offsets_E: Tensor | None,
        num_rows: int,
        plain_kernel: Kernel,
        kernels: FrozenKernels | None,
        format_name: str,
        payload: Tensor,
        scale: Tensor,
        group: Tensor | None,  # not *parts: of two, torch.compile takes the context for an argument too many
    ) -> Tensor:
        ctx.save_for_backward(offsets_E, payload, scale, group)
        ctx.settings = (num_rows, plain_kernel, kernels, format_name)
        return _product(x_RK, (payload, scale, group), offsets_E, *ctx.settings, transpose=True)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        offsets_E, *parts = ctx.saved_tensors
        dx_RK = None
        if wants_gradient(ctx, 0):
            dx_RK = _product(dy_RN, parts, offsets_E, *ctx.settings, transpose=False)
        return dx_RK, *[None] * 8


def _three(parts: Parts) -> tuple[Tensor | None, ...]:
    """As many as any format has."""
    return (*parts, None, None, None)[:3]


def _product(
    x_RC: Tensor,
    all_parts: Sequence[Tensor | None],
    offsets_E: Tensor | None,
    num_rows: int,
    plain_kernel: Kernel,
    kernels: FrozenKernels | None,
    format_name: str,
    *,
    transpose: bool,
) -> Tensor:
    x_RC, parts = x_RC.contiguous(), [part for part in all_parts if part is not None]
    if kernels is None:
        return rows_times_frozen(
            x_RC, parts, offsets_E, num_rows, format_name, transpose=transpose, kernel_name=plain_kernel
        )
    y_RC = (kernels.product if transpose else kernels.input_gradient)(x_RC, parts, offsets_E, num_rows)
    # Under torch.compile of torch 2.11, gradients through a cast that changes nothing are zero.
    return y_RC if y_RC.dtype == x_RC.dtype else y_RC.to(x_RC.dtype)


@torch.library.custom_op("titanmoe::rows_times_frozen", mutates_args=())
def rows_times_frozen(
    x_RC: Tensor,
    parts: Sequence[Tensor],
    offsets_E: Tensor | None,
    num_rows: int,
    format_name: str,
    *,
    transpose: bool,
    kernel_name: str = "auto",
) -> Tensor:
    """x @ w.T if `transpose`, else x @ w; with offsets, of each expert's rows with its weight. See `grouped_mm`."""
    w = FrozenWeight(format_named(format_name), tuple(parts), offsets_E is not None)
    by_expert = _waits_for_nothing(x_RC.device)
    if offsets_E is not None and not by_expert and w.numel <= tile_numel(w.device):
        weights_ENK = w.dequantize(x_RC.dtype)
        return rows_times_weights(x_RC, weights_ENK, offsets_E, num_rows, transpose=transpose, kernel_name=kernel_name)
    y_RC = x_RC.new_empty(x_RC.shape[0], w.shape[-2 if transpose else -1])
    if offsets_E is None:
        _multiply(x_RC, w, transpose, y_RC)
        return y_RC
    at_once = 1 if by_expert else max(1, tile_numel(w.device) // math.prod(w.shape[1:]))
    ends = [0, *offsets_E.tolist()]
    for first in range(0, len(ends) - 1, at_once):
        last = min(first + at_once, len(ends) - 1)
        rows = slice(ends[first], ends[last])
        if rows.start == rows.stop:
            continue
        if at_once == 1:
            _multiply(x_RC[rows], w.experts(first), transpose, y_RC[rows])
        else:
            weights_ENK = w.experts(slice(first, last)).dequantize(x_RC.dtype)
            y_RC[rows] = rows_times_weights(
                x_RC[rows],
                weights_ENK,
                offsets_E[first:last] - rows.start,
                rows.stop - rows.start,
                transpose=transpose,
                kernel_name=kernel_name,
            )
    y_RC[ends[-1] :].zero_()
    return y_RC


@rows_times_frozen.register_fake
def _(
    x_RC: Any, parts: Any, offsets_E: Any, num_rows: int, format_name: str, *, transpose: bool, **names: Any
) -> Tensor:
    w = FrozenWeight(format_named(format_name), tuple(parts), offsets_E is not None)
    return x_RC.new_empty(x_RC.shape[0], w.shape[-2 if transpose else -1])


def _waits_for_nothing(device: torch.device) -> bool:
    """Whether offsets are in the host's memory, so that it costs nothing to go from expert to expert."""
    return device.type == "cpu"


def _multiply(x_RC: Tensor, w: FrozenWeight, transpose: bool, out_RC: Tensor) -> None:
    """Tiles are along what is not summed over, so that no sum is of several products."""
    if transpose:
        for rows, w_NK in w.row_tiles(x_RC.dtype):
            torch.mm(x_RC, w_NK.t(), out=out_RC[:, rows])
    else:
        for columns, w_NK in w.column_tiles(x_RC.dtype):
            torch.mm(x_RC, w_NK, out=out_RC[:, columns])
