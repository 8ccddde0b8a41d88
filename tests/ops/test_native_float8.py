"""FP8 kernels: their casts, bit for bit; their layouts, as torch checks them without a GPU; their numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.native import Operands, needs_capability, poison, random_operands, scaled_grouped_mm
from titanmoe.ops import native_float8
from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling, rounded_groups
from titanmoe.ops.native_float8 import (
    Float8GroupedKernels,
    Float8LinearKernels,
    cast,
    cast_groups,
    cast_transposed,
    check_groups,
    with_empty_groups,
)
from titanmoe.ops.scaled_product import ScaledGroupedProduct, ScaledLinearProduct

ROW, TENSOR = Scaling("row"), Scaling("tensor")
GROUPS = [(0, 16, 48, 0, 32), (16, 16), (0, 0, 96), (0, 0)]
K, N = 48, 80


def cast_all_groups(x: Tensor, offsets: Tensor, compiles: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    def function(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = with_empty_groups(offsets, x.shape[0] // 16)
        return *cast_groups(x, *groups, ROW), groups[-1]

    if compiles:
        function = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
    return function(x, offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", GROUPS)
@pytest.mark.parametrize("compiles", [False, True])
def test_a_cast_of_groups_has_the_bits_of_the_slow_one(
    num_rows: tuple[int, ...], dtype: torch.dtype, compiles: bool
) -> None:
    operands = random_operands(num_rows, K, N, dtype=dtype)
    x, offsets = operands.x, operands.offsets
    x[: sum(num_rows), 3] = 0.0
    codes, scales, ends = cast_all_groups(x, offsets, compiles)
    assert codes.shape == (K, x.shape[0] + 16 * len(num_rows)) and codes.is_contiguous()
    assert (scales.shape, scales.dtype, ends.dtype) == ((len(num_rows), K), torch.float32, torch.int32)
    assert scales.is_contiguous()
    expected = rounded_groups(x, offsets, ROW)
    start = old_start = 0
    for expert, (number, end) in enumerate(zip(num_rows, ends.tolist(), strict=True)):
        assert end - start == (number or 16)
        values = codes[:, start:end].t().float() * scales[expert]
        wanted = expected[old_start : old_start + number].float() if number else torch.zeros(16, K)
        assert torch.equal(values, wanted)
        start, old_start = end, old_start + number
    assert not codes[:, start:].float().any()


def test_a_value_that_is_not_finite_spoils_its_own_column_of_its_own_expert() -> None:
    operands = random_operands((16, 32), K, N)
    operands.x[20, 5], operands.x[30, 6] = torch.inf, torch.nan
    _, scales, _ = cast_all_groups(operands.x, operands.offsets)
    assert scales.isnan().nonzero().tolist() == [[1, 5], [1, 6]]


@pytest.mark.parametrize("scaling", [ROW, TENSOR])
def test_a_cast_can_be_compiled(scaling: Scaling) -> None:
    values = random_operands(24, K, N).w
    for function, transposed in ((cast, values), (cast_transposed, values.t())):
        compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
        for found, expected in zip(compiled(values, scaling), cast(transposed, scaling), strict=True):
            assert found.is_contiguous() and torch.equal(found.float(), expected.float())


def test_a_job_compiles_casts_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles one function eight times, and then silently no more."""
    compiled: list[str] = []

    @functools.cache
    def compile_noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
            compiled.append(function.__name__)
            return graph.forward

        return torch.compile(function, dynamic=True, backend=backend)

    monkeypatch.setattr(native_float8, "_gains", lambda values: True)
    monkeypatch.setattr(native_float8, "_compiled", compile_noted)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    torch._dynamo.reset()
    for num_inputs, num_outputs in ((48, 80), (128, 32)):
        for num_rows in ((16, 32, 0), (0, 16, 64)):
            random_operands(num_rows, num_inputs, num_outputs).computed_by(Float8GroupedKernels(ROW))
        for rows in (32, 1, 37):
            random_operands(rows, num_inputs, num_outputs).computed_by(Float8LinearKernels(TENSOR))
    assert set(compiled) == {"cast", "cast_transposed", "with_empty_groups", "cast_groups"}
    assert max(compiled.count(name) for name in compiled) <= 5, compiled


def on_meta(num_rows: tuple[int, ...], num_inputs: int = K, num_outputs: int = N) -> Operands:
    operands = random_operands(num_rows, num_inputs, num_outputs)
    return Operands(*(tensor.to("meta") for tensor in (operands.x, operands.w, operands.dy)), num_rows)


@pytest.mark.parametrize("num_rows", GROUPS)
def test_torch_takes_the_layouts_of_experts(num_rows: tuple[int, ...]) -> None:
    operands = on_meta(num_rows)
    found = operands.computed_by(Float8GroupedKernels(ROW))
    assert [tuple(tensor.shape) for tensor in vars(found).values()] == [
        (operands.x.shape[0], N),
        tuple(operands.x.shape),
        (len(num_rows), N, K),
    ]


@pytest.mark.parametrize("scaling", [ROW, TENSOR])
def test_torch_takes_the_layouts_of_a_linear_layer(scaling: Scaling) -> None:
    operands = random_operands(37, K, N)
    operands = Operands(*(tensor.to("meta") for tensor in (operands.x, operands.w, operands.dy)))
    found = operands.computed_by(Float8LinearKernels(scaling))
    assert [tuple(tensor.shape) for tensor in vars(found).values()] == [(37, N), (37, K), (N, K)]


@pytest.mark.parametrize("kind", ["experts", "linear layer"])
def test_a_model_that_is_compiled_may_have_them(kind: str) -> None:
    """Forward and backward, without a break in the graph; what runs are torch's checks of layouts."""
    operands = on_meta((16, 0, 48))
    x, w, offsets = operands.x.requires_grad_(), operands.w.requires_grad_(), operands.offsets
    if kind == "experts":
        grouped = ScaledGroupedProduct(Float8GroupedKernels(ROW))
        compiled = torch.compile(lambda x, w: grouped(x, w, offsets), backend="aot_eager", fullgraph=True)
    else:
        w = w.detach()[0].requires_grad_()
        linear = ScaledLinearProduct(Float8LinearKernels(TENSOR))
        compiled = torch.compile(lambda x, w: linear(x, w), backend="aot_eager", fullgraph=True)
    y = compiled(x, w)
    y.backward(torch.empty_like(y))
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and w.grad.shape == w.shape


def test_torch_refuses_other_layouts_of_experts() -> None:
    """What the tests above rely on."""
    kernels = Float8GroupedKernels(ROW)
    square = on_meta((16, 32), 64, 64)
    rows = kernels.quantize_rows(square.x, square.offsets)
    codes, scales = kernels.quantize_weights(square.w, "in")
    kernels.multiply(rows, (codes, scales), "in", square.offsets, 0)
    row_major = codes.transpose(-2, -1).contiguous().transpose(-2, -1)
    with pytest.raises(RuntimeError, match=r"stride|major|transposed"):
        kernels.multiply(rows, (row_major, scales), "in", square.offsets, 0)
    with pytest.raises(RuntimeError, match="scale"):
        kernels.multiply(rows, (codes, scales.flatten(0, 1)), "in", square.offsets, 0)
    with pytest.raises(RuntimeError, match=r"multiple of 16|divisible"):
        on_meta((16, 32), 40, 64).computed_by(kernels)
    wide = on_meta((16, 32))
    weights = kernels.quantize_weights(wide.w, "out")
    with pytest.raises(RuntimeError, match="contraction"):
        kernels.multiply(kernels.quantize_rows(wide.x, wide.offsets), weights, "in", wide.offsets, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", GROUPS)
def test_experts_have_the_numbers_that_are_emulated(
    monkeypatch: pytest.MonkeyPatch, num_rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    operands = random_operands(num_rows, K, N, dtype=dtype)
    found = operands.computed_by(Float8GroupedKernels(ROW))
    expected = operands.computed_by(EmulatedKernels(ROW))
    for name, tensor in vars(found).items():
        wanted = getattr(expected, name)
        assert tensor.dtype == wanted.dtype
        # Both have float32 sums of the same numbers, rounded to bfloat16.
        torch.testing.assert_close(tensor, wanted, rtol=2**-7, atol=1e-4 * float(wanted.abs().max()), msg=name)
    assert not found.y[sum(num_rows) :].any() and not found.dx[sum(num_rows) :].any()
    assert not found.dw[[number == 0 for number in num_rows]].any()


def test_ranks_without_rows_have_products_and_gradients() -> None:
    kernels, offsets = Float8GroupedKernels(ROW), torch.zeros(3, dtype=torch.int32)
    rows, w = torch.empty(0, K, dtype=torch.bfloat16), torch.randn(3, N, K)
    found = kernels.multiply(kernels.quantize_rows(rows, offsets), kernels.quantize_weights(w, "in"), "in", offsets, 0)
    assert found.shape == (0, N)
    gradient = kernels.weight_gradient(torch.empty(0, N, dtype=torch.bfloat16), rows, offsets)
    assert torch.equal(gradient, torch.zeros(3, N, K, dtype=torch.bfloat16))


@pytest.mark.parametrize("scaling", [ROW, TENSOR])
def test_only_the_product_of_a_linear_layer_sums_fast(monkeypatch: pytest.MonkeyPatch, scaling: Scaling) -> None:
    original, fast = torch._scaled_mm, []

    def spy(*args: Any, use_fast_accum: bool, **kwargs: Any) -> Tensor:
        fast.append(use_fast_accum)
        return original(*args, use_fast_accum=use_fast_accum, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    operands = random_operands(32, K, N)
    Operands(*(each.to("meta") for each in (operands.x, operands.w, operands.dy))).computed_by(
        Float8LinearKernels(scaling)
    )
    assert fast == [True, False, False]


@pytest.mark.parametrize("scaling", [ROW, TENSOR])
@pytest.mark.parametrize("rows", [32, 37])
def test_linear_layers_have_the_numbers_that_are_emulated(scaling: Scaling, rows: int) -> None:
    """torch has this kernel on the CPU, too."""
    if scaling is ROW and torch.__version__ < "2.13":
        pytest.skip("torch has no scales for rows on the CPU before 2.13")
    operands = random_operands(rows, K, N)
    found = operands.computed_by(Float8LinearKernels(scaling))
    expected = operands.computed_by(EmulatedKernels(scaling))
    for name, decibels in found.decibels_to(expected).items():
        assert decibels > 45, name  # bfloat16 has 55


def test_a_format_has_its_own_largest_code() -> None:
    """e4m3 of MI300 ends at 240."""
    scaling = replace(ROW, dtype=torch.float8_e4m3fnuz)
    rows = random_operands(32, K, N).x
    codes, scales = Float8GroupedKernels(scaling).quantize_rows(rows, None)
    assert codes.dtype == torch.float8_e4m3fnuz
    assert 120 < codes.float().abs().max() <= 240
    assert ((codes.float() * scales - rows).abs() <= rows.abs() / 16 + scales * 2**-10).all()


def test_groups_that_are_not_padded_are_an_error() -> None:
    check_groups(torch.tensor([0, 16, 48], dtype=torch.int32), 16)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        check_groups(torch.tensor([0, 8, 48], dtype=torch.int32), 16)
    operands = random_operands((24, 40), K, N)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        Float8GroupedKernels(ROW).weight_gradient(operands.dy, operands.x, operands.offsets)


def test_rows_are_padded_only_where_they_are_summed_over() -> None:
    x = torch.empty(0, dtype=torch.float32)
    product = ScaledGroupedProduct(Float8GroupedKernels(ROW))
    unrounded = ScaledGroupedProduct(Float8GroupedKernels(ROW), rounds_weight_gradient=False)
    assert [product.row_multiple(x, trains) for trains in (True, False)] == [16, 1]
    assert unrounded.row_multiple(x, True) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [(304, 0, 128, 1008, 16, 0, 512, 256), (0, 0, 2048, 0), (2048, 0, 0, 0)])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1024, 1536), (2048, 768)])
def test_experts_on_a_gpu(num_rows: tuple[int, ...], num_inputs: int, num_outputs: int) -> None:
    needs_capability((9, 0), (9, 0))
    operands = random_operands(num_rows, num_inputs, num_outputs, "cuda", tail=512)
    expected = operands.exact()
    poison("cuda")
    found = operands.computed_by(Float8GroupedKernels(ROW))
    assert min(found.decibels_to(expected).values()) > 27, found.decibels_to(expected)
    emulated = operands.computed_by(EmulatedKernels(ROW))
    assert min(found.decibels_to(emulated).values()) > 36, found.decibels_to(emulated)
    assert not found.y[sum(num_rows) :].any() and not found.dx[sum(num_rows) :].any()
    assert not found.dw[[number == 0 for number in num_rows]].any()


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", [ROW, TENSOR])
@pytest.mark.parametrize("rows", [2048, 1000])
def test_linear_layers_on_a_gpu(scaling: Scaling, rows: int) -> None:
    needs_capability((8, 9), (12, 9))
    operands = random_operands(rows, 1024, 1536, "cuda")
    expected = operands.exact()
    poison("cuda")
    found = operands.computed_by(Float8LinearKernels(scaling))
    emulated = operands.computed_by(EmulatedKernels(scaling))
    assert min(found.decibels_to(emulated).values()) > 36, found.decibels_to(emulated)
    limit = 27 if scaling is ROW else 25  # of a tensor's values, some are rounded as subnormal codes
    assert min(found.decibels_to(expected).values()) > limit, found.decibels_to(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casts_on_a_gpu_have_the_bits_of_those_on_the_cpu(dtype: torch.dtype) -> None:
    needs_capability((8, 9), (12, 9))
    operands = random_operands((304, 0, 128, 16), 256, 384, dtype=dtype)
    kernels, x = Float8GroupedKernels(ROW), operands.x[:448]
    pairs = [
        (kernels.quantize_rows(x.cuda(), None), cast(x, ROW)),
        (kernels.quantize_weights(operands.w.cuda(), "in"), cast(operands.w, ROW)),
        (kernels.quantize_weights(operands.w.cuda(), "out"), cast(operands.w.transpose(-2, -1), ROW)),
    ]
    for found, expected in pairs:
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu().float(), other.float())
