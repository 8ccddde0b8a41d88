"""The MoE layer against a loop over tokens, and what the router promises."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.moe.layer import MoELayer
from titanmoe.models.moe.router import balance_loss
from titanmoe.models.spec import ClampedSwiGLU, Dense, MoE, Router
from titanmoe.ops import permute
from titanmoe.parallel.activation_checkpoint import apply_activation_checkpoint

DIM = 12


def _layer(spec: MoE, dtype: torch.dtype = torch.float64) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(DIM, spec).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias = torch.linspace(-0.3, 0.3, spec.num_experts)
    return layer


def _reference(layer: MoELayer, x_BSD: Tensor) -> Tensor:
    spec, router = layer.spec, layer.spec.router
    outputs = []
    for x_D in x_BSD.flatten(0, 1):
        logits_E = layer.router.gate.weight.float() @ x_D.float()
        if router.gate_bias:
            logits_E = logits_E + layer.router.gate.bias.float()
        scores_E = logits_E.softmax(0) if router.score == "softmax" else logits_E.sigmoid()
        bias_E = 0 if layer.router.expert_bias is None else layer.router.expert_bias
        ranked_E = scores_E + bias_E
        groups = [
            (group.topk(2).values.sum() if router.group_score == "top2" else group.max(), index)
            for index, group in enumerate(ranked_E.chunk(router.num_groups))
        ]
        best = {index for _, index in sorted(groups, reverse=True)[: router.top_groups]}
        group_size = spec.num_experts // router.num_groups
        ranked = [int(expert) for expert in ranked_E.argsort(descending=True)]
        chosen = torch.tensor([expert for expert in ranked if expert // group_size in best][: spec.top_k])
        weights = scores_E[chosen]
        weights = (weights / weights.sum() if router.normalize else weights) * router.scale
        y_D = torch.zeros_like(x_D)
        for weight, expert in zip(weights, chosen, strict=True):
            gate_HD, up_HD = layer.experts.gate_up[expert]
            on_input, on_output = (weight, 1.0) if router.weight_on == "input" else (1.0, weight)
            gate_H, up_H = gate_HD @ (x_D * on_input), up_HD @ (x_D * on_input)
            if spec.bias:
                gate_H, up_H = (
                    gate_H + layer.experts.gate_up_bias[expert][0],
                    up_H + layer.experts.gate_up_bias[expert][1],
                )
            if spec.activation is None:
                h_H = F.silu(gate_H) * up_H
            else:
                limit, alpha = spec.activation.limit, spec.activation.alpha
                gate_H, up_H = gate_H.clamp(max=limit), up_H.clamp(-limit, limit)
                h_H = (up_H + 1) * gate_H * torch.sigmoid(alpha * gate_H)
            down_D = layer.experts.down[expert] @ h_H
            y_D = y_D + on_output * (down_D + layer.experts.down_bias[expert] if spec.bias else down_D)
        outputs.append(y_D)
    y_BSD = torch.stack(outputs).view_as(x_BSD)
    return y_BSD if layer.shared_experts is None else y_BSD + layer.shared_experts(x_BSD)


@pytest.mark.parametrize(
    "spec",
    [
        MoE(5, 2, 7),
        MoE(5, 1, 7, Router("sigmoid", normalize=False, scale=2.5)),
        MoE(6, 3, 9, Router("sigmoid", selection_bias=True), shared=Dense(11)),
        MoE(4, 4, 5, Router(normalize=False)),
        MoE(12, 3, 5, Router("sigmoid", selection_bias=True, num_groups=4, top_groups=2)),
        MoE(12, 3, 5, Router(num_groups=3, top_groups=2, group_score="max", scale=2.5)),
        MoE(6, 2, 9, Router(gate_bias=True), bias=True, activation=ClampedSwiGLU(limit=1.5, alpha=1.7)),
        MoE(6, 2, 9, Router("sigmoid", normalize=False, weight_on="input"), shared=Dense(11), bias=True),
    ],
    ids=[
        "softmax",
        "sigmoid top-1",
        "bias and shared",
        "all experts",
        "groups by their two best",
        "groups by their best",
        "clamped with biases",
        "weight on the input",
    ],
)
def test_layer_equals_a_loop_over_tokens(spec: MoE) -> None:
    layer = _layer(spec)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), _reference(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    for grad, reference in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("align", [1, 8, 32])
@pytest.mark.parametrize(
    "spec",
    [
        MoE(6, 3, 9),
        MoE(6, 1, 9, Router("sigmoid", normalize=False)),
        MoE(6, 2, 9, Router(gate_bias=True), bias=True, activation=ClampedSwiGLU(limit=1.5, alpha=1.7)),
        MoE(6, 2, 9, Router("sigmoid", normalize=False, weight_on="input"), bias=True),
    ],
    ids=["plain", "top-1", "clamped with biases", "weight on the input, with biases"],
)
def test_padding_changes_nothing(spec: MoE, align: int, has_tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do rows of no expert, which are there if a device is not asked for the number of rows. Memory is poisoned."""
    layer = _layer(spec)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    dy = torch.randn_like(x)
    expected_y = layer(x)
    expected = torch.autograd.grad(expected_y, inputs, dy)
    monkeypatch.setattr(layer.experts, "row_multiple", lambda _: align)
    slots, new_empty, empty_like = permute._slots, Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(permute, "_slots", lambda *args: slots(*args[:-1], not has_tail))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **kwargs: _poisoned(new_empty(self, *size, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: _poisoned(empty_like(*args, **kwargs)))
    num_rows = []
    layer.experts.register_forward_pre_hook(lambda _, args: num_rows.append((args[0].shape[0], int(args[2][-1]))))
    y = layer(x)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-6)
    for grad, reference in zip(torch.autograd.grad(y, inputs, dy), expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-6)
    ((num_all, num_of_experts),) = num_rows
    assert num_of_experts % align == 0
    if align == 8:
        assert (num_all > num_of_experts) == has_tail


def _poisoned(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def test_one_expert_takes_all_tokens() -> None:
    layer = _layer(MoE(5, 1, 7, Router(selection_bias=True)))
    layer.router.expert_bias = torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0])
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, _reference(layer, x), rtol=1e-5, atol=1e-5)
    layer.router.record()
    assert layer.router.num_tokens_per_expert_E.tolist() == [0, 0, 18, 0, 0]
    y.sum().backward()
    assert not layer.experts.down.grad[[0, 1, 3, 4]].any()


def test_scores_are_float32_in_a_bfloat16_model() -> None:
    layer = _layer(MoE(5, 2, 8), torch.bfloat16)
    weights, experts = layer.router(torch.randn(1, 6, DIM, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(6))
    assert experts.dtype == torch.int64


def test_counts_are_kept_only_in_training_and_only_when_recorded() -> None:
    layer = _layer(MoE(5, 2, 7))
    x = torch.randn(1, 10, DIM, dtype=torch.float64)
    layer.eval()(x)
    layer.router.record()
    assert layer.router.num_tokens_per_expert_E.sum() == 0
    layer.train()
    for _ in range(2):
        layer(x)
        layer.router.record()
    assert layer.router.num_tokens_per_expert_E.sum() == 40


def test_forced_balance_is_even() -> None:
    layer = _layer(MoE(5, 2, 7))
    layer.router.force_balance = True
    layer(torch.randn(1, 10, DIM, dtype=torch.float64))
    layer.router.record()
    assert layer.router.num_tokens_per_expert_E.tolist() == [4] * 5


def test_balance_loss_formula_and_its_gradient_reach_the_gate() -> None:
    spec = MoE(4, 2, 5, Router("sigmoid"))
    layer = _layer(spec)
    layer.router.aux_loss_weight = 0.3
    x = torch.randn(3, 6, DIM, dtype=torch.float64)
    scores = F.linear(x.float(), layer.router.gate.weight.float()).sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = scores.topk(2, -1).indices
    expected = 0.0
    for sequence in range(3):
        fraction = chosen[sequence].flatten().bincount(minlength=4) / 12
        expected = expected + 4 * (fraction * shares[sequence].mean(0)).sum()
    loss = balance_loss(scores.flatten(0, 1), chosen.flatten(0, 1), 3)
    torch.testing.assert_close(loss, expected)
    (reference,) = torch.autograd.grad(0.3 * expected, layer.router.gate.weight)
    weights, _ = layer.router(x)
    (weights * 0).sum().backward()
    torch.testing.assert_close(layer.router.gate.weight.grad, reference, rtol=1e-5, atol=1e-6)


def test_recomputation_keeps_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputed forward follows the first, and asks nobody which experts to take."""
    from tests.parallel.test_layouts import SPEC
    from titanmoe.models.build import build_model, init_weights

    model = build_model(SPEC, device="cpu")
    init_weights(model, 0)
    tokens = torch.randint(97, (2, 17))
    reference = copy.deepcopy(model)
    reference(tokens).square().mean().backward()
    apply_activation_checkpoint(model, mode="full")
    out = model(tokens).square().mean()
    calls = []

    def no_topk(*_: object, **__: object) -> None:
        raise AssertionError("the choice was made again")

    model.moe_layers()[0][1].experts.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(torch, "topk", no_topk)
    out.backward()
    assert calls, "the forward was not recomputed"
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name
