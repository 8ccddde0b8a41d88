"""Factors that see tokens instead of their copies, beside those that see rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_low_rank import _SCALE, _frozen
from titanmoe.models.moe.layer import MoELayer
from titanmoe.models.spec import MoE, Router
from titanmoe.ops.frozen import FrozenGroupedProduct, FrozenWeight
from titanmoe.ops.frozen_formats import Float8Channel
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.low_rank import Adapted, LowRankGroupedProduct
from titanmoe.ops.permute import Copies, combine, permute, rows_of_experts, sort_by_expert, tokens_of_experts

_NUM_TOKENS, _NUM_EXPERTS, _TOP_K, _DIM, _HIDDEN = 37, 6, 3, 48, 20


def _choice(num_tokens: int = _NUM_TOKENS, num_experts: int = _NUM_EXPERTS) -> Tensor:
    """Other experts for every token, in no order; expert 2 gets none, and expert 4 every token."""
    others = [expert for expert in range(num_experts) if expert not in (2, 4)]
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(num_tokens):
        chosen = [others[index] for index in torch.randperm(len(others), generator=generator)[: _TOP_K - 1]] + [4]
        rows.append([chosen[index] for index in torch.randperm(_TOP_K, generator=generator)])
    return torch.tensor(rows)


def _copies(x_TD: Tensor, align: int, waits: bool | None = None) -> tuple[Copies, Any]:
    experts_TK = _choice(x_TD.shape[0])
    permutation = sort_by_expert(experts_TK.to(x_TD.device), _NUM_EXPERTS, align, waits)
    return Copies(x_TD, experts_TK.to(x_TD.device), permutation.slot_R, permutation.row_TK), permutation


@pytest.mark.parametrize("align", [1, 8])
def test_features_of_experts_go_to_rows_and_back(align: int) -> None:
    """Each is the other's inverse, and the other's gradient."""
    rank = 3
    h_TX = torch.randn(_NUM_TOKENS, _NUM_EXPERTS * rank, dtype=torch.float64, requires_grad=True)
    copies, permutation = _copies(torch.randn(_NUM_TOKENS, 4), align)
    h_RL = rows_of_experts(h_TX, _NUM_EXPERTS, copies)
    for token, experts in enumerate(copies.experts_TK.tolist()):
        for choice, expert in enumerate(experts):
            row = permutation.row_TK[token, choice]
            assert torch.equal(h_RL[row], h_TX[token, expert * rank : (expert + 1) * rank])
    back_TX = tokens_of_experts(h_RL, _NUM_EXPERTS, copies)
    is_own = torch.zeros(_NUM_TOKENS, _NUM_EXPERTS).scatter_(1, copies.experts_TK, 1.0).repeat_interleave(rank, 1)
    assert torch.equal(back_TX, h_TX * is_own)
    weights = torch.randn_like(back_TX)
    (found,) = torch.autograd.grad((back_TX * weights).sum(), h_TX)
    assert torch.equal(found, weights * is_own)


def _leaves(dtype: torch.dtype, rank: int, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    shapes = {
        "x": (_NUM_TOKENS, _DIM),
        "gate_up a": (_NUM_EXPERTS, rank, _DIM),
        "gate_up b": (_NUM_EXPERTS, 2 * _HIDDEN, rank),
        "down a": (_NUM_EXPERTS, rank, _HIDDEN),
        "down b": (_NUM_EXPERTS, _DIM, rank),
    }
    leaves = {
        name: (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_() for name, shape in shapes.items()
    }
    weights: dict[str, Any] = {}
    for name, shape in {"gate_up": (2 * _HIDDEN, _DIM), "down": (_DIM, _HIDDEN)}.items():
        weight = (torch.randn(_NUM_EXPERTS, *shape) / shape[-1] ** 0.5).to(dtype)
        weights[name] = weight if base == "plain" else _frozen(weight, Float8Channel())
    return leaves, weights


def _run(
    leaves: dict[str, Tensor], weights: dict[str, Any], of_tokens: bool, align: int, kernel: Any, waits: bool | None
) -> Tensor:
    """What an MoE layer does, without a router's weights; what padding holds counts for nothing."""
    products = {
        name: LowRankGroupedProduct(
            PlainGroupedProduct(kernel) if isinstance(weight, Tensor) else FrozenGroupedProduct(kernel), _SCALE, kernel
        )
        for name, weight in weights.items()
    }
    adapted = {name: Adapted(weights[name], leaves[f"{name} a"], leaves[f"{name} b"]) for name in weights}
    copies, permutation = _copies(leaves["x"], align, waits)
    rows = permute(copies.x_TD, permutation), permutation.offsets_E, _NUM_TOKENS * _TOP_K
    if of_tokens:
        gate_up = products["gate_up"].from_tokens(rows[0], adapted["gate_up"], *rows[1:], copies)
    else:
        gate_up = products["gate_up"](rows[0], adapted["gate_up"], *rows[1:])
    h = torch.tanh(gate_up[:, :_HIDDEN]) * gate_up[:, _HIDDEN:]
    if permutation.is_padding_R is not None:
        h = h.masked_fill(permutation.is_padding_R[:, None], 0.0)
    if not of_tokens:
        return combine(products["down"](h, adapted["down"], *rows[1:]), permutation)
    y, more = products["down"].to_tokens(h, adapted["down"], *rows[1:], copies)
    return combine(y, permutation) + more


def _compare(
    dtype: torch.dtype, rank: int, base: str, align: int, kernel: Any, waits: bool | None, device: str = "cpu"
) -> None:
    """Beside rows in float64; of experts without tokens, too, whose gradients are zero."""
    leaves, weights = _leaves(dtype, rank, base)
    exact_leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    exact_weights = {
        name: weight.double() if isinstance(weight, Tensor) else weight.dequantize(torch.float64)
        for name, weight in weights.items()
    }
    leaves = {name: leaf.detach().to(device).requires_grad_() for name, leaf in leaves.items()}
    weights = {
        name: weight.to(device)
        if isinstance(weight, Tensor)
        else FrozenWeight(weight.format, tuple(part.to(device) for part in weight.parts), is_stack=True)
        for name, weight in weights.items()
    }
    y = _run(leaves, weights, True, align, kernel, waits)
    expected = _run(exact_leaves, exact_weights, False, 1, "loop", None)
    dy = torch.randn_like(expected).to(dtype)
    found = (y, *torch.autograd.grad(y, list(leaves.values()), dy.to(device)))
    wanted = (expected, *torch.autograd.grad(expected, list(exact_leaves.values()), dy.double()))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    if base == "frozen" and dtype == torch.float64:
        tolerance = 1e-6  # what is in few bits is multiplied with its scales in float32
    for name, one, other in zip(("y", *leaves), found, wanted, strict=True):
        assert one.dtype == dtype
        other = other.detach()
        error = float((one.detach().cpu().double() - other).abs().max() / other.abs().max())
        assert error < tolerance, f"{name}: {error:.1e}"
    assert not found[2][2].any() and not found[4][2].any()


@pytest.mark.parametrize("base", ["plain", "frozen"])
@pytest.mark.parametrize("align", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tokens_give_what_rows_give(dtype: torch.dtype, align: int, base: str) -> None:
    """With an alignment of 32, bfloat16 goes by blocks of rows; without waiting there is a tail of rows of no one."""
    _compare(dtype, 3, base, align, "auto", None)
    if align > 1:
        _compare(dtype, 3, base, align, "auto", False)


@pytest.mark.parametrize("rank", [3, 8])
def test_tokens_with_a_grouped_kernel(rank: int) -> None:
    """`F.grouped_mm` takes ranks that are multiples of 8, which are filled up."""
    _compare(torch.bfloat16, rank, "plain", 8, "torch", None)


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["plain", "frozen"])
@pytest.mark.parametrize("rank", [2, 3, 8])
@pytest.mark.parametrize("align", [1, 16])
def test_tokens_on_a_gpu_beside_float64(align: int, rank: int, base: str) -> None:
    _compare(torch.bfloat16, rank, base, align, "auto", None, "cuda")


def test_what_is_kept_has_no_copies_of_tokens() -> None:
    """Copies of tokens are as large as all else together. Of a frozen base and from tokens nothing wants them."""
    leaves, weights = _leaves(torch.float32, 2, "plain")
    copies, permutation = _copies(leaves["x"], 1)
    x_RD = permute(copies.x_TD, permutation)
    for weight, base in (
        (weights["gate_up"], PlainGroupedProduct()),
        (_frozen(weights["gate_up"], Float8Channel()), None),
    ):
        product = LowRankGroupedProduct(base or FrozenGroupedProduct(), _SCALE)
        adapted = Adapted(weight, leaves["gate_up a"], leaves["gate_up b"])
        saved: set[int] = set()

        def note(tensor: Tensor, saved: set[int] = saved) -> Tensor:
            saved.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            product.from_tokens(x_RD, adapted, permutation.offsets_E, x_RD.shape[0], copies)
        assert copies.x_TD.untyped_storage().data_ptr() in saved
        assert x_RD.untyped_storage().data_ptr() not in saved


def _layer(spec: MoE) -> MoELayer:
    torch.manual_seed(1)
    layer = MoELayer(_DIM, spec)
    experts = layer.experts
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    weights = {"gate_up": (2 * _HIDDEN, _DIM), "down": (_DIM, _HIDDEN)}
    adapted = {}
    for name, (num_outputs, num_inputs) in weights.items():
        weight = getattr(experts, name).requires_grad_(False).flatten(1, -2)
        a, b = (torch.randn(spec.num_experts, *shape) for shape in ((2, num_inputs), (num_outputs, 2)))
        adapted[name] = Adapted(weight, a.requires_grad_(), b.requires_grad_())
        setattr(experts, f"{name}_product", LowRankGroupedProduct(PlainGroupedProduct(), _SCALE))
    experts.read = lambda _, name: adapted[name]
    experts.factors = [factor for each in adapted.values() for factor in (each.a, each.b)]  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("changes", [{}, {"magnitude"}, {"dropout"}, {"few tokens"}, {"a large rank"}], ids=str)
def test_a_layer_is_the_same_with_either(weight_on: Any, changes: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And which of them it takes."""
    spec = MoE(num_experts=8, top_k=3, hidden_dim=_HIDDEN, router=Router(weight_on=weight_on))
    layer = _layer(spec)
    calls: list[str] = []
    for name in ("from_tokens", "to_tokens"):
        whole = getattr(LowRankGroupedProduct, name)
        monkeypatch.setattr(
            LowRankGroupedProduct, name, lambda *args, name=name, whole=whole: (calls.append(name), whole(*args))[1]
        )
    adapted = {name: layer.experts.read(layer.experts, name) for name in ("gate_up", "down")}
    if "magnitude" in changes:
        adapted = {
            name: each._replace(magnitude=torch.linalg.vector_norm(each.weight, dim=-1).requires_grad_())
            for name, each in adapted.items()
        }
    if "dropout" in changes:
        adapted = {name: each._replace(dropout=1e-9) for name, each in adapted.items()}
    if "a large rank" in changes:
        adapted = {
            name: each._replace(
                a=torch.randn(8, 4, each.a.shape[2]).requires_grad_(),
                b=torch.randn(8, each.b.shape[1], 4).requires_grad_(),
            )
            for name, each in adapted.items()
        }
    layer.experts.read = lambda _, name: adapted[name]
    x = torch.randn(2, 3 if "few tokens" in changes else 16, _DIM, requires_grad=True)
    leaves = [x, layer.router.gate.weight, *(factor for each in adapted.values() for factor in (each.a, each.b))]
    results = []
    for suits in (None, lambda *_: False):
        if suits is not None:
            monkeypatch.setattr(LowRankGroupedProduct, "suits_tokens", suits)
        torch.manual_seed(3)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert calls == ([] if changes or weight_on == "input" else ["from_tokens", "to_tokens"])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))
