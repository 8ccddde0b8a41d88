"""FP8 blocks: quantised as a slow reference does it, within half a step, whatever the sizes and magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titanmoe.ops.scaled_casts import FP8, block_scales, dequantize_blocks, expand_scales, quantize_blocks

SIZES = [(128, 128), (256, 384), (576, 200), (1, 1), (127, 129), (300, 5)]


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Values whose magnitude differs a lot from block to block and within a block."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp2()
    return values * (torch.arange(rows)[:, None] // 50 - 3.0).exp2() * (torch.arange(columns) // 70 - 2.0).exp2()


# Every number that e4m3 has, from its definition: 4 bits of exponent with bias 7, 3 of mantissa, no infinities.
E4M3 = torch.tensor(
    [0.0]
    + [mantissa / 8 * 2.0**-6 for mantissa in range(1, 8)]
    + [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)][:-1]
)


def reference(values: Tensor) -> tuple[Tensor, Tensor]:
    """(values after the round trip, scales), block by block, by search for the nearest number."""
    result = torch.empty_like(values)
    scales = torch.empty(-(-values.shape[0] // 128), -(-values.shape[1] // 128))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            at = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            block = values[at]
            scale = block.abs().max() / 448
            scales[row, column] = scale
            nearest = E4M3[(block.abs().flatten()[:, None] / scale - E4M3).abs().argmin(1)].view_as(block)
            result[at] = nearest * block.sign() * scale
    return result, scales


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_the_reference_says(size: tuple[int, int]) -> None:
    values = random(*size)
    codes, scales = quantize_blocks(values)
    expected, expected_scales = reference(values)
    assert (codes.dtype, scales.dtype) == (FP8, torch.float32)
    assert codes.shape == values.shape
    assert torch.equal(scales, expected_scales)
    found = dequantize_blocks(codes, scales)
    # Of two numbers equally near, either will do.
    tie = (found - values).abs() == (expected - values).abs()
    assert ((found == expected) | tie).all()
    assert ((found - values).abs() <= torch.maximum(values.abs() / 16, expand_scales(scales, *size) / 1024)).all()


def test_the_scale_multiplies_and_the_error_is_that_of_three_bits() -> None:
    values = random(256, 256)
    codes, scales = quantize_blocks(values)
    error = (codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1) - values).norm() / values.norm()
    assert 0.01 < error < 0.05
    assert codes.float().abs().max() == 448


def test_a_value_already_in_the_format_comes_back() -> None:
    values = dequantize_blocks(*quantize_blocks(random(300, 260)))
    assert torch.equal(dequantize_blocks(*quantize_blocks(values)), values)


def test_zero_blocks_have_scale_one() -> None:
    values = random(256, 130)
    values[128:, :128] = 0.0
    codes, scales = quantize_blocks(values)
    assert scales[1, 0] == 1.0 and (scales[0] != 1.0).all()
    assert (codes[128:, :128].float() == 0).all()


@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 1e-36, 1.0, 3e38])
def test_the_largest_and_smallest_numbers(magnitude: float) -> None:
    values = torch.tensor([[magnitude, -magnitude / 3, 0.0]])
    codes, scales = quantize_blocks(values)
    assert codes.float().isfinite().all()
    found = dequantize_blocks(codes, scales)
    assert ((found - values).abs() <= torch.maximum(values.abs() / 16, scales / 1024)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_scale(bad: float) -> None:
    values = random(130, 130)
    values[129, 129] = bad
    finite = block_scales(values).isfinite()
    assert finite.tolist() == [[True, True], [True, False]]


def test_bfloat16_is_quantised_as_its_float32_values() -> None:
    values = random(200, 140).bfloat16()
    for ours, expected in zip(quantize_blocks(values), quantize_blocks(values.float()), strict=True):
        assert torch.equal(ours.float(), expected.float())


def test_other_block_sizes_are_read() -> None:
    codes, scales = random(5, 7).to(FP8), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = dequantize_blocks(codes, scales, (2, 4))
    for row in range(5):
        for column in range(7):
            assert found[row, column] == codes[row, column].float() * scales[row // 2, column // 4]
