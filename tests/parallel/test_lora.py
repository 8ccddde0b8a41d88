"""Adapters under every layout: loss, gradients and their norm are those of one process, and they alone are reduced.

What is frozen has no gradient on any of them: the harness compares the names of gradients, too. All layouts, all kinds
of frozen weights: `python -m tests.parallel --adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.kinds import KINDS, WIDE
from tests.parallel.adapters import ADAPTERS, adapt, errors_of, reference, wrong_moves
from tests.parallel.layouts import Layout, Precision, build, compare, one_process, own_batches
from tests.ranks import full_tensor, run_ranks
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.parallel.activation_checkpoint import apply_activation_checkpoint
from titanmoe.parallel.fsdp import init_magnitudes
from titanmoe.training.gradients import clip_gradients

SMALL = replace(WIDE, layers=WIDE.layers[1:3])
has_zero_bubble = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"), reason="this torch cannot run a backward pass in two parts"
)
_ZERO_BUBBLE = {"pipeline_parallel_schedule": "ZBVZeroBubble"}


def _check(spec: DecoderSpec, layout: Layout, *names: str, **section: object) -> None:
    for name, errors in errors_of(spec, layout, names, section).items():
        assert ADAPTERS[name].allows(errors), f"{name}: {errors}"


@pytest.mark.parametrize(
    ("spec", "layout", "names"),
    [
        (SMALL, Layout(dp_shard=2, recompute="full", reshard="always"), ("LoRA on nf4", "DoRA on bfloat16")),
        (SMALL, Layout(dp_replicate=2, accumulates=True), ("DoRA on mx",)),
        (SMALL, Layout(dp_shard=2, ep=2, recompute="moe", offload=True), ("DoRA on nf4",)),
        (WIDE, Layout(tp=2, ep=2, recompute="selective"), ("DoRA on float32",)),
        (SMALL, Layout(tp=2, etp=2), ("DoRA on float8", "LoRA on bfloat16")),
        (SMALL, Layout(cp=2), ("LoRA on mx",)),
        (WIDE, Layout(pp=2), ("LoRA on float32",)),
    ],
    ids=lambda value: "" if isinstance(value, DecoderSpec) else str(value),
)
def test_two_ranks_are_one_process(spec: DecoderSpec, layout: Layout, names: tuple[str, ...]) -> None:
    _check(spec, layout, *names)


@has_zero_bubble
def test_gradients_of_experts_that_wait_for_those_of_inputs() -> None:
    """A schedule whose backward pass is in two parts."""
    _check(WIDE, Layout(pp=2), "LoRA on float8", "DoRA on mx", **_ZERO_BUBBLE)


@pytest.mark.parametrize(
    ("layout", "name"),
    [(Layout(dp_shard=2, ep=2, recompute="full"), "DoRA on nf4"), (Layout(tp=2, etp=2), "LoRA on bfloat16")],
    ids=str,
)
def test_three_steps_move_adapters_of_experts_that_have_tokens(layout: Layout, name: str) -> None:
    assert not wrong_moves(SMALL, layout, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "section"),
    [
        (Layout(dp_replicate=2, dp_shard=2, ep=2, recompute="full"), {}),
        (Layout(dp_replicate=2, dp_shard=2, offload=True), {}),
        (Layout(dp_shard=2, tp=2, ep=2, etp=2, recompute="moe"), {}),
        (Layout(dp_shard=2, cp=2, ep=2, recompute="selective"), {}),
        (Layout(cp=2, tp=2, ep=2), {}),
        (Layout(pp=2, tp=2, ep=2, recompute="full"), {}),
        (Layout(pp=2, dp_shard=2, ep=2), {"pipeline_parallel_schedule": "Interleaved1F1B"}),
        pytest.param(Layout(pp=2, tp=2, etp=2), _ZERO_BUBBLE, marks=has_zero_bubble),
        (Layout(pp=4), {}),
        (Layout(tp=4, etp=4), {}),
    ],
    ids=str,
)
def test_four_ranks_are_one_process(layout: Layout, section: dict[str, object]) -> None:
    _check(WIDE, layout, "DoRA on float32", "LoRA on bfloat16", "DoRA on nf4", **section)
    assert not wrong_moves(WIDE, layout, "DoRA on nf4", section)


def test_adapters_on_quantised_products() -> None:
    names, settings = ("quantize.linear.float8", "quantize.grouped_mm.mx", "lora"), ADAPTERS["LoRA on float32"].settings
    precision = Precision(names, ("quantize.linear.float8.recipe_name=rowwise", *settings), noise=0.03)
    expected = one_process(SMALL, adapt, num_steps=1, precision=precision)
    assert precision.allows(errors := compare(SMALL, Layout(tp=2, etp=2), adapt, expected, precision)), errors


@pytest.mark.parametrize(
    "layout", [Layout(dp_shard=2, ep=2, recompute="full"), Layout(tp=2, etp=2, recompute="selective")], ids=str
)
def test_one_weight_of_the_last_layer_has_adapters(layout: Layout) -> None:
    settings = (*ADAPTERS["DoRA on float32"].settings, "lora.target_modules=layers.1.moe.experts.down_proj")
    precision = Precision(("lora",), settings)
    expected = one_process(SMALL, adapt, num_steps=1, precision=precision)
    assert len(expected[0].grads) == 3
    assert precision.allows(errors := compare(SMALL, layout, adapt, expected, precision)), errors


# First values


def test_first_values_are_those_of_one_process() -> None:
    spec = replace(KINDS["sinks and windows"], layers=KINDS["sinks and windows"].layers[:1])
    (expected,) = run_ranks(_first_values, 1, spec, Layout())
    assert any(name.endswith("down_lora_magnitude") for name in expected)
    for of_rank in run_ranks(_first_values, 4, spec, Layout(dp_shard=2, tp=2, ep=2, etp=2)):
        assert of_rank.keys() == expected.keys()
        for name, value in of_rank.items():
            exact = dict(rtol=1e-6, atol=0) if name.endswith("magnitude") else dict(rtol=0, atol=0)
            torch.testing.assert_close(value, expected[name], msg=name, **exact)


def _first_values(spec: DecoderSpec, layout: Layout) -> dict[str, Tensor]:
    """Of every adapter, whole, for each way to draw them."""
    found = {}
    for init in ("kaiming", "gaussian", "orthogonal"):
        precision = Precision(("lora",), ("lora.rank=7", "lora.use_dora", f"lora.init={init}"))
        model = build(spec, layout, precision=precision)[0]
        adapters = {name: value for name, value in model.named_parameters() if is_adapter(name)}
        found |= {f"{init} {name}": full_tensor(value).clone() for name, value in adapters.items()}
    return found


# What is sent, and what is clipped


class _Summed(TorchDispatchMode):
    """Numbers that go into collectives that sum them."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.c10d._reduce_scatter_base_:
            self.numel += args[1].numel()
        assert func.overloadpacket is not torch.ops.c10d.allreduce_
        return func(*args, **(kwargs or {}))


def _sent(layout: Layout) -> tuple[int, int, float, float]:
    """Numbers that were summed, and that are trained; the norm as told, and that of all gradients after clipping."""
    model, mesh, step, rows = build(SMALL, layout, adapt, {}, ADAPTERS["LoRA on nf4"])
    with _Summed() as summed:
        step.accumulate(own_batches(mesh, 0, rows), 100)
    norm = clip_gradients(model.parameters(), 1e-3)
    grads = [full_tensor(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    clipped = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return summed.numel, num_trained, float(norm), clipped


def test_gradients_of_adapters_alone_are_summed_and_clipped() -> None:
    expected = reference(SMALL, "LoRA on nf4")[0]
    assert expected.grads and all(map(is_adapter, expected.grads))
    own_norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in expected.grads.values()))
    assert expected.norm == pytest.approx(own_norm, rel=1e-6)
    for num_summed, num_trained, norm, clipped in run_ranks(_sent, 2, Layout(dp_shard=2)):
        assert num_trained < num_summed < 1.1 * num_trained  # shards are filled up to be equal
        assert norm == pytest.approx(own_norm * 144 / 100, rel=1e-5) and clipped == pytest.approx(1e-3, rel=1e-3)


# Dropout


_DROPOUT = Precision(("lora",), (*ADAPTERS["LoRA on float32"].settings, "lora.dropout=0.5"))


def _adapted(spec: DecoderSpec, precision: Precision) -> Decoder:
    model = build_model(spec, device="cpu")
    precision.apply(model)
    init_weights(model, seed=3)
    init_magnitudes(model)
    adapt(model)
    return model


def _backward(model: Decoder) -> dict[str, Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    model(tokens).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_what_is_recomputed_meets_the_same_dropout() -> None:
    found = []
    for mode, option in (("none", ""), ("full", ""), ("selective", "op"), ("selective", "2"), ("moe", "")):
        model = _adapted(SMALL, _DROPOUT)
        apply_activation_checkpoint(model, mode=mode, option=option)  # type: ignore[arg-type]
        found.append(_backward(model))
    first, *others = found
    for other in others:
        assert not [name for name, grad in first.items() if not torch.equal(grad, other[name])]


def _dropped(layout: Layout) -> tuple[float, float, float]:
    """A loss in training, the same again, and that of an evaluation."""
    model, mesh, step, rows = build(SMALL, layout, adapt, {}, _DROPOUT)
    batches, losses = own_batches(mesh, 0, rows), []
    for seed in (mesh.data_rank, mesh.data_rank, 7):
        torch.manual_seed(seed)
        loss = step.accumulate(batches, 144)
        torch.distributed.all_reduce(loss)
        losses.append(float(loss))
    model.eval()
    loss = step.loss_sums(batches) / 144
    torch.distributed.all_reduce(loss)
    assert losses[0] == losses[1] != losses[2]
    return losses[0], losses[2], float(loss)


def test_dropout_on_two_ranks_is_for_training_only() -> None:
    expected = reference(SMALL, "LoRA on float32")[0].loss
    for *dropped, evaluated in run_ranks(_dropped, 2, Layout(tp=2, ep=2, recompute="full")):
        assert evaluated == pytest.approx(expected, rel=1e-6)
        assert all(1e-4 < abs(loss - expected) < 0.1 * expected for loss in dropped)


# Compilation


@pytest.fixture
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_graphs")
def test_a_layer_compiles_as_a_whole() -> None:
    found = []
    for is_compiled in (False, True):
        model = _adapted(replace(WIDE, layers=WIDE.layers[2:3]), ADAPTERS["DoRA on float32"])
        if is_compiled:
            for block in model.blocks():
                block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
        found.append(_backward(model))
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.usefixtures("_forget_graphs")
@pytest.mark.parametrize("layout", [Layout(dp_shard=2, compiled=True), Layout(tp=2, etp=2, compiled=True)], ids=str)
def test_compiled_layers_on_two_ranks(layout: Layout) -> None:
    _check(replace(WIDE, layers=WIDE.layers[1:2]), layout, "LoRA on nf4", "DoRA on float32")
