"""Biases per expert and the clamped SwiGLU, against plain PyTorch in float64 with autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import titanmoe.ops.rows
from titanmoe.ops.clamped_swiglu import clamped_swiglu
from titanmoe.ops.expert_bias import add_expert_bias

_OFFSETS = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
_EXPERT_OF_ROW = torch.tensor([1, 1, 1, 3, 3, 3, 3, 3, 3, 3])


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_expert_bias(weighted: bool, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty experts first and in the middle; both the eager operator and the formula given to a compiler."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    y = torch.randn(10, 7, requires_grad=True)
    bias = torch.randn(4, 7, requires_grad=True)
    weights = torch.rand(10, requires_grad=True) if weighted else None
    inputs = [y, bias] if weights is None else [y, bias, weights]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = add_expert_bias(y, bias, _OFFSETS, weights)
    rows = doubles[1][_EXPERT_OF_ROW]
    expected = doubles[0] + (rows if weights is None else rows * doubles[2][:, None])
    assert (out - expected).abs().max() < 1e-6
    weight = torch.randn(10, 7, dtype=torch.float64)
    (out * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    for tensor, double in zip(inputs, doubles, strict=True):
        assert (tensor.grad - double.grad).abs().max() < 1e-5


def test_the_bias_gradient_is_summed_in_float32() -> None:
    bias = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(1000, 3, dtype=torch.bfloat16, requires_grad=True)
    out = add_expert_bias(y, bias, torch.tensor([1000], dtype=torch.int32))
    out.backward(torch.ones_like(out))
    assert (bias.grad == 1000).all()


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_clamped_swiglu(weighted: bool, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values beyond both limits on both sides; several blocks of rows."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(titanmoe.ops.rows, "_BLOCK_NUMEL", 64)
    gate_up = (torch.randn(13, 10) * 8).requires_grad_()
    weights = torch.rand(13, requires_grad=True) if weighted else None
    inputs = [gate_up] if weights is None else [gate_up, weights]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = partial(clamped_swiglu, limit=7.0, alpha=1.702)(gate_up, weights)
    gate, up = doubles[0][:, :5].clamp(max=7.0), doubles[0][:, 5:].clamp(-7.0, 7.0)
    assert (doubles[0][:, :5] > 7).any() and (doubles[0][:, 5:] < -7).any() and (doubles[0][:, 5:] > 7).any()
    expected = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if weights is not None:
        expected = expected * doubles[1][:, None]
    assert (out - expected).abs().max() < 1e-5
    weight = torch.randn(13, 5, dtype=torch.float64)
    (out * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    for tensor, double in zip(inputs, doubles, strict=True):
        assert (tensor.grad - double.grad).abs().max() < 1e-5 * max(1.0, double.grad.abs().max())
