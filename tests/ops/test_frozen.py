"""Formats of frozen weights against torchao and float64; products with them, what they save, and how little at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titanmoe.ops import frozen
from titanmoe.ops.frozen import FrozenGroupedProduct, FrozenLinearProduct, FrozenWeight
from titanmoe.ops.frozen_formats import (
    _NF4_LEVELS,
    MX,
    NF4,
    Float8Block,
    Float8Channel,
    Format,
    column_multiple,
    format_named,
    matrix_shape,
    row_multiple,
)
from titanmoe.ops.grouped_mm import grouped_mm
from titanmoe.ops.quiet_import import import_quietly
from titanmoe.ops.scaled_casts import FP8, dequantize_blocks, quantize_blocks

FORMATS = [Float8Channel(), Float8Block(), MX(), NF4(), NF4(group_rows=8), NF4(block=32, group_rows=2)]
LEAST_DB = {"float8": 31.0, "mx": 29.5, "nf4": 20.0}
COUNTS = {"even": [32, 64, 32], "empty": [0, 37, 0], "odd": [1, 30, 7], "none": [0, 0, 0]}


def _name(format: Any) -> str:
    return format.name if hasattr(format, "name") else str(format)


each_format = pytest.mark.parametrize("format", FORMATS, ids=_name)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def _stored(values: Tensor, format: Format, is_stack: bool = False) -> FrozenWeight:
    """A matrix or a stack of them, each quantised by itself."""
    matrices = [format.quantize(matrix) for matrix in values.flatten(0, -3)] if values.dim() > 2 else []
    parts = zip(*matrices, strict=True) if matrices else [(part,) for part in format.quantize(values)]
    lead = values.shape[:-2]
    return FrozenWeight(format, tuple(torch.stack(part).view(*lead, *part[0].shape) for part in parts), is_stack)


def _db(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.detach(), other.detach()
    return 20 * math.log10(exact.norm() / (exact - other).norm())


@each_format
@pytest.mark.parametrize("sizes", [(96, 320), (130, 192), (1, 64), (384, 128)], ids=str)
def test_comes_back(format: Format, sizes: tuple[int, int]) -> None:
    values = _random(*sizes)
    weight = _stored(values, format)
    assert weight.shape == sizes
    assert [part.dtype for part in weight.parts] == [torch.uint8] * len(format.parts)
    assert [tuple(part.shape) for part in weight.parts] == [part.shape(*sizes) for part in format.parts]
    assert _db(values.double(), weight.dequantize(torch.float32)) > LEAST_DB[format.name[:6].split("-")[0]]
    assert format_named(format.name) == format
    assert matrix_shape(format, weight.parts[0].shape) == sizes


@each_format
def test_zeros_come_back_as_zeros_and_small_values_as_finite_ones(format: Format) -> None:
    values = _random(130, 192)
    values[5] = 0
    values[7, :64] = 0
    values[:, 64:128] = 0
    back = _stored(values, format).dequantize(torch.float32)
    assert torch.equal(back == 0, back * 0 == back) and back.isfinite().all()
    assert (back[values == 0] == 0).all()
    assert (_stored(torch.zeros(8, 64), format).dequantize(torch.float32) == 0).all()
    assert _stored(torch.full((8, 64), 1e-44), format).dequantize(torch.float32).isfinite().all()


@each_format
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(format: Format, value: float) -> None:
    values = _random(8, 128)
    values[3, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        format.quantize(values)


@each_format
def test_quantising_rows_at_a_time_is_quantising_all(format: Format) -> None:
    values = _random(300, 192)
    step, whole = row_multiple(format), format.quantize(values)
    some = [format.quantize(values[start : start + step]) for start in range(0, 300, step)]
    for part, of_some in zip(whole, zip(*some, strict=True), strict=True):
        assert torch.equal(part, torch.cat(of_some))


def test_each_float8_code_is_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[(torch.arange(256) & 127) != 127]
    weight = FrozenWeight(Float8Channel(), (codes[None], torch.tensor([[3.0]]).view(torch.uint8)))
    assert torch.equal(weight.dequantize(torch.float32)[0], codes.view(FP8).float() * 3)


def test_blocks_are_those_of_deepseek_checkpoints() -> None:
    values = _random(576, 200)
    codes, scales = quantize_blocks(values)
    weight = _stored(values, Float8Block())
    assert torch.equal(weight.parts[0].view(FP8).float(), codes.float())
    assert torch.equal(weight.parts[1].view(torch.float32), scales)
    assert torch.equal(weight.dequantize(torch.float32), dequantize_blocks(codes, scales))


def test_mx_is_that_of_torchao() -> None:
    import_quietly("torchao.quantization")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    values = _random(40, 192)
    scales, codes = to_mx(values, FP8, 32, ScaleCalculationMode.RCEIL)
    weight = _stored(values, MX())
    assert torch.equal(weight.parts[0], codes.view(torch.uint8))
    assert torch.equal(weight.parts[1], scales.view(torch.uint8))


def test_nf4_is_that_of_the_paper() -> None:
    """Levels by the formula behind appendix E, as bitsandbytes has it (`create_normal_map`); the nearest is taken."""
    ends = torch.linspace(0.9677083, 0.5, 9, dtype=torch.double), torch.linspace(0.9677083, 0.5, 8, dtype=torch.double)
    above, below = (torch.special.ndtri(probabilities[:-1]) for probabilities in ends)
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.double), above.flip(0)]) / above[0]
    assert (torch.tensor(_NF4_LEVELS, dtype=torch.double) - levels).abs().max() < 1e-6
    values = _random(64, 256)
    blocks = values.view(-1, 64).double()
    scales = blocks.abs().amax(1, keepdim=True)
    codes = (blocks[..., None] / scales[..., None] - levels).abs().argmin(-1).view(64, 256)
    weight = _stored(values, NF4())
    assert torch.equal(weight.parts[0], (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8))
    expected = (levels[codes].view(-1, 64) * scales).view(64, 256)
    torch.testing.assert_close(weight.dequantize(torch.float32).double(), expected, rtol=1e-6, atol=1e-6)


@each_format
def test_noise(format: Format) -> None:
    """In dB, of normal values: the figures of docs/frozen.md."""
    found = _db(_random(512, 1024).double(), _stored(_random(512, 1024), format).dequantize(torch.float32))
    expected = {"float8-channel": 31.5, "float8-block": 31.5, "mx": 31.5, "nf4-64-0": 20.7, "nf4-64-8": 20.6}
    assert found == pytest.approx(expected.get(format.name, 21.2), abs=0.15), found


def test_nf4_is_that_of_torchao() -> None:
    """Codes are equal; levels there have four digits; scales are within one of its steps of theirs."""
    import_quietly("torchao.quantization")
    from torchao.quantization import to_nf4

    values = _random(64, 256) * torch.linspace(0.5, 2, 64)[:, None]
    theirs = to_nf4(values)  # 256 scales: one group, so that both have the same mean
    format = NF4.for_columns(256)
    assert format.group_rows == 64
    weight = _stored(values, format)
    codes = torch.stack([weight.parts[0] >> 4, weight.parts[0] & 15], dim=-1).flatten()
    theirs_codes = torch.stack([theirs.quantized_data >> 4, theirs.quantized_data & 15], dim=-1).flatten()
    assert (codes != theirs_codes).float().mean() < 1e-3  # between two levels
    their_scales = theirs.dequantize_scalers(
        theirs.quantized_scalers, theirs.quantization_factor, theirs.scaler_block_size
    )
    step = 1 / theirs.quantization_factor.item()
    assert (format.scales(weight.parts).flatten() - their_scales).abs().max() < 1.5 * step
    exact = values.abs().unflatten(1, (-1, 64)).amax(-1)
    assert (format.scales(weight.parts) - exact).abs().max() <= (exact - exact.mean()).abs().max() / 127 / 2 * 1.001
    ours, other = (
        _db(values.double(), back) for back in (weight.dequantize(torch.float32), theirs.get_original_weight())
    )
    assert ours > other - 0.05
    assert abs(_db(theirs.get_original_weight().double(), weight.dequantize(torch.float32))) > 35


def test_nf4_takes_about_four_bits() -> None:
    shapes = [part.shape(768, 2048) for part in NF4.for_columns(2048).parts]
    assert 8 * sum(rows * columns for rows, columns in shapes) / (768 * 2048) == 4 + 8 / 64 + 64 / (8 * 2048)


def _exact(x: Tensor, w: Tensor, dy: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    xs, dys, w = x.double().split(counts), dy.double().split(counts), w.double()
    experts = range(len(counts))
    return torch.cat([xs[e] @ w[e].T for e in experts]), torch.cat([dys[e] @ w[e] for e in experts])


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_product(format: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_TILE_NUMEL", {"cpu": 5000})  # several tiles, the last ones partial
    weight = _stored(_random(300, 192), format)
    x, dy, bias = _random(2, 5, 192, seed=1).to(dtype), _random(2, 5, 300, seed=2).to(dtype), _random(300).to(dtype)
    x.requires_grad_()
    y = FrozenLinearProduct()(x, weight, bias)
    y.backward(dy)
    assert x.grad is not None and y.dtype == x.grad.dtype == dtype
    values = weight.dequantize(dtype).double()
    least = 120 if dtype == torch.float32 else 45
    assert _db(x.double() @ values.T + bias.double(), y) > least
    assert _db(dy.double() @ values, x.grad) > least


@each_format
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("tile", [5000, 1 << 22])
def test_grouped_product(format: Format, counts: list[int], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of two matrices of 65 rows, not a multiple of any block; some rows are of no expert."""
    monkeypatch.setattr(frozen, "_TILE_NUMEL", {"cpu": tile})
    weight = _stored(_random(3, 2, 65, 192), format, is_stack=True)
    assert weight.shape == (3, 130, 192)
    num_rows, offsets = sum(counts), torch.tensor(counts).cumsum(0).int()
    x = torch.full((num_rows + 3, 192), math.nan)
    x[:num_rows] = _random(num_rows, 192, seed=1)
    dy = _random(num_rows + 3, 130, seed=2)
    x.requires_grad_()
    y = FrozenGroupedProduct()(x, weight, offsets)
    y.backward(dy)
    assert x.grad is not None
    assert (y[num_rows:] == 0).all() and (x.grad[num_rows:] == 0).all()
    exact_y, exact_dx = _exact(x.detach()[:num_rows], weight.dequantize(torch.float32), dy[:num_rows], counts)
    torch.testing.assert_close(y[:num_rows].double(), exact_y, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad[:num_rows].double(), exact_dx, rtol=1e-4, atol=1e-6)


def _both() -> dict[str, Callable[[Tensor, FrozenWeight], Tensor]]:
    offsets = torch.tensor([4, 4, 8], dtype=torch.int32)
    return {
        "linear": lambda x, w: FrozenLinearProduct()(x, w.experts(0)),
        "grouped": lambda x, w: FrozenGroupedProduct()(x, w, offsets),
    }


@each_format
@pytest.mark.parametrize("kind", _both())
def test_only_parts_are_saved_and_only_what_is_needed_is_computed(format: Format, kind: str) -> None:
    product, weight = _both()[kind], _stored(_random(3, 130, 192), format, is_stack=True)
    x, saved = _random(8, 192, seed=1).requires_grad_(), []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = product(x, weight)
    of_parts = {part.data_ptr() for part in weight.parts}
    assert all(tensor.data_ptr() in of_parts or tensor.dtype == torch.int32 for tensor in saved)
    with _Products() as products:
        y.sum().backward()
    assert products.shapes and all(shape[-1] == 192 for shape in products.shapes)  # dx, and no (N, K)
    assert all(part.grad is None for part in weight.parts)
    frozen_x = x.detach()
    assert not product(frozen_x, weight).requires_grad


class _Products(TorchDispatchMode):
    """Shapes of the results of products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.titanmoe.rows_times_frozen):
            self.shapes.append(result.shape)
        return result


def test_experts_without_rows_are_not_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _stored(_random(3, 64, 128), Float8Channel(), is_stack=True)
    numbers: list[int] = []
    dequantize = Float8Channel.dequantize

    def count(self: Float8Channel, parts: Any, dtype: torch.dtype) -> Tensor:
        numbers.append(parts[0].numel())
        return dequantize(self, parts, dtype)

    monkeypatch.setattr(Float8Channel, "dequantize", count)
    FrozenGroupedProduct()(_random(5, 128), weight, torch.tensor([0, 5, 5], dtype=torch.int32))
    assert numbers == [64 * 128]


@each_format
def test_few_values_are_dequantised_at_once(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the weight: at most a tile, or as many rows or columns as share scales."""
    monkeypatch.setattr(frozen, "_TILE_NUMEL", {"cpu": 1 << 15})
    weight, largest = _stored(_random(2, 2, 256, 256), format, is_stack=True), 0
    dequantize = type(format).dequantize

    def count(self: Any, parts: Any, dtype: torch.dtype) -> Tensor:
        nonlocal largest
        values = dequantize(self, parts, dtype)
        largest = max(largest, values.numel())
        return values

    monkeypatch.setattr(type(format), "dequantize", count)
    x = _random(8, 256).requires_grad_()
    FrozenGroupedProduct()(x, weight, torch.tensor([4, 8], dtype=torch.int32)).sum().backward()
    assert 0 < largest <= max(1 << 15, 256 * row_multiple(format), 512 * column_multiple(format))


@pytest.mark.parametrize("tile", [1 << 28, 3 * 96 * 128])
def test_as_on_a_device(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all experts here are dequantised at once, and where some of them are, equal a plain product."""
    weight = _stored(_random(5, 96, 128), Float8Channel(), is_stack=True)
    offsets = torch.tensor([3, 3, 20, 21, 30], dtype=torch.int32)
    monkeypatch.setattr(frozen, "_waits_for_nothing", lambda device: False)
    monkeypatch.setattr(frozen, "_TILE_NUMEL", {"cpu": tile})
    x = _random(32, 128).bfloat16().requires_grad_()
    y = FrozenGroupedProduct("torch")(x, weight, offsets)
    y.backward(_random(32, 96).bfloat16())
    dx, x.grad = x.grad, None
    expected = grouped_mm(x, weight.dequantize(torch.bfloat16), offsets, kernel="torch")
    expected.backward(_random(32, 96).bfloat16())
    assert torch.equal(y, expected) and dx is not None and x.grad is not None and torch.equal(dx, x.grad)


def test_compiles_in_one_graph() -> None:
    weight = _stored(_random(3, 64, 128), NF4.for_columns(128), is_stack=True)
    offsets = torch.tensor([2, 5, 8], dtype=torch.int32)

    def function(x: Tensor) -> Tensor:
        return (
            FrozenGroupedProduct()(x, weight, offsets).square().sum()
            + FrozenLinearProduct()(x, weight.experts(1)).sum()
        )

    x = _random(8, 128).requires_grad_()
    function(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(function, backend="aot_eager", fullgraph=True)(x).backward()
    assert expected is not None and x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_more_than_two_to_the_31_values() -> None:
    """The last expert of a stack of 2 ** 31 + 2 ** 21 bytes, of which the system gives only what is written."""
    experts, rows, columns = 1025, 1024, 2048
    payload = torch.empty(experts, rows, columns, dtype=torch.uint8)
    scale = torch.empty(experts, rows, 4, dtype=torch.uint8)
    assert payload.numel() > 2**31
    values = _random(rows, columns)
    for part, of_last in zip((payload, scale), Float8Channel().quantize(values), strict=True):
        part[-1] = of_last
    x = _random(4, columns)
    weight = FrozenWeight(Float8Channel(), (payload, scale), is_stack=True)
    offsets = torch.zeros(experts, dtype=torch.int32)
    offsets[-1] = 4
    assert _db(x.double() @ values.double().T, FrozenGroupedProduct()(x, weight, offsets)) > 28


def test_multiplying_in_place_rounds_once() -> None:
    """What devices other than the CPU do with codes: a bfloat16 times a float32 in place is that of both in float32."""
    codes, scale = torch.arange(1, 120, dtype=torch.uint8).view(FP8), _random(119).abs()
    assert torch.equal(codes.bfloat16().mul_(scale), (codes.float() * scale).bfloat16())


@pytest.mark.gpu
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_has_the_values_of_the_cpu(format: Format, dtype: torch.dtype) -> None:
    weight = _stored(_random(3, 130, 192), format, is_stack=True)
    there = FrozenWeight(format, tuple(part.cuda() for part in weight.parts), is_stack=True)
    # The steps of NF4's scales are added in one rounding or in two.
    assert _db(weight.dequantize(dtype).double(), there.dequantize(dtype).cpu().double()) > 60
    x, offsets = _random(24, 192).to(dtype), torch.tensor([8, 8, 24], dtype=torch.int32)
    y = FrozenGroupedProduct()(x.cuda(), there, offsets.cuda())
    least = 100 if dtype == torch.float32 else 40
    assert _db(FrozenGroupedProduct()(x, weight, offsets).double(), y.cpu().double()) > least
