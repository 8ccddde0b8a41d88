"""Recomputation changes what is kept, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.kinds import KINDS
from tests.parallel.layouts import Layout, compare, on_rank
from tests.ranks import run_ranks
from titanmoe.config import ConfigError, load_config
from titanmoe.converters.apply import convert
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router
from titanmoe.ops import rms_norm
from titanmoe.parallel.activation_checkpoint import _AGAIN, _Result, apply_activation_checkpoint
from titanmoe.parallel.expert import AllToAllDispatcher

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "every layer": {"mode": "selective", "option": "1"},
    "every second": {"mode": "selective", "option": "2"},
    "by op": {"mode": "selective", "option": "op"},
    "by op, less": {
        "mode": "selective",
        "option": "op",
        "recomputed_products": ["attention.o_proj", "moe.router.gate"],
    },
    "moe": {"mode": "moe"},
}


def _model(
    spec: DecoderSpec, dtype: torch.dtype = torch.float32, settings: Sequence[str] = (), **options: Any
) -> Decoder:
    model = build_model(spec, device="cpu", dtype=dtype)
    init_weights(model, seed=3)
    config = load_config(None, settings)
    convert(model, config.model.converters, config)
    apply_activation_checkpoint(model, **options)
    return model


def _backward(model: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of two rows of two documents each, and every gradient of the sum of their squares."""
    tokens_BS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = model(tokens_BS, cu_seqlens=torch.tensor([0, 7, 24, 40, 48], dtype=torch.int32))
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    logits, grads = _backward(_model(KINDS[kind], dtype, mode="none"))
    for name, options in MODES.items():
        for early_stop in (False, True):
            changed = {"early_stop": early_stop, "preserve_rng_state": early_stop}
            other, others = _backward(_model(KINDS[kind], dtype, **options, **changed))
            assert torch.equal(other, logits) and others.keys() == grads.keys()
            wrong = [key for key, grad in grads.items() if not torch.equal(others[key], grad)]
            assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("mode", ["moe", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_two_ranks(kind: str, mode: str) -> None:
    errors = compare(KINDS[kind], Layout(dp_shard=2, ep=2, recompute=mode, reshard="always"))
    assert errors.largest < 1e-5, errors


def _num_exchanges(mode: str) -> int:
    calls = []
    exchange = AllToAllDispatcher.exchange_numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllToAllDispatcher, "exchange_numbers", lambda self, x: calls.append(1) or exchange(self, x))
        on_rank(KINDS["latent"], Layout(dp_shard=2, ep=2, recompute=mode), None, num_steps=2)
    return len(calls)


@pytest.mark.parametrize("mode", ["none", "full", "moe"])
def test_ranks_are_asked_once_how_many_rows_they_send(mode: str) -> None:
    """In each of two steps by the one layer that has experts, and in an evaluation before each."""
    assert run_ranks(_num_exchanges, 2, mode) == [4, 4]


def test_two_backwards_and_a_part_of_one() -> None:
    """What "moe" recomputes is at hand as often as it is asked for, and needs no backward of the others."""
    model = _model(KINDS["grouped-query"], mode="moe")
    _, grads = _backward(_model(KINDS["grouped-query"], mode="none"))
    tokens_BS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    loss = model(tokens_BS, cu_seqlens=torch.tensor([0, 7, 24, 40, 48], dtype=torch.int32)).square().sum()
    weight = model.get_parameter("layers.1.attention.k_proj.weight")
    (part,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    assert torch.equal(part, grads["layers.1.attention.k_proj.weight"])
    loss.backward()
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_a_result_is_forgotten_when_all_have_it() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    result = _Result(torch.nn.functional.silu(x).grad_fn)
    result.num_saved = 2
    first, second = result.take(), result.take()
    assert first is second and torch.equal(first, torch.nn.functional.silu(x))
    assert result.value is None


# What is kept

_DIM, _TOKENS = 64, 256
_ATTENTION = GroupedQuery(4, 2, 16, Rope(16, 1e4), qk_norm=True)
_WIDE = DecoderSpec(_DIM, 16, (LayerSpec(_ATTENTION, MoE(8, 4, 48, Router(normalize=True), shared=Dense(40))),) * 2)


class _Living(TorchDispatchMode):
    """Every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return outputs


def _kept(spec: DecoderSpec, dtype: torch.dtype = torch.float32, **options: Any) -> float:
    """Bytes that the forward of a layer leaves for its backward, per token, as numbers of the model's dtype."""
    sizes = []
    for layers in (spec.layers[:1], spec.layers):
        model = _model(replace(spec, layers=layers), dtype, **options)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        tokens_BS = torch.randint(16, (1, _TOKENS), generator=torch.Generator().manual_seed(1))
        with _Living() as living:
            logits = model(tokens_BS)
        storages = living.storages.items()
        sizes.append(sum(size for key, (ref, size) in storages if key not in parameters and not ref.expired()))
        del logits
    return (sizes[1] - sizes[0]) / _TOKENS / dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_each_mode_keeps(dtype: torch.dtype) -> None:
    kept = {name: _kept(_WIDE, dtype, **options) for name, options in MODES.items()} | {
        "none": _kept(_WIDE, dtype, mode="none")
    }
    query, key, rows = 4 * 16, 2 * 16, 4 * _DIM
    # Queries and keys as projected and as rotated, values, the output of attention; the residual twice; the rows of the
    # experts, gates and ups.
    needed = 2 * (query + key) + key + query + 2 * _DIM + rows + 2 * 4 * 48 + 2 * 40
    norms_and_activations = 2 * _DIM + 4 * 48 + 2 * 40
    if dtype == torch.bfloat16:
        needed += (rows + 2 * 4 * 48) * 8 * 16 // (4 * _TOKENS)  # rows that pad the experts' to 32, half of it each
        norms_and_activations += 2 * _DIM  # float32, for the router
    small = 12 * 8 * 4 / dtype.itemsize  # scores and weights in float32, choices in int64
    assert needed <= kept["moe"] + small / 2 and kept["moe"] <= needed + small, kept
    assert kept["none"] - kept["moe"] == pytest.approx(norms_and_activations, rel=0.2), kept
    assert _DIM <= kept["full"] <= _DIM + small, kept
    assert kept["every layer"] == kept["full"]
    assert kept["by op, less"] <= kept["by op"] - _DIM, kept


def test_by_op_keeps_nothing_wide_of_adapters() -> None:
    """Of a product and what is added to it, their sum alone; and the narrow x A^T of four linear layers."""
    rank = 3
    settings = ["--model.converters=lora", f"--lora.rank={rank}", "--lora.target_modules=layers.*.attention.*"]
    adapted = _kept(_WIDE, settings=settings, **MODES["by op"])
    assert _kept(_WIDE, settings=["--model.converters="], **MODES["by op"]) + 4 * rank - 1 <= adapted
    assert adapted <= _kept(_WIDE, **MODES["by op"]) + 4 * rank + 1


def test_the_norm_of_accelerators() -> None:
    """Its node exists only there; here, one that looks like it."""
    assert {"_saved_input", "_saved_normalized_shape", "_saved_weight"} <= set(
        dir(torch._C._functions.FusedRmsNormBackward0)
    )
    x, weight = torch.randn(4, 8), torch.randn(8)
    node = SimpleNamespace(_saved_input=x, _saved_normalized_shape=(8,), _saved_weight=weight, metadata={"eps": 0.5})
    again = _AGAIN["FusedRmsNormBackward0"](node)
    assert torch.equal(again, torch.nn.functional.rms_norm(x, (8,), weight, 0.5))


def test_norms_of_several_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an accelerator would compute them, if it had no kernel for the whole."""
    monkeypatch.setattr(rms_norm, "works_in_blocks", lambda tensor: False)
    _, grads = _backward(_model(KINDS["grouped-query"], mode="none"))
    _, others = _backward(_model(KINDS["grouped-query"], mode="moe"))
    assert all(torch.equal(others[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_choices_are_kept(name: str, is_compiled: bool) -> None:
    """The router's weights change between forward and backward: a choice made anew would be another one."""
    spec = replace(KINDS["latent"], layers=KINDS["latent"].layers[1:] * 2)
    model = build_model(spec, device="cpu")
    init_weights(model, seed=3)
    if is_compiled:
        for block in model.blocks():
            block.forward = torch.compile(block.forward, backend="aot_eager")
    apply_activation_checkpoint(model, **MODES[name], is_compiled=is_compiled)
    loss = model(torch.tensor([[5, 60]])).square().sum()
    chosen = [layer.router.num_tokens_per_expert_E > 0 for _, layer in model.moe_layers()]
    for _, layer in model.moe_layers():
        layer.router.gate.weight.data.neg_()
    loss.backward()
    for (_, layer), chosen_E in zip(model.moe_layers(), chosen, strict=True):
        assert 0 < chosen_E.sum() < 12
        assert torch.equal(layer.experts.down.grad.abs().amax((1, 2)) > 0, chosen_E)
        assert torch.equal(layer.router.num_tokens_per_expert_E > 0, chosen_E)


@pytest.mark.parametrize("name", ["attention.o_prj", "attention", "o_proj.weight", "proj"])
def test_products_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f'"{name}" is not a linear module'):
        _model(KINDS["grouped-query"], mode="selective", recomputed_products=["moe.router.gate", name])


def test_a_dense_model_has_no_router() -> None:
    spec = replace(KINDS["grouped-query"], layers=KINDS["grouped-query"].layers[:1])
    _model(spec, mode="selective", recomputed_products=["moe.router.gate"])
