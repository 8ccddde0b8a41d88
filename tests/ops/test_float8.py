"""Values in 8 bits: against torchao's casts, bit for bit, and what they promise at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.float8 import BLOCK, Scaling, dequantize, quantize, rounded, rounded_groups
from titanmoe.ops.quiet_import import import_quietly

E4M3 = torch.float8_e4m3fn
SCALINGS = [Scaling(shared_by, rounding) for shared_by in ("tensor", "row", "block") for rounding in ("up", "down")]
KINDS = {
    "normal": lambda x: x,
    "wide": lambda x: x * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).mul(6).exp(),
    "large": lambda x: (x * 1e38).clamp(-3e38, 3e38),
    "small": lambda x: x * 1e-36,
    "subnormal": lambda x: x * 1e-39,
    "zero": lambda x: x * 0.0,
}


def _values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "normal") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return KINDS[kind](values).to(dtype)


def _bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def _exponents(scales: Tensor) -> Tensor:
    """As MX stores scales."""
    return (scales.view(torch.int32) >> 23).to(torch.uint8)


def _names(scaling: Scaling) -> str:
    return f"{scaling.shared_by}-{scaling.rounding}"


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((96, 64), -1), ((96, 64), -2), ((3, 64, 96), -1), ((3, 64, 96), -2)])
@pytest.mark.parametrize("kind", ["normal", "wide", "large"])
def test_blocks_have_the_codes_and_scales_of_torchao(
    rounding: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int, kind: str
) -> None:
    mx = import_quietly("torchao.prototype.mx_formats.mx_tensor")
    mode = mx.ScaleCalculationMode.RCEIL if rounding == "up" else mx.ScaleCalculationMode.FLOOR
    values = _values(shape, dtype, kind)
    codes, scales = quantize(values, dim, Scaling("block", rounding))
    expected_scales, expected = mx.to_mx(values.transpose(dim, -1).contiguous(), E4M3, BLOCK, mode)
    assert torch.equal(_bits(codes), _bits(expected.transpose(dim, -1)))
    assert torch.equal(_exponents(scales), expected_scales.view(torch.uint8).transpose(dim, -1))


def test_where_blocks_differ_from_torchao() -> None:
    """Blocks of zeros have its codes, but our smallest scale is a normal number. A largest value just beyond the
    largest code is halved, as hardware does; torchao's logarithm rounds it down to the power of two, and cuts it."""
    mx = import_quietly("torchao.prototype.mx_formats.mx_tensor")
    values = torch.zeros(1, 3 * BLOCK)
    values[0, BLOCK] = 448 * 2.0**20 * (1 + 2.0**-22)
    values[0, 2 * BLOCK] = 448 * 2.0**20
    expected_scales, expected = mx.to_mx(values, E4M3, BLOCK, mx.ScaleCalculationMode.RCEIL)
    codes, scales = quantize(values, -1, Scaling("block"))
    assert scales.tolist() == [[2.0**-126, 2.0**21, 2.0**20]]
    assert expected_scales.view(torch.uint8).tolist() == [[0, 127 + 20, 127 + 20]]
    assert codes[0, [0, BLOCK, 2 * BLOCK]].float().tolist() == [0.0, 224.0, 448.0]
    assert expected[0, [0, BLOCK, 2 * BLOCK]].float().tolist() == [0.0, 448.0, 448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("kind", ["normal", "wide"])
@pytest.mark.parametrize("shared_by", ["row", "tensor"])
def test_rows_and_tensors_have_the_codes_of_torchao(shared_by: str, dim: int, dtype: torch.dtype, kind: str) -> None:
    """Its scale is the factor on the way to the codes, ours on the way back."""
    utils = import_quietly("torchao.float8.float8_utils")
    granularity = import_quietly("torchao.float8.config").ScalingGranularity
    values = _values((5, 48, 80), dtype, kind)
    values = values[0] if shared_by == "tensor" else values  # of several, each has its own in no product of ours
    inverse = utils.tensor_to_scale(
        values,
        E4M3,
        scaling_granularity=granularity.AXISWISE if shared_by == "row" else granularity.TENSORWISE,
        axiswise_dim=dim,
        round_scales_to_power_of_2=True,
    )
    codes, scales = quantize(values, dim, Scaling(shared_by))  # type: ignore[arg-type]
    assert torch.equal(_bits(codes), _bits(utils.to_fp8_saturated(values.float() * inverse, E4M3)))
    assert torch.equal(scales, 1 / inverse)


@pytest.mark.parametrize("scaling", SCALINGS, ids=_names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((96, 64), -1), ((96, 64), -2), ((3, 64, 96), -1), ((3, 64, 96), -2)])
def test_rounded_is_quantised_and_back(
    scaling: Scaling, dtype: torch.dtype, shape: tuple[int, ...], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and in many."""
    for piece_numel in (1 << 18, 1 << 10):
        monkeypatch.setattr("titanmoe.ops.float8._PIECE_NUMEL", piece_numel)
        for kind in KINDS:
            values = _values(shape, dtype, kind)
            before = values.clone()
            codes, scales = quantize(values, dim, scaling)
            result = rounded(values, dim, scaling)
            assert result.dtype == dtype and torch.equal(values, before)
            assert torch.equal(result, dequantize(codes, scales, dim, scaling, dtype)), kind
            assert torch.equal(rounded(result, dim, scaling), result), kind


def test_every_code_and_what_is_between_is_rounded_as_by_a_cast() -> None:
    """All codes, the middle between two, and the float32 next to it on either side."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()  # from 0 to 448
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(9e9)), codes])
    values = torch.cat([near, -near])[None]
    assert values.abs().max() == 448
    assert torch.equal(rounded(values, -1, Scaling("row")), values.to(E4M3).float())


@pytest.mark.parametrize("rounding", ["up", "down"])
def test_relative_error_and_largest_values(rounding: str) -> None:
    """A sixteenth at most, but for values that rounding the scale down cuts: an eighth of those in reach, to 7/8."""
    scaling = Scaling("row", rounding)  # type: ignore[arg-type]
    values = torch.linspace(1, 2, 4097)[:-1, None].repeat(1, 16)
    error = (rounded(values, -1, scaling) / values - 1).abs()
    is_cut = (values > 1.75 + 2.0**-4) if rounding == "down" else torch.zeros_like(values, dtype=torch.bool)
    assert error[~is_cut].max() <= 2.0**-4
    if rounding == "down":
        assert torch.equal(rounded(values, -1, scaling)[is_cut].unique(), torch.tensor([1.75]))
        assert error.max() < 1 / 8


def test_scales_of_the_largest_value() -> None:
    """ "up" leaves no code beyond the largest, whatever the value; down is the exponent of the value."""
    next_after = torch.tensor(448.0).nextafter(torch.tensor(999.0)).item()
    ups = {224.0: 0.5, 255.0: 1, 256.0: 1, 448.0: 1, next_after: 2, 449.0: 2, 511.0: 2, 512.0: 2}
    downs = {224.0: 0.5, 255.0: 0.5, 256.0: 1, 448.0: 1, next_after: 1, 449.0: 1, 511.0: 1, 512.0: 2}
    for largest in ups:
        values = torch.zeros(1, 32)
        values[0, 3] = -largest
        for shared_by in ("tensor", "row", "block"):
            for rounding, expected in (("up", ups), ("down", downs)):
                scaling = Scaling(shared_by, rounding)  # type: ignore[arg-type]
                assert quantize(values, -1, scaling)[1].item() == expected[largest], (largest, scaling)


def test_e4m3fnuz() -> None:
    """Its largest code is 240, and its smallest 2 ** -10."""
    scaling = Scaling("block", dtype=torch.float8_e4m3fnuz)
    values = torch.zeros(1, 3 * BLOCK)
    values[0, 0], values[0, 1], values[0, BLOCK], values[0, 2 * BLOCK] = 240.0, 2.0**-10, 241.0, -120.0
    codes, scales = quantize(values, -1, scaling)
    assert scales.tolist() == [[1.0, 2.0, 0.5]]
    assert codes[0, [0, 1, BLOCK, 2 * BLOCK]].float().tolist() == [240.0, 2.0**-10, 120.0, -240.0]
    back = dequantize(codes, scales, -1, scaling, torch.float32)
    assert back[0, [0, 1, BLOCK, 2 * BLOCK]].tolist() == [240.0, 2.0**-10, 240.0, -120.0]
    random = _values((4, 64), kind="wide")
    codes, scales = quantize(random, -1, scaling)
    error = (dequantize(codes, scales, -1, scaling, torch.float32) - random).abs()
    assert (error <= torch.maximum(random.abs() / 16, scales.repeat_interleave(BLOCK, -1) * 2.0**-11)).all()


@pytest.mark.parametrize("scaling", SCALINGS, ids=_names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_shares_a_scale_with_what_is_not_finite_is_not_either(
    scaling: Scaling, dtype: torch.dtype, dim: int, bad: float
) -> None:
    values = _values((64, 96), dtype)
    values[40, 70] = bad
    codes, scales = quantize(values, dim, scaling)
    shares = torch.zeros(64, 96, dtype=torch.bool)
    if scaling.shared_by == "tensor":
        shares[:] = True
    elif dim == -1:
        shares[40, slice(64, 96) if scaling.shared_by == "block" else slice(None)] = True
    else:
        shares[slice(32, 64) if scaling.shared_by == "block" else slice(None), 70] = True
    for result in (rounded(values, dim, scaling), dequantize(codes, scales, dim, scaling, dtype)):
        assert torch.equal(~result.isfinite(), shares)


@pytest.mark.parametrize("scaling", SCALINGS, ids=_names)
def test_zeros_are_zeros(scaling: Scaling) -> None:
    values = torch.zeros(64, 64)
    codes, scales = quantize(values, -1, scaling)
    assert not _bits(codes).any() and (scales > 0).all() and scales.isfinite().all()
    assert not rounded(values, -1, scaling).any()


@pytest.mark.parametrize("dim", [-1, -2])
def test_an_outlier_spoils_what_shares_its_scale_alone(dim: int) -> None:
    values = _values((64, 64))
    clean = {shared_by: rounded(values, dim, Scaling(shared_by)) for shared_by in ("row", "block")}  # type: ignore
    values[5, 7] = 1e9
    changed_by = {}
    for shared_by, expected in clean.items():
        changed = rounded(values, dim, Scaling(shared_by)) != expected  # type: ignore[arg-type]
        changed[5, 7] = False
        changed_by[shared_by] = changed.transpose(dim, -1).nonzero()
    line, place = (5, 7) if dim == -1 else (7, 5)
    for changed in changed_by.values():
        assert changed.shape[0] and (changed[:, 0] == line).all()
    assert (changed_by["block"][:, 1] // BLOCK == place // BLOCK).all()
    assert len(changed_by["row"]) == 63 and len(changed_by["block"]) == 31


def test_the_smallest_values() -> None:
    """Codes of the smallest scale reach far into subnormal numbers; below them is zero."""
    smallest = 2.0**-126 * 2.0**-9
    values = torch.tensor([[smallest, smallest / 2, smallest * 0.75, -(2.0**-126), 0.0]])
    assert rounded(values, -1, Scaling("row")).tolist() == [[smallest, 0.0, smallest, -(2.0**-126), 0.0]]


def test_the_largest_values_may_overflow_as_they_do_in_a_product() -> None:
    """From 248/256 of the range of float32 on, the nearest code is 256 times a scale of 2 ** 120."""
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([[largest], [largest * 0.96], [-largest]])
    expected = [[math.inf], [240 * 2.0**120], [-math.inf]]
    codes, scales = quantize(values, -1, Scaling("row"))
    assert codes.float().tolist() == [[256.0], [240.0], [-256.0]] and (scales == 2.0**120).all()
    assert rounded(values, -1, Scaling("row")).tolist() == expected


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((70, 40), -1), ((70, 40), -2), ((3, 70, 40), -2), ((2, 5), -1)])
def test_a_partial_last_block_is_as_if_filled_with_zeros(
    rounding: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int
) -> None:
    scaling = Scaling("block", rounding)  # type: ignore[arg-type]
    values = _values(shape, dtype, "wide")
    missing = -shape[dim] % BLOCK
    padded = F.pad(values, (0, missing) if dim == -1 else (0, 0, 0, missing))
    result, codes_and_scales = rounded(values, dim, scaling), quantize(padded, dim, scaling)
    expected = dequantize(*codes_and_scales, dim, scaling, dtype).narrow(dim, 0, shape[dim])
    assert result.is_contiguous() and torch.equal(result, expected)


@pytest.mark.parametrize("scaling", SCALINGS, ids=_names)
def test_nothing_and_strided_input(scaling: Scaling) -> None:
    for shape in ((0, 64), (64, 0), (0, 32, 64)):
        for dim in (-1, -2):
            assert rounded(torch.empty(shape), dim, scaling).shape == shape
    assert rounded_groups(torch.empty(0, 64), torch.zeros(3, dtype=torch.int32), scaling).shape == (0, 64)
    values = _values((3, 64, 96)).transpose(-2, -1)[1:]
    expanded = torch.tensor([3.3]).expand(64, 64)
    for strided in (values, values[..., ::2], expanded):
        before = strided.clone()
        for dim in (-1, -2):
            result = rounded(strided, dim, scaling)
            assert result.is_contiguous() and torch.equal(result, rounded(before, dim, scaling))
            codes, scales = quantize(strided, dim, scaling)
            assert torch.equal(dequantize(codes, scales, dim, scaling, torch.float32), result)
        assert torch.equal(strided, before)


@pytest.mark.parametrize("scaling", [it for it in SCALINGS if it.shared_by != "tensor"], ids=_names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(0, 1, 64, 0, 33, 100, 0), (0, 32, 96, 0, 64), (64, 33, 31)], ids=str)
def test_groups_are_rounded_each_by_itself(scaling: Scaling, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    offsets_E = torch.tensor(counts).cumsum(0).int()
    x_RC = _values((sum(counts) + 5, 24), dtype, "wide")
    x_RC[sum(counts) :] = math.nan
    result = rounded_groups(x_RC, offsets_E, scaling)
    assert result.dtype == dtype and not result[sum(counts) :].any()
    for group, expected in zip(x_RC.split([*counts, 5])[:-1], result.split([*counts, 5]), strict=False):
        assert torch.equal(rounded(group, -2, scaling), expected)


def _differs_in_parts(rounding: str, value: float, neighbour: float) -> bool:
    scaling = Scaling("row", rounding)  # type: ignore[arg-type]
    whole = torch.tensor([[value, neighbour]])
    parts = torch.cat([rounded(part, -1, scaling) for part in whole.split(1, dim=-1)], dim=-1)
    return not torch.equal(rounded(whole, -1, scaling), parts)


def test_a_row_in_parts_is_rounded_as_the_whole_is() -> None:
    """Scales rounded up: unless a neighbour is more than 14,336 times larger, and not much more is needed."""
    value = 1 + 2.0**-3 + 2.0**-6
    for mantissa in torch.linspace(1, 2, 513).tolist():
        for factor in (2.0**13, 7 * 2.0**11):
            assert not _differs_in_parts("up", value * mantissa, value * mantissa * factor)
    at_the_limit = [_differs_in_parts("up", 15 / 16, neighbour) for neighbour in (14336.0, 14337.0)]
    assert at_the_limit == [False, True]
    # Rounded down, a value that is cut alone is not beside a larger one.
    assert _differs_in_parts("down", 480.0, 600.0)


@pytest.mark.parametrize("rounding", ["up", "down"])
def test_blocks_in_parts_are_rounded_as_the_whole_is(rounding: str) -> None:
    values, scaling = _values((64, 128), kind="wide"), Scaling("block", rounding)  # type: ignore[arg-type]
    for dim in (-1, -2):
        parts = torch.cat([rounded(part, dim, scaling) for part in values.split(BLOCK, dim)], dim)
        assert torch.equal(rounded(values, dim, scaling), parts)


@pytest.mark.parametrize("scaling", SCALINGS, ids=_names)
def test_compiles_without_a_graph_break(scaling: Scaling) -> None:
    x_RC, offsets_E = _values((70, 64)), torch.tensor([3, 70], dtype=torch.int32)

    def both(x_RC: Tensor) -> tuple[Tensor, Tensor]:
        return rounded(x_RC, -2, scaling), rounded_groups(x_RC, offsets_E, scaling)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for result, expected in zip(compiled(x_RC.t().contiguous().t()), both(x_RC), strict=True):
        assert torch.equal(result, expected)
