"""Attention with windows, sinks, documents, chunks and unequal head dims, against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titanmoe.ops.attention import causal_attention, chunk_documents
from titanmoe.ops.sink_attention import _add_sink, _sink_gradient


def reference(
    q: Tensor, k: Tensor, v: Tensor, documents: list[int], scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Every score of every pair of tokens, and a mask; (B, S, heads, channels)."""
    batch, seq_len, num_heads, _ = q.shape
    repeats = num_heads // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    position = torch.arange(seq_len)
    distance = position[:, None] - position
    starts = torch.zeros(batch * seq_len, dtype=torch.int64)
    starts[documents] = 1
    document = starts.cumsum(0).view(batch, seq_len)
    seen = (distance >= 0) & (document[:, :, None] == document[:, None, :])
    if window is not None:
        seen = seen & (distance < window)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    return (scores.softmax(-1)[..., :seq_len] @ v).transpose(1, 2)


def inputs(seq_len: int, kv_heads: int, qk_dim: int, v_dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(seq_len + qk_dim)
    sizes = [(2, seq_len, 4, qk_dim), (2, seq_len, kv_heads, qk_dim), (2, seq_len, kv_heads, v_dim)]
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 8, 31, 64])
@pytest.mark.parametrize(("seq_len", "kv_heads", "qk_dim", "v_dim"), [(23, 2, 12, 12), (32, 4, 8, 6), (17, 1, 6, 9)])
def test_values_and_gradients(
    seq_len: int, kv_heads: int, qk_dim: int, v_dim: int, window: int | None, with_sinks: bool, packed: bool
) -> None:
    tensors = inputs(seq_len, kv_heads, qk_dim, v_dim, torch.float32)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], requires_grad=True) if with_sinks else None
    documents = [0, 3, 4, seq_len, seq_len + 11] if packed else [0, seq_len]
    cu_seqlens = torch.tensor([*documents, 2 * seq_len], dtype=torch.int32) if packed else None
    everything = [*tensors, sinks] if sinks is not None else tensors
    doubles = [tensor.detach().double().requires_grad_() for tensor in everything]
    weight = torch.randn(2, seq_len, 4, v_dim, dtype=torch.float64)

    ours = causal_attention(*tensors, cu_seqlens, scale=0.3, window=window, sinks_N=sinks)
    expected = reference(*doubles[:3], documents, 0.3, window, doubles[3] if with_sinks else None)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 2e-6
    (ours * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    for tensor, double in zip(everything, doubles, strict=True):
        assert (tensor.grad - double.grad).abs().max() < 1e-5 * max(1.0, double.grad.abs().max())


def test_bfloat16_with_window_and_sinks() -> None:
    tensors = inputs(40, 2, 16, 16, torch.bfloat16)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (*tensors, sinks)]
    ours = causal_attention(*tensors, window=8, sinks_N=sinks)
    expected = reference(*doubles[:3], [0, 40], 0.25, 8, doubles[3])
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).abs().max() < 2e-2
    ours.sum().backward()
    expected.sum().backward()
    for tensor, double in zip((*tensors, sinks), doubles, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        assert (tensor.grad - double.grad).norm() < 2e-2 * double.grad.norm()


def test_the_identities_behind_the_sink() -> None:
    """Output and log-sum-exp with a sink, and its gradient, from those without: no kernel involved."""
    scores, values = torch.randn(5, 9, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    sink = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    expected = torch.cat((scores, sink.expand(5, 1)), dim=1).softmax(-1)[:, :-1] @ values
    o, lse = _add_sink(scores.softmax(-1) @ values, scores.logsumexp(-1), sink.detach())
    assert (o - expected).abs().max() < 1e-6
    do = torch.randn_like(o)
    (expected * do).sum().backward()
    assert (_sink_gradient(do, o, lse, sink.detach()).sum() - sink.grad).abs() < 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_are_documents(packed: bool) -> None:
    cu_seqlens = torch.tensor([0, 3, 10, 20], dtype=torch.int32) if packed else None
    chunks = chunk_documents(cu_seqlens, 4, 2, 10, torch.device("cpu"))
    assert chunks is not None and chunks.dtype == torch.int32
    assert chunks.tolist() == ([0, 3, 7, 10, 14, 18, 20] if packed else [0, 4, 8, 10, 14, 18, 20])
    assert chunk_documents(cu_seqlens, 10, 2, 10, torch.device("cpu")) is cu_seqlens


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize(("kv_heads", "qk_dim", "v_dim"), [(2, 64, 64), (4, 192, 128)])
def test_on_gpu(kv_heads: int, qk_dim: int, v_dim: int, window: int | None, with_sinks: bool, packed: bool) -> None:
    """The flash kernels in bfloat16, windows and sinks included, against the plain formula in float64."""
    tensors = inputs(128, kv_heads, qk_dim, v_dim, torch.bfloat16)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.bfloat16, requires_grad=True) if with_sinks else None
    everything = [*tensors, sinks] if sinks is not None else tensors
    doubles = [tensor.detach().double().requires_grad_() for tensor in everything]
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in everything]
    documents = [0, 50, 128, 200] if packed else [0, 128]
    cu_seqlens = torch.tensor([*documents, 256], dtype=torch.int32, device="cuda") if packed else None
    expected = reference(*doubles[:3], documents, 0.1, window, doubles[3] if with_sinks else None)
    sinks_on_gpu = on_gpu[3] if with_sinks else None
    ours = causal_attention(*on_gpu[:3], cu_seqlens, scale=0.1, window=window, sinks_N=sinks_on_gpu)
    assert (ours.cpu() - expected).abs().max() < 3e-2
    weight = torch.randn(expected.shape)
    (ours * weight.to(ours)).sum().backward()
    (expected * weight).sum().backward()
    for tensor, double in zip(on_gpu, doubles, strict=True):
        assert (tensor.grad.cpu() - double.grad).norm() < 2e-2 * double.grad.norm()
