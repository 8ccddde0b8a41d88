"""LoRA and DoRA beside their dense formulas in float64: outputs, and gradients of inputs and of all that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.grouped_mm import PlainGroupedProduct, grouped_mm
from titanmoe.ops.low_rank import Adapted, LowRankGroupedProduct, LowRankLinearProduct, scale_outputs

_SCALE = 0.7
_OFFSETS = [5, 5, 12, 13]  # of 4 experts, one without rows; rows 13 and 14 are no one's
_EXPERT_OF_ROW = [0] * 5 + [2] * 7 + [3]


@dataclass(frozen=True)
class Hidden:
    """A weight of which only a product can be had."""

    values: Tensor


def _hidden_linear(x: Tensor, w: Hidden, bias: Tensor | None) -> Tensor:
    return F.linear(x, w.values, bias)


class _HiddenGrouped(PlainGroupedProduct):
    def __call__(self, x: Tensor, w: Any, offsets_E: Tensor, num_rows: int = 0) -> Tensor:
        return grouped_mm(x, w.values, offsets_E, num_rows)

    def row_multiple(self, x: Tensor, trains: bool) -> int:
        return 4


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
@pytest.mark.parametrize("is_hidden", [False, True], ids=["plain", "hidden"])
def test_a_linear_layer_is_the_dense_formula(has_magnitude: bool, is_hidden: bool) -> None:
    tensors = _tensors()
    expected = F.linear(tensors["x"], _dense(tensors, has_magnitude), tensors["bias"])
    product = LowRankLinearProduct(_hidden_linear if is_hidden else F.linear, _SCALE)
    weight = Hidden(tensors["w"]) if is_hidden else tensors["w"]
    adapted = Adapted(weight, tensors["a"], tensors["b"], tensors["magnitude"] if has_magnitude else None)
    actual = product(tensors["x"], adapted, tensors["bias"])
    # What a product says of a weight is summed up in float32.
    exact = dict(rtol=1e-6, atol=1e-6) if is_hidden else dict(rtol=1e-12, atol=1e-12)
    _compare(actual, expected, tensors, ["x", "a", "b", "bias", *["magnitude"][: int(has_magnitude)]], **exact)


@pytest.mark.parametrize("has_magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("is_hidden", [False, True], ids=["plain", "hidden"])
def test_experts_are_the_dense_formula(has_magnitude: bool, is_hidden: bool) -> None:
    tensors = _tensors(4)
    dense = _dense(tensors, has_magnitude)
    rows = [dense[expert] @ x for expert, x in zip(_EXPERT_OF_ROW, tensors["x"], strict=False)]
    expected = torch.cat([torch.stack(rows), torch.zeros(2, 6, dtype=torch.float64)])
    product = LowRankGroupedProduct(_HiddenGrouped() if is_hidden else PlainGroupedProduct(), _SCALE)
    weight = Hidden(tensors["w"]) if is_hidden else tensors["w"]
    adapted = Adapted(weight, tensors["a"], tensors["b"], tensors["magnitude"] if has_magnitude else None)
    actual = product(tensors["x"], adapted, torch.tensor(_OFFSETS, dtype=torch.int32))
    exact = dict(rtol=1e-6, atol=1e-6) if is_hidden else dict(rtol=1e-12, atol=1e-12)
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


def test_nothing_is_saved_for_backward_but_inputs_and_what_is_narrow() -> None:
    """Of a frozen weight: x, x A^T, and views of parameters; nothing that has all outputs of a row."""
    num_rows, num_inputs, num_outputs, rank = 64, 48, 40, 4
    x = torch.randn(num_rows, num_inputs, requires_grad=True)
    offsets = torch.tensor([20, 64], dtype=torch.int32)
    for is_stack in (False, True):
        stack = (2,) if is_stack else ()
        w = torch.randn(*stack, num_outputs, num_inputs)
        a, b = (
            torch.randn(*stack, rank, num_inputs).requires_grad_(),
            torch.randn(*stack, num_outputs, rank).requires_grad_(),
        )
        known = {tensor.data_ptr() for tensor in (x, w, a, b, offsets)}
        saved: dict[int, tuple[int, ...]] = {}

        def note(tensor: Tensor, saved: dict[int, tuple[int, ...]] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if is_stack:
                y = LowRankGroupedProduct(PlainGroupedProduct(), _SCALE)(x, Adapted(w, a, b), offsets)
            else:
                y = LowRankLinearProduct(F.linear, _SCALE)(x, Adapted(w, a, b))
        assert y.shape == (num_rows, num_outputs)
        assert x.data_ptr() in saved
        assert [shape for address, shape in saved.items() if address not in known] == [(num_rows, rank)]


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
