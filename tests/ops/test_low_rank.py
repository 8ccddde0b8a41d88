"""LoRA and DoRA beside their dense formulas in float64: outputs, and gradients of inputs and of all that is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops import frozen
from titanmoe.ops.frozen import FrozenGroupedProduct, FrozenLinearProduct, FrozenWeight
from titanmoe.ops.frozen_formats import NF4, Float8Channel, Format
from titanmoe.ops.grouped_mm import PlainGroupedProduct, grouped_mm
from titanmoe.ops.low_rank import (
    Adapted,
    LowRankGroupedProduct,
    LowRankLinearProduct,
    linear_low_rank,
    scale_outputs,
)
from titanmoe.ops.low_rank_rows import add_low_rank, low_rank_gradients

_SCALE = 0.7
_OFFSETS = [5, 5, 12, 13]  # of 4 experts, one without rows; rows 13 and 14 are no one's
_EXPERT_OF_ROW = [0] * 5 + [2] * 7 + [3]


def _frozen(values: Tensor, format: Format) -> FrozenWeight:
    """A matrix, or a stack of them, each quantised by itself."""
    if values.dim() == 2:
        return FrozenWeight(format, format.quantize(values.float()))
    parts = zip(*(format.quantize(matrix.float()) for matrix in values), strict=True)
    return FrozenWeight(format, tuple(torch.stack(part) for part in parts), is_stack=True)


def _tensors(*stack: int, dtype: torch.dtype = torch.float64, rank: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (15, 10) if stack else (2, 5, 10), "w": (*stack, 6, 10)}
    shapes |= {"a": (*stack, rank, 10), "b": (*stack, 6, rank), "magnitude": (*stack, 6), "bias": (6,)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: tensor.to(dtype).requires_grad_(name != "w") for name, tensor in tensors.items()}


def _dense(tensors: dict[str, Tensor], has_magnitude: bool, scale: float = _SCALE) -> Tensor:
    """W + scale B A; with its rows scaled to the magnitudes. The norm is a constant to autograd."""
    whole = tensors["w"] + scale * tensors["b"] @ tensors["a"]
    if not has_magnitude:
        return whole
    return (tensors["magnitude"] / whole.detach().norm(dim=-1))[..., None] * whole


def _compare(
    actual: Tensor, expected: Tensor, tensors: dict[str, Tensor], names: list[str], **tolerance: float
) -> None:
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((actual * weights).sum(), [tensors[name] for name in names])
    wanted = torch.autograd.grad((expected * weights).sum(), [tensors[name] for name in names])
    torch.testing.assert_close(actual, expected, **tolerance)
    for name, one, other in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"gradient of {name}: {text}", **tolerance)


@pytest.mark.parametrize("has_magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["plain", "frozen"])
def test_a_linear_layer_is_the_dense_formula(has_magnitude: bool, is_frozen: bool) -> None:
    tensors = _tensors()
    weight = _frozen(tensors["w"], Float8Channel()) if is_frozen else tensors["w"]
    if isinstance(weight, FrozenWeight):
        tensors["w"] = weight.dequantize(torch.float64)
    expected = F.linear(tensors["x"], _dense(tensors, has_magnitude), tensors["bias"])
    product = LowRankLinearProduct(FrozenLinearProduct() if is_frozen else F.linear, _SCALE)
    adapted = Adapted(weight, tensors["a"], tensors["b"], tensors["magnitude"] if has_magnitude else None)
    actual = product(tensors["x"], adapted, tensors["bias"])
    # The norms of what is stored in few bits are summed up in float32.
    exact = dict(rtol=1e-6, atol=1e-6) if is_frozen else dict(rtol=1e-12, atol=1e-12)
    _compare(actual, expected, tensors, ["x", "a", "b", "bias", *["magnitude"][: int(has_magnitude)]], **exact)


@pytest.mark.parametrize("has_magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["plain", "frozen"])
def test_experts_are_the_dense_formula(has_magnitude: bool, is_frozen: bool) -> None:
    tensors = _tensors(4)
    weight = _frozen(tensors["w"], Float8Channel()) if is_frozen else tensors["w"]
    if isinstance(weight, FrozenWeight):
        tensors["w"] = weight.dequantize(torch.float64)
    dense = _dense(tensors, has_magnitude)
    rows = [dense[expert] @ x for expert, x in zip(_EXPERT_OF_ROW, tensors["x"], strict=False)]
    expected = torch.cat([torch.stack(rows), torch.zeros(2, 6, dtype=torch.float64)])
    product = LowRankGroupedProduct(FrozenGroupedProduct() if is_frozen else PlainGroupedProduct(), _SCALE)
    adapted = Adapted(weight, tensors["a"], tensors["b"], tensors["magnitude"] if has_magnitude else None)
    actual = product(tensors["x"], adapted, torch.tensor(_OFFSETS, dtype=torch.int32))
    exact = dict(rtol=1e-6, atol=1e-6) if is_frozen else dict(rtol=1e-12, atol=1e-12)
    _compare(actual, expected, tensors, ["x", "a", "b", *["magnitude"][: int(has_magnitude)]], **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_addition_of_zero_changes_no_bit(dtype: torch.dtype) -> None:
    """With magnitudes as they are at first, too, though they come rounded as the rest."""
    for stack, offsets in (((), None), ((4,), torch.tensor(_OFFSETS, dtype=torch.int32))):
        tensors = _tensors(*stack, dtype=dtype)
        x, w = tensors["x"], tensors["w"]
        norms = torch.linalg.vector_norm(w, dim=-1, dtype=torch.float32).to(dtype)
        adapted = Adapted(w, tensors["a"], torch.zeros_like(tensors["b"]), norms)
        if offsets is None:
            actual, expected = LowRankLinearProduct(F.linear, _SCALE)(x, adapted), F.linear(x, w)
        else:
            actual = LowRankGroupedProduct(PlainGroupedProduct(), _SCALE)(x, adapted, offsets)
            expected = grouped_mm(x, w, offsets)
        assert torch.equal(actual, expected)


def test_a_rank_that_a_grouped_kernel_does_not_take_is_filled_up() -> None:
    """`F.grouped_mm` wants multiples of 8 in bfloat16, and a last dim of 10 and outputs of 6 are none, either."""
    torch.manual_seed(0)
    x, w = torch.randn(15, 16).bfloat16(), torch.randn(4, 8, 16).bfloat16()
    a, b = torch.randn(4, 3, 16).bfloat16().requires_grad_(), torch.randn(4, 8, 3).bfloat16().requires_grad_()
    offsets = torch.tensor([3, 5, 12, 13], dtype=torch.int32)
    results = []
    for kernel in ("torch", "loop"):
        y = LowRankGroupedProduct(PlainGroupedProduct("loop"), _SCALE, kernel)(x, Adapted(w, a, b), offsets)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (a, b))))
    assert results[0][1].shape == a.shape
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.detach().abs().max()))


def test_dropout_is_of_what_the_addition_sees() -> None:
    tensors = _tensors()
    x = torch.ones_like(tensors["x"])
    adapted = Adapted(tensors["w"], tensors["a"], tensors["b"], dropout=0.5)
    torch.manual_seed(1)
    actual = LowRankLinearProduct(F.linear, _SCALE)(x, adapted)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    assert 0 < (dropped == 0).double().mean() < 1
    addition = _SCALE * dropped @ tensors["a"].T @ tensors["b"].T
    torch.testing.assert_close(actual, F.linear(x, tensors["w"]) + addition, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", ["plain", "frozen"])
@pytest.mark.parametrize("is_stack", [False, True], ids=["linear", "experts"])
def test_bytes_that_are_saved_for_backward_are_of_inputs_and_what_is_narrow(base: str, is_stack: bool) -> None:
    """x, x A^T, and parameters as they are stored; nothing that has all outputs of a row, and no dequantised weight."""
    num_rows, num_inputs, num_outputs, rank = 64, 64, 40, 4
    x = torch.randn(num_rows, num_inputs, requires_grad=True)
    offsets = torch.tensor([20, 64], dtype=torch.int32)
    stack = (2,) if is_stack else ()
    values = torch.randn(*stack, num_outputs, num_inputs)
    w = values if base == "plain" else _frozen(values, NF4())
    a, b = torch.randn(*stack, rank, num_inputs), torch.randn(*stack, num_outputs, rank)
    adapted = Adapted(w, a.requires_grad_(), b.requires_grad_())
    parameters = [a, b, *([w] if isinstance(w, Tensor) else w.parts)]
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if is_stack:
            experts = PlainGroupedProduct() if base == "plain" else FrozenGroupedProduct()
            y = LowRankGroupedProduct(experts, _SCALE)(x, adapted, offsets)
        else:
            y = LowRankLinearProduct(F.linear if base == "plain" else FrozenLinearProduct(), _SCALE)(x, adapted)
    assert y.shape == (num_rows, num_outputs)
    for tensor in (*parameters, offsets):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) == x.element_size() * num_rows * (num_inputs + rank)


@pytest.mark.parametrize("is_stack", [False, True], ids=["linear", "experts"])
def test_norms_of_a_frozen_weight_take_one_pass_over_it(is_stack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value is dequantised once, few at a time."""
    monkeypatch.setitem(frozen._TILE_NUMEL, "cpu", 256)
    values = torch.randn(*((3,) if is_stack else ()), 24, 64)
    weight = _frozen(values, Float8Channel())
    at_a_time: list[int] = []
    dequantize = Float8Channel.dequantize

    def noted(format: Float8Channel, *args: object) -> Tensor:
        found = dequantize(format, *args)  # type: ignore[arg-type]
        at_a_time.append(found.numel())
        return found

    monkeypatch.setattr(Float8Channel, "dequantize", noted)
    product = LowRankGroupedProduct(FrozenGroupedProduct(), _SCALE) if is_stack else None
    norms = (product or LowRankLinearProduct(FrozenLinearProduct(), _SCALE)).base_norms(Adapted(weight, values, values))
    assert sum(at_a_time) == values.numel() and max(at_a_time) <= 256
    torch.testing.assert_close(norms, weight.dequantize(torch.float32).norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("has_base", [True, False], ids=["one operation", "added to a base"])
def test_blocks_of_rows_are_what_experts_are(
    dtype: torch.dtype, has_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where every expert's rows are multiples of 32, beside the loop over experts; 9 rows are no one's."""
    torch.manual_seed(0)
    offsets = torch.tensor([32, 32, 128, 192, 192], dtype=torch.int32)
    x, dy = (torch.randn(201, columns, dtype=dtype) for columns in (48, 40))
    w, a, b = (
        torch.randn(5, 40, 48, dtype=dtype),
        torch.randn(5, 3, 48, dtype=dtype),
        torch.randn(5, 40, 3, dtype=dtype),
    )
    wanted = [tensor.requires_grad_() for tensor in (x, a, b)]
    x.data[192:] = 0
    results = []
    for block_rows, at_once in ((32, 64), (32, 4), (1 << 20, 64)):  # the last divides no number of rows
        monkeypatch.setattr("titanmoe.ops.low_rank_rows._BLOCK_ROWS", block_rows)
        monkeypatch.setattr("titanmoe.ops.low_rank_rows._BLOCKS_AT_ONCE", at_once)
        adapted = Adapted(w, a, b, dropout=0.0 if has_base else 1e-9)
        y = LowRankGroupedProduct(PlainGroupedProduct(), _SCALE)(x, adapted, offsets)
        results.append((y, *torch.autograd.grad(y, wanted, dy)))
    *by_blocks, by_experts = results
    for found in by_blocks:
        assert not found[0][192:].any() and not found[1][192:].any()
        for one, other in zip(found, by_experts, strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 2e-2 * float(other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 2, 8, 9])
@pytest.mark.parametrize("has_base", [True, False], ids=["one operation", "added to a base"])
def test_experts_in_float32_beside_float64(rank: int, has_base: bool) -> None:
    """The few columns of x A^T and of its gradient may lie one after the other in memory."""
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = _tensors(4, dtype=dtype, rank=rank)
        wanted = [tensors[name] for name in ("x", "a", "b")]
        adapted = Adapted(tensors["w"], tensors["a"], tensors["b"], dropout=0.0 if has_base else 1e-9)
        offsets = torch.tensor(_OFFSETS, dtype=torch.int32)
        y = LowRankGroupedProduct(PlainGroupedProduct(), _SCALE)(tensors["x"], adapted, offsets)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_compiler_is_told_of_results_is_true(dtype: torch.dtype) -> None:
    """Shapes and strides, of rows in order and of many ranks."""
    for rank in (2, 16):
        t = {name: tensor.detach() for name, tensor in _tensors(4, dtype=dtype, rank=rank).items()}
        rows, offsets = (t["x"], None, t["a"]), torch.tensor(_OFFSETS, dtype=torch.int32)
        b, given = t["b"].mT.contiguous(), torch.ones(15, rank, dtype=dtype)
        checks: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (add_low_rank, (*rows, b, None, t["w"], offsets, 0), {"kernel_name": "auto"}),
            (add_low_rank, (*rows, None, None, t["w"], offsets, 0), {"kernel_name": "auto"}),
            (add_low_rank, (t["x"], given, None, b, None, t["w"], offsets, 0), {"kernel_name": "auto"}),
            (linear_low_rank, (t["x"], t["w"][0].t(), t["a"][0], b[0]), {}),
        ]
        dy = torch.ones(15, 6, dtype=dtype)
        for wants_h in (True, False):
            gradients = (dy, None, t["x"], given, t["a"], b, t["w"], offsets, 0, (True, wants_h, True, True))
            checks.append((low_rank_gradients, gradients, {"kernel_name": "auto"}))
        for op, args, names in checks:
            torch.library.opcheck(op, args, names, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "counts", [[17, 0, 64, 111], [192, 0, 0, 0], [0, 0, 0, 0]], ids=["uneven", "one owner", "none"]
)
@pytest.mark.parametrize("rank", [3, 8, 16])
@pytest.mark.parametrize("sizes", [(64, 128), (128, 64), (40, 24)], ids=str)
@pytest.mark.parametrize("base", ["plain", "frozen"])
def test_experts_on_a_gpu_beside_float64(counts: list[int], rank: int, sizes: tuple[int, int], base: str) -> None:
    """bfloat16; 8 rows of a tail are of no expert, and what is in them must not matter."""
    torch.manual_seed(0)
    num_inputs, num_outputs = sizes
    offsets = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_rows = sum(counts)
    shapes = ((num_rows + 8, num_inputs), (num_rows + 8, num_outputs), (4, num_outputs, num_inputs))
    shapes += ((4, rank, num_inputs), (4, num_outputs, rank))
    x, dy, w, a, b = (torch.randn(shape).bfloat16() / shape[-1] ** 0.5 for shape in shapes)
    x[num_rows:], dy[num_rows:] = 0, 0
    weight = w.cuda() if base == "plain" else _frozen(w, Float8Channel())
    if isinstance(weight, FrozenWeight):
        w = weight.dequantize(torch.float64)
        weight = FrozenWeight(weight.format, tuple(part.cuda() for part in weight.parts), is_stack=True)
    leaves = [tensor.cuda().requires_grad_() for tensor in (x, a, b)]
    product = LowRankGroupedProduct(PlainGroupedProduct() if base == "plain" else FrozenGroupedProduct(), _SCALE)
    y = product(leaves[0], Adapted(weight, *leaves[1:]), offsets.cuda())
    found = (y, *torch.autograd.grad(y, leaves, dy.cuda()))
    exact = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    dense = w.double() + _SCALE * exact[2] @ exact[1]
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    expected = F.pad((dense[experts] @ exact[0][:num_rows, :, None]).squeeze(-1), (0, 0, 0, 8))
    for one, other in zip(found, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-2, atol=2e-2 * float(other.detach().abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [3, 16])
def test_a_linear_layer_on_a_gpu_beside_float64(rank: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, 33, 64), (40, 64), (rank, 64), (40, rank))
    x, w, a, b = (torch.randn(shape).bfloat16() / shape[-1] ** 0.5 for shape in shapes)
    leaves = [tensor.cuda().requires_grad_() for tensor in (x, a, b)]
    y = LowRankLinearProduct(F.linear, _SCALE)(leaves[0], Adapted(w.cuda(), *leaves[1:]))
    exact = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    expected = F.linear(exact[0], w.double() + _SCALE * exact[2] @ exact[1])
    dy = torch.randn_like(expected).bfloat16()
    found = (y, *torch.autograd.grad(y, leaves, dy.cuda()))
    for one, other in zip(found, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-2, atol=2e-2 * float(other.detach().abs().max()))


def test_outputs_are_scaled_alike_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop over experts, as on the CPU, and by indices."""
    results = []
    offsets = torch.tensor(_OFFSETS, dtype=torch.int32)
    for is_loop in (True, False):
        monkeypatch.setattr("titanmoe.ops.low_rank.works_in_blocks", lambda _, is_loop=is_loop: is_loop)
        torch.manual_seed(0)
        y, gain = torch.randn(15, 6).requires_grad_(), torch.randn(4, 6).requires_grad_()
        with torch.no_grad():
            y[13:] = 0
        weights = torch.randn(15, 6)
        weights[13:] = 0
        out = scale_outputs(y, gain, offsets)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (y, gain))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
