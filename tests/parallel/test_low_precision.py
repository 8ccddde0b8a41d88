"""Low precision under every layout, schedule and recomputation: the numbers of one process.

`python -m tests.parallel --precision NAME` runs all layouts. The products are emulated; their scales are powers of two,
so that a value is rounded to the same whoever shares its scale, and a gradient usually differs from that of one process
by the last bits of float32, as without low precision. What may differ more:

- A sum in another order may be rounded to the next code, a part in sixteen of that value. It then changes others, and
  some of them are rounded to other codes, too (up to 1e-2 of a gradient was seen, where attention was compiled). After
  an update this happens to weights: only the order of magnitude is compared in the second step (3e-2 was seen).
- Values that are 2 ** 14 times smaller than the largest one with their scale have fewer bits: with a scale per tensor
  (9e-3 was seen) these are others where the tensor is cut.
- Blocks of 32 rows, in gradients of weights, hold other rows where these are dealt to ranks or to microbatches. That
  matters only if scales are rounded down, which cuts the largest values of a block (3e-2 was seen).

The noise of the rounding itself is at least 0.2, or 0.04 if only gradients of weights are rounded.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.kinds import WIDE
from tests.ops.native import scaled_grouped_mm
from tests.parallel.layouts import (
    GLOBAL_BATCH,
    PRECISIONS,
    Change,
    Errors,
    Layout,
    Step,
    all_to_one,
    balance_sequences,
    compare,
    freeze_experts,
    on_rank,
    one_process,
)
from tests.parallel.test_activation_checkpoint import _Living as Living
from tests.ranks import run_ranks
from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Decoder
from titanmoe.models.linear import Linear
from titanmoe.models.spec import DecoderSpec, Dense, MoE
from titanmoe.ops import permute
from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.native_float8 import Float8GroupedKernels, Float8LinearKernels
from titanmoe.ops.scaled_product import ScaledGroupedProduct, ScaledLinearProduct
from titanmoe.parallel.activation_checkpoint import apply_activation_checkpoint


@functools.cache
def _reference(precision: str, change: Change | None = balance_sequences, dtype: torch.dtype = torch.float32) -> Step:
    return one_process(WIDE, change, num_steps=1, precision=replace(PRECISIONS[precision], dtype=dtype))[0]


def _compare(precision: str, layout: Layout, change: Change | None = balance_sequences, **section: object) -> None:
    reference = _reference(precision, change)
    errors = compare(WIDE, layout, change, [reference], PRECISIONS[precision], **section)
    assert PRECISIONS[precision].allows(errors), errors


@pytest.mark.parametrize("name", [name for name in PRECISIONS if name != "plain"])
def test_tolerances_are_less_than_what_low_precision_does(name: str) -> None:
    noise = Errors.of([_reference("plain")], [_reference(name)]).noise
    assert noise > 3 * PRECISIONS[name].noise, noise


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, recompute="moe"),
        Layout(dp_replicate=2, recompute="full"),
        Layout(dp_shard=2, ep=2, recompute="selective"),
        Layout(tp=2, recompute="moe"),
        Layout(tp=2, etp=2, recompute="full"),
        Layout(cp=2, ep=2, recompute="selective"),
        Layout(pp=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp8", "mxfp8"])
def test_a_layout_equals_one_process(precision: str, layout: Layout) -> None:
    _compare(precision, layout)


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("fp8-tensorwise", Layout(dp_shard=2)),
        ("fp8-tensorwise", Layout(tp=2)),
        ("fp8-tensorwise", Layout(cp=2)),
        ("mxfp8-down", Layout(dp_shard=2)),
        ("mxfp8-down", Layout(tp=2)),
        ("fp8", Layout(dp_shard=2, tp=2, ep=2, etp=2)),
        ("mxfp8", Layout(cp=2, tp=2, ep=2)),
        ("mxfp8", Layout(pp=2, dp_shard=2, ep=2, recompute="full")),
    ],
)
def test_other_recipes_and_more_ranks(precision: str, layout: Layout) -> None:
    _compare(precision, layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=4, etp=4, recompute="full"),
        Layout(dp_replicate=2, dp_shard=2, ep=2, recompute="moe"),
        Layout(pp=4),
        Layout(pp=2, dp_shard=2, tp=2, ep=2, etp=2),
        Layout(dp_replicate=2, cp=2, tp=2, ep=2, recompute="selective"),
    ],
    ids=str,
)
@pytest.mark.parametrize("change", [balance_sequences, all_to_one, freeze_experts])
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "plain"])
def test_up_to_eight_ranks(precision: str, change: Change, layout: Layout) -> None:
    _compare(precision, layout, change)


@pytest.mark.parametrize("change", [all_to_one, freeze_experts])
@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("fp8", Layout(dp_shard=2, ep=2, recompute="full")),
        ("mxfp8", Layout(tp=2, ep=2)),
        ("mxfp8", Layout(tp=2, etp=2, recompute="moe")),
    ],
)
def test_experts_that_get_all_or_learn_nothing(precision: str, layout: Layout, change: Change) -> None:
    """Also a rank that no row comes to; and no gradient of a frozen weight."""
    _compare(precision, layout, change)


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("mxfp8", Layout(dp_shard=2, accumulates=True)),
        ("fp8", Layout(dp_shard=2, offload=True)),
        ("mxfp8", Layout(dp_shard=2, ep=2, offload=True, recompute="full")),
    ],
    ids=["accumulation", "offload", "offload and experts"],
)
def test_microbatches_and_host_memory(precision: str, layout: Layout) -> None:
    _compare(precision, layout)


@pytest.mark.parametrize("change", [balance_sequences, freeze_experts])
def test_the_second_step_quantizes_the_new_weights(change: Change) -> None:
    steps = one_process(WIDE, change, 2, PRECISIONS["mxfp8"])
    errors = compare(WIDE, Layout(dp_shard=2, ep=2), change, steps, PRECISIONS["mxfp8"])
    assert errors.noise < 0.1, errors


@pytest.mark.parametrize("layout", [Layout(dp_shard=2, recompute="full"), Layout(dp_shard=2, ep=2), Layout(pp=2)])
def test_bfloat16(layout: Layout) -> None:
    """A router's choice may be another one where sums are rounded to bfloat16; with TP that has more effect."""
    precision = replace(PRECISIONS["mxfp8"], dtype=torch.bfloat16, noise=0.1)
    reference = _reference("mxfp8", dtype=torch.bfloat16)
    errors = compare(WIDE, layout, balance_sequences, [reference], precision)
    assert precision.allows(errors), errors


# Pipelines


def _products(schedule: str) -> tuple[list[Step], Counter[str]]:
    """The steps, and how many products there were of each kind."""
    counts: Counter[str] = Counter()
    multiply, weight_gradient = EmulatedKernels.multiply, EmulatedKernels.weight_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            EmulatedKernels,
            "multiply",
            lambda self, rows, weights, along, *rest: (
                counts.update([along]) or multiply(self, rows, weights, along, *rest)
            ),
        )
        patch.setattr(
            EmulatedKernels,
            "weight_gradient",
            lambda self, *operands: counts.update(["weight"]) or weight_gradient(self, *operands),
        )
        section = {"pipeline_parallel_schedule": schedule}
        steps = on_rank(WIDE, Layout(pp=2), balance_sequences, 1, section, PRECISIONS["mxfp8"])
    return steps, counts


@pytest.mark.parametrize(
    "schedule",
    [
        "1F1B",
        pytest.param(
            "ZBVZeroBubble",
            marks=pytest.mark.skipif(
                torch.__version__ < TorchVersion("2.13"), reason="this torch cannot run a backward pass in two parts"
            ),
        ),
    ],
)
def test_a_pipeline_computes_each_product_once(schedule: str) -> None:
    """Also where it asks for gradients of inputs and of weights apart. Forward passes are two: one is an evaluation."""
    model = build_model(WIDE)
    num_products = sum(isinstance(module, Linear) for module in model.modules()) + 2 * len(model.moe_layers())
    found = run_ranks(_products, 2, schedule)
    for steps, _ in found:
        errors = Errors.of(steps, [_reference("mxfp8")])
        assert PRECISIONS["mxfp8"].allows(errors), errors
    num_backward = GLOBAL_BATCH * num_products
    counts = found[0][1] + found[1][1]
    assert counts == {"in": 2 * num_backward, "out": num_backward, "weight": num_backward}


# Recomputation


MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "by op": {"mode": "selective", "option": "op"},
    "less": {"mode": "selective", "option": "op", "recomputed_products": ["attention.o_proj"]},
    "moe": {"mode": "moe"},
}


def _model(spec: DecoderSpec, precision: str, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    model = build_model(spec, device="cpu", dtype=dtype)
    PRECISIONS[precision].apply(model)
    init_weights(model, seed=3)
    apply_activation_checkpoint(model, **options)
    return model


def _backward(model: Decoder) -> dict[str, Tensor]:
    tokens_BS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    model(tokens_BS, cu_seqlens=torch.tensor([0, 7, 24, 40, 48], dtype=torch.int32)).float().square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["fp8", "mxfp8-down"])
def test_recomputation_gives_the_same_bits(precision: str, dtype: torch.dtype) -> None:
    grads = _backward(_model(WIDE, precision, dtype, mode="none"))
    for name, options in MODES.items():
        others = _backward(_model(WIDE, precision, dtype, **options))
        assert others.keys() == grads.keys()
        wrong = [key for key, grad in grads.items() if not torch.equal(others[key], grad)]
        assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mode_keeps_what_it_keeps_without_low_precision(dtype: torch.dtype) -> None:
    """What is rounded, or quantised, is for one product, and is not kept by any."""
    for options in ({"mode": "none"}, *MODES.values()):
        plain, low = (_kept(_model(WIDE, name, dtype, **options)) for name in ("plain", "mxfp8"))
        assert plain == low > 0, options


def _kept(model: Decoder) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with Living() as living:
        logits = model(torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(1)))
    assert logits.requires_grad
    return sum(size for key, (ref, size) in living.storages.items() if key not in parameters and not ref.expired())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def _counts(native: bool, **options: Any) -> Counter[Any]:
    """How often each operation ran in a step of a dense model."""
    model = _model(replace(WIDE, layers=WIDE.layers[:1]), "plain", torch.bfloat16, **options)
    kernels = Float8LinearKernels(Scaling("row")) if native else EmulatedKernels(Scaling("row"))
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = ScaledLinearProduct(kernels)
    with _Counting() as counting:
        _backward(model)
    return counting.counts


@pytest.mark.parametrize(
    "native",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                torch.__version__ < TorchVersion("2.13"), reason="this torch has no scaled products on the CPU"
            ),
        ),
    ],
)
def test_selective_recomputation_keeps_products(native: bool) -> None:
    """And recomputes what quantises their operands; or products with weights of a shape that is named, two of them."""
    product = torch.ops.aten._scaled_mm.default if native else torch.ops.aten.mm.default
    cast = torch.ops.aten._to_copy.default if native else torch.ops.titanmoe.round_to_float8.default
    none, by_op, less = (_counts(native, **options) for options in ({"mode": "none"}, MODES["by op"], MODES["less"]))
    assert by_op[product] == none[product] == less[product] - 2
    assert by_op[cast] > none[cast]


def test_selective_recomputation_keeps_products_of_experts_with_a_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where zeros are written over rows of no expert: in what is kept, not over it."""
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    slots = permute._slots
    monkeypatch.setattr(permute, "_slots", lambda *args: slots(*args[:-1], False))
    found = []
    for mode in ("none", "by op"):
        model = _model(WIDE, "plain", torch.bfloat16, **MODES.get(mode, {"mode": "none"}))
        for _, layer in model.moe_layers():
            for name in ("gate_up_product", "down_product"):
                setattr(layer.experts, name, ScaledGroupedProduct(Float8GroupedKernels(Scaling("row"))))
        with _Counting() as counting:
            grads = _backward(model)
        found.append((grads, counting.counts[torch.ops.titanmoe.scaled_rows_times_weights.default]))
    (grads, count), (others, count_by_op) = found
    assert count_by_op == count > 0
    assert not [name for name, grad in grads.items() if not torch.equal(grad, others[name])]


# Compilation


@pytest.fixture
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_graphs")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp8", "mxfp8"])
def test_a_layer_compiles_as_a_whole(precision: str, backend: str) -> None:
    spec = replace(WIDE, layers=WIDE.layers[2:3])
    tokens_BS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    grads = []
    for is_compiled in (False, True):
        model = _model(spec, precision, mode="none")
        if is_compiled:
            for block in model.blocks():
                block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
        model(tokens_BS).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for grad, expected in zip(*reversed(grads), strict=True):
        assert (grad - expected).norm() < PRECISIONS[precision].noise * expected.norm()


@pytest.mark.parametrize("degrees", [{"dp_shard": 2, "ep": 2}, pytest.param({"tp": 2}, marks=pytest.mark.slow)])
def test_compiled_layers_on_several_ranks(degrees: dict[str, int]) -> None:
    spec = replace(WIDE, layers=WIDE.layers[1:2])
    precision = PRECISIONS["mxfp8"]
    reference = one_process(spec, None, 1, precision)
    errors = compare(spec, Layout(**degrees, compiled=True), None, reference, precision)
    assert precision.allows(errors), errors


# What does not fit


def _narrow(dense: int, routed: int) -> DecoderSpec:
    first, second = WIDE.layers[:2]
    assert isinstance(second.feed_forward, MoE)
    feed_forwards = Dense(dense), replace(second.feed_forward, hidden_dim=routed)
    pairs = zip((first, second), feed_forwards, strict=True)
    return replace(WIDE, layers=tuple(replace(layer, feed_forward=feed_forward) for layer, feed_forward in pairs))


def _refusal(layout: Layout, spec: DecoderSpec) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        on_rank(spec, layout, None, 1, {}, PRECISIONS["mxfp8"])
    return caught.value.what, str(caught.value.where)


@pytest.mark.parametrize(
    ("layout", "spec", "module", "degree"),
    [
        (Layout(tp=2), _narrow(32, 64), "layers.0.feed_forward.gate_proj", "tensor_parallel_degree"),
        (Layout(tp=2, etp=2), _narrow(64, 32), "layers.1.moe.experts", "expert_tensor_parallel_degree"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(layout: Layout, spec: DecoderSpec, module: str, degree: str) -> None:
    one_process(spec, None, 1, PRECISIONS["mxfp8"])
    for what, where in run_ranks(_refusal, 2, layout, spec):
        assert what == f"a rank's part of {module} is 16 x 64, but its product wants multiples of 32"
        assert where == f"parallelism.{degree}"


# Rows beyond the last offset


def _with_tails(precision: str) -> list[Step]:
    """As on a device that is not asked for the number of rows, with 16 as what an expert's are a multiple of."""
    slots = permute._slots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "_slots", lambda *args: slots(*args[:-1], False))
        patch.setattr(PlainGroupedProduct, "row_multiple", lambda *_: 16)
        return on_rank(WIDE, Layout(dp_shard=2, ep=2), balance_sequences, 1, {}, PRECISIONS[precision])


@pytest.mark.parametrize("precision", ["plain", "fp8", "mxfp8"])
def test_a_tail_of_rows_changes_nothing(precision: str) -> None:
    for steps in run_ranks(_with_tails, 2, precision):
        errors = Errors.of(steps, [_reference(precision)])
        assert PRECISIONS[precision].allows(errors), errors
