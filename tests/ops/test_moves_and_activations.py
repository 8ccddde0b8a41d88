"""Permute and combine, SwiGLU, RoPE and attention, each against a few plain lines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from titanmoe.ops.attention import causal_attention
from titanmoe.ops.permute import combine, permute, permute_weights, regroup_by_expert, sort_by_expert
from titanmoe.ops.rms_norm import rms_norm
from titanmoe.ops.rope import apply_rope, rope_table
from titanmoe.ops.swiglu import swiglu


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("choice", ["random", "one expert", "no tokens"])
@pytest.mark.parametrize("align", [1, 8])
def test_permutation_sorts_and_inverts(top_k: int, choice: str, align: int) -> None:
    num_tokens = 0 if choice == "no tokens" else 23
    experts_TK = torch.rand(num_tokens, 7).argsort(-1)[:, :top_k]
    if choice == "one expert":
        experts_TK = torch.full_like(experts_TK, 4)
    permutation = sort_by_expert(experts_TK, 7, align)
    assert permutation.offsets_E.dtype == torch.int32
    sizes_E = permutation.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32))
    counts_E = experts_TK.flatten().bincount(minlength=7)
    assert sizes_E.tolist() == [-(-count // align) * align for count in counts_E.tolist()]
    rows = permutation.row_TK.flatten()
    assert torch.equal(permutation.slot_R[rows], torch.arange(num_tokens * top_k))
    assert torch.equal(torch.searchsorted(permutation.offsets_E, rows, right=True), experts_TK.flatten())
    is_padding_R = torch.ones(int(sizes_E.sum()), dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(is_padding_R, is_padding_R & False if align == 1 else permutation.is_padding_R)


@pytest.mark.parametrize("num_tokens", [0, 1, 23, 64])
@pytest.mark.parametrize("align", [8, 32])
def test_a_device_need_not_be_asked_for_the_number_of_rows(num_tokens: int, align: int) -> None:
    experts_TK = torch.rand(num_tokens, 7).argsort(-1)[:, :3]
    with_tail, exact = (sort_by_expert(experts_TK, 7, align, waits=waits) for waits in (False, True))
    assert torch.equal(with_tail.offsets_E, exact.offsets_E)
    assert torch.equal(with_tail.row_TK, exact.row_TK)
    num_rows = exact.slot_R.shape[0]
    assert num_rows <= with_tail.slot_R.shape[0] <= num_tokens * 3 + 7 * (align - 1)
    assert torch.equal(with_tail.slot_R[:num_rows], exact.slot_R)
    assert with_tail.is_padding_R[num_rows:].all()
    assert not permute_weights(torch.rand(num_tokens, 3), with_tail)[with_tail.is_padding_R].any()


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("kind", ["random", "one expert gets all", "one expert", "one group", "no rows"])
def test_regrouping_is_sorting(kind: str, align: int) -> None:
    num_rows_GE = torch.randint(0, 5, (1 if kind == "one group" else 3, 1 if kind == "one expert" else 4))
    if kind == "one expert gets all":
        num_rows_GE *= torch.tensor([0, 0, 1, 0])
    elif kind == "no rows":
        num_rows_GE.zero_()
    num_experts = num_rows_GE.shape[1]
    experts_S = torch.cat([torch.arange(num_experts).repeat_interleave(num_rows_E) for num_rows_E in num_rows_GE])
    found = regroup_by_expert(num_rows_GE, len(experts_S), align)
    expected = sort_by_expert(experts_S[:, None], num_experts, align)
    assert found.is_identity == (kind == "one expert" and align == 1)
    for name, tensor in vars(replace(expected, is_identity=found.is_identity)).items():
        other = getattr(found, name)
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name
        else:
            assert tensor is other, name
    x_SD, weights_S1 = torch.randn(len(experts_S), 3), torch.rand(len(experts_S), 1)
    for permutation in (found, expected):
        y_RD = permute(x_SD, permutation) * permute_weights(weights_S1, permutation)[:, None]
        assert torch.equal(combine(y_RD, permutation), x_SD * weights_S1)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_permute_and_combine_are_a_gather_and_its_sum(dtype: torch.dtype, align: int) -> None:
    experts_TK = torch.rand(19, 6).argsort(-1)[:, :3]
    permutation = sort_by_expert(experts_TK, 6, align)
    x_TD = torch.randn(19, 8, dtype=dtype, requires_grad=True)
    weights_TK = torch.rand(19, 3, dtype=dtype, requires_grad=True)
    rows = permute(x_TD, permutation) * permute_weights(weights_TK, permutation)[:, None]
    expected = x_TD.detach()[:, None] * weights_TK.detach()[..., None]
    assert torch.equal(rows[permutation.row_TK], expected)
    y_TD = combine(rows, permutation)
    torch.testing.assert_close(y_TD, expected.double().sum(1).to(dtype))
    dy_TD = torch.randn(19, 8, dtype=dtype)
    y_TD.backward(dy_TD)
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    expected_dx = (dy_TD.double() * weights_TK.double().sum(1, keepdim=True)).to(dtype)
    torch.testing.assert_close(x_TD.grad, expected_dx, **tolerance)
    torch.testing.assert_close(
        weights_TK.grad, (dy_TD.double() * x_TD.double()).sum(1, keepdim=True).expand(19, 3).to(dtype), **tolerance
    )


def test_combine_accumulates_bfloat16_in_float32() -> None:
    """256 + 1 + ... + 1 stays 256 if every partial sum is rounded to bfloat16."""
    permutation = sort_by_expert(torch.arange(64)[None], 64)
    y_RD = torch.ones(64, 1, dtype=torch.bfloat16)
    y_RD[0] = 256
    assert combine(y_RD, permutation).item() == 320


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_gradients(weighted: bool) -> None:
    gate_up = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, dtype=torch.float64, requires_grad=True) if weighted else None
    expected = F.silu(gate_up[:, :5]) * gate_up[:, 5:] * (1 if weights is None else weights[:, None])
    torch.testing.assert_close(swiglu(gate_up, weights), expected)
    inputs = (gate_up, weights) if weighted else (gate_up,)
    assert torch.autograd.gradcheck(swiglu, inputs)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_against_float64(num_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanmoe.ops.rows._BLOCK_NUMEL", 100)  # several blocks, and a shorter last one
    x = torch.randn(1, num_rows, 24, dtype=dtype, requires_grad=True)
    weight = torch.rand(24, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, num_rows, 24, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact[1]
    y = rms_norm(x, weight, 1e-6)
    assert y.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    for grad, reference in zip(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), reference, **(tolerance | {"atol": tolerance["atol"] * 10}))


def test_swiglu_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, weights = torch.randn(37, 16, requires_grad=True), torch.rand(37, requires_grad=True)
    dh = torch.randn(37, 8)
    whole = [swiglu(gate_up, weights), *torch.autograd.grad(swiglu(gate_up, weights), (gate_up, weights), dh)]
    monkeypatch.setattr("titanmoe.ops.rows._BLOCK_NUMEL", 100)
    cut = [swiglu(gate_up, weights), *torch.autograd.grad(swiglu(gate_up, weights), (gate_up, weights), dh)]
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_rotates_by_position_times_frequency(interleaved: bool) -> None:
    positions = torch.tensor([[0, 1, 5], [7, 8, 0]])
    frequencies = 100.0 ** (-torch.arange(0, 6, 2) / 6)
    cos, sin = rope_table(positions, frequencies, 1.5, torch.float64)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64)  # 6 rotated channels of 8
    rotated = apply_rope(x, cos, sin, interleaved)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    partners = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
    angles = positions[..., None, None] * frequencies
    expected = torch.complex(*partners) * torch.polar(torch.full_like(angles, 1.5), angles).to(torch.complex128)
    torch.testing.assert_close(rotated[..., :3], expected.real, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rotated[..., 3:6], expected.imag, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("boundaries", [None, [0, 3, 11, 12, 22]])
def test_attention_against_an_explicit_mask(num_kv_heads: int, boundaries: list[int] | None) -> None:
    q = torch.randn(2, 11, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 11, num_kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    o = causal_attention(q, k, v, cu_seqlens)
    document = torch.arange(2).repeat_interleave(11)
    if boundaries is not None:
        document = torch.repeat_interleave(torch.arange(4), torch.tensor(boundaries).diff())
    document = document.view(2, 11)
    mask = (document[:, :, None] == document[:, None, :]) & torch.ones(11, 11, dtype=torch.bool).tril()
    group = 4 // num_kv_heads
    scores = torch.einsum("bsnh,btnh->bnst", q, k.repeat_interleave(group, 2)) / 8**0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("bnst,btnh->bsnh", weights, v.repeat_interleave(group, 2))
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    for grad, reference in zip(
        torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(expected, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(grad, reference)
