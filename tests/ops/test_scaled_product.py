"""Products in low precision against float64, torchao's emulation and casts of its own; what is computed, and when."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.grouped_mm import Kernel, PlainGroupedProduct
from titanmoe.ops.quiet_import import import_quietly
from titanmoe.ops.scaled_product import LowPrecisionProduct, Operand, ScaledGroupedProduct, ScaledLinearProduct

COUNTS = {
    "even": [32, 64, 32, 96],
    "empty experts": [0, 37, 0, 91],
    "one takes all": [0, 0, 71, 0],
    "odd": [1, 300, 33, 7],
    "no rows": [0, 0, 0, 0],
}
LINEAR = [Scaling("tensor"), Scaling("row"), Scaling("block", "up"), Scaling("block", "down")]
GROUPED = LINEAR[1:]
N, K = 96, 160
LEAST_DB = 27.0


def _names(scaling: Any) -> str:
    return f"{scaling.shared_by}-{scaling.rounding}" if isinstance(scaling, Scaling) else str(scaling)


def _operands(counts: list[int], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_RK = torch.randn(sum(counts), K, generator=generator)
    w_ENK = torch.randn(len(counts), N, K, generator=generator) / K**0.5
    dy_RN = torch.randn(sum(counts), N, generator=generator) * 1e-3
    return *(tensor.to(dtype) for tensor in (x_RK, w_ENK, dy_RN)), torch.tensor(counts).cumsum(0).int()


def _grouped(scaling: Scaling, rounds: bool = True, kernel: Kernel = "auto") -> ScaledGroupedProduct:
    return ScaledGroupedProduct(EmulatedKernels(scaling, kernel), rounds, plain_kernel=kernel)


def _exact(x_RK: Tensor, w_ENK: Tensor, dy_RN: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw in float64."""
    x, w, dy = x_RK.double().split(counts), w_ENK.double(), dy_RN.double().split(counts)
    experts = range(len(counts))
    y = torch.cat([x[e] @ w[e].T for e in experts])
    dx = torch.cat([dy[e] @ w[e] for e in experts])
    return y, dx, torch.stack([dy[e].T @ x[e] for e in experts])


def _run(function: Callable[..., Tensor], x: Tensor, w: Tensor, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """y, dx, dw."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w, *args)
    y.backward(dy)
    assert x.grad is not None and w.grad is not None
    return y.detach(), x.grad, w.grad


def _sqnr(value: Tensor, reference: Tensor) -> float:
    """Signal to error ratio in dB."""
    return (20 * torch.log10(reference.norm() / (value.double() - reference).norm())).item()


@pytest.mark.parametrize("scaling", GROUPED, ids=_names)
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COUNTS)
def test_experts(scaling: Scaling, rounds: bool, dtype: torch.dtype, name: str) -> None:
    counts = COUNTS[name]
    x_RK, w_ENK, dy_RN, offsets_E = _operands(counts, dtype)
    results = _run(_grouped(scaling, rounds), x_RK, w_ENK, dy_RN, offsets_E)
    for index, (result, exact) in enumerate(zip(results, _exact(x_RK, w_ENK, dy_RN, counts), strict=True)):
        assert result.dtype == dtype and result.shape == exact.shape
        if sum(counts):
            assert _sqnr(result, exact) >= (LEAST_DB if index < 2 or rounds else 50.0)
        assert not result[exact == 0].any()


@pytest.mark.parametrize("scaling", LINEAR, ids=_names)
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (77,), (3, 11), (1,), (0,), (2, 1, 33), ()], ids=str)
def test_linear(scaling: Scaling, rounds: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    num_rows = torch.Size(shape).numel()
    x_TK, w_1NK, dy_TN, _ = _operands([num_rows], dtype)
    bias_N = torch.linspace(-1, 1, N, dtype=torch.float32, requires_grad=True)
    product = ScaledLinearProduct(EmulatedKernels(scaling), rounds)
    results = _run(product, x_TK.view(*shape, K), w_1NK[0], dy_TN.view(*shape, N), bias_N)
    y, dx, dw = _exact(x_TK, w_1NK, dy_TN, [num_rows])
    exact = (y + bias_N.detach().to(dtype)).view(*shape, N), dx.view(*shape, K), dw[0]
    for index, (result, expected) in enumerate(zip(results, exact, strict=True)):
        assert result.dtype == dtype and result.shape == expected.shape
        if num_rows:
            # One row is a block of one value, which rounding down may cut by an eighth.
            least_db = LEAST_DB if num_rows > 1 or scaling.rounding == "up" else 22.0
            assert _sqnr(result, expected) >= (least_db if index < 2 or rounds else 50.0)
    plain = torch.zeros(N, requires_grad=True)
    (torch.zeros(*shape, N, dtype=dtype) + plain.to(dtype)).backward(dy_TN.view(*shape, N))
    assert bias_N.grad is not None and torch.equal(bias_N.grad, plain.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("counts", [[32, 64, 32, 96], [0, 128, 0, 64]], ids=str)
def test_experts_are_those_of_torchao_in_mx(rounding: str, rounds: bool, counts: list[int]) -> None:
    """Bit for bit, where `F.grouped_mm` multiplies, which torchao calls. Whole blocks: others it rounds wrong."""
    torchao = import_quietly("torchao.prototype.moe_training.mxfp8_grouped_mm")
    mode = torchao.ScaleCalculationMode.RCEIL if rounding == "up" else torchao.ScaleCalculationMode.FLOOR
    x_RK, w_ENK, dy_RN, offsets_E = _operands(counts)

    def theirs(x_RK: Tensor, w_ENK: Tensor) -> Tensor:
        y: Tensor = torchao._to_mxfp8_then_scaled_grouped_mm(
            x_RK,
            w_ENK.transpose(-2, -1),
            offs=offsets_E,
            kernel_preference=torchao.KernelPreference.EMULATED,
            wgrad_with_hp=not rounds,
            scale_calculation_mode=mode,
        )
        return y

    ours = _grouped(Scaling("block", rounding), rounds, "torch")  # type: ignore[arg-type]
    results = _run(ours, x_RK, w_ENK, dy_RN, offsets_E)
    for result, expected in zip(results, _run(theirs, x_RK, w_ENK, dy_RN), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("rounds", [True, False])
def test_linear_layers_are_those_of_torchao_in_mx(rounding: str, rounds: bool) -> None:
    """Bit for bit."""
    torchao = import_quietly("torchao.prototype.moe_training.mxfp8_linear")
    mode = torchao.ScaleCalculationMode.RCEIL if rounding == "up" else torchao.ScaleCalculationMode.FLOOR
    x_TK, w_1NK, dy_TN, _ = _operands([96])
    operands = x_TK.view(3, 32, K), w_1NK[0], dy_TN.view(3, 32, N)
    results = _run(
        ScaledLinearProduct(EmulatedKernels(Scaling("block", rounding)), rounds),  # type: ignore[arg-type]
        *operands,
    )
    emulated = torchao.KernelPreference.EMULATED
    expected = _run(lambda x, w: torchao._to_mxfp8_then_scaled_mm(x, w, emulated, mode, not rounds), *operands)
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)


class _TorchaoCasts(torch.autograd.Function):
    """Experts in FP8, with a scale per row: torchao's casts, loops over experts in float32."""

    @staticmethod
    def cast(values: Tensor, dim: int) -> Tensor:
        utils = import_quietly("torchao.float8.float8_utils")
        axis = import_quietly("torchao.float8.config").ScalingGranularity.AXISWISE
        scale = utils.tensor_to_scale(values, torch.float8_e4m3fn, False, None, axis, dim, True)
        return utils.to_fp8_saturated(values.float() * scale, torch.float8_e4m3fn).float() / scale

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, w_ENK: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_RK, w_ENK)
        ctx.counts, cast = counts, _TorchaoCasts.cast
        groups = zip(x_RK.split(counts), w_ENK, strict=True)
        return torch.cat([cast(x, -1) @ cast(w, -1).T for x, w in groups]).to(x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor, Tensor, None]:
        (x_RK, w_ENK), counts, cast = ctx.saved_tensors, ctx.counts, _TorchaoCasts.cast
        dy = dy_RN.split(counts)
        dx_RK = torch.cat([cast(dy_e, -1) @ cast(w, -2) for dy_e, w in zip(dy, w_ENK, strict=True)])
        groups = zip(dy, x_RK.split(counts), strict=True)
        dw_ENK = torch.stack([cast(dy_e, 0).T @ cast(x, 0) for dy_e, x in groups])
        return dx_RK.to(dy_RN.dtype), dw_ENK.to(dy_RN.dtype), None


@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float32, 120.0), (torch.bfloat16, 50.0)])
@pytest.mark.parametrize("counts", [[32, 64, 32, 96], [1, 300, 33, 7]], ids=str)
def test_experts_have_the_values_of_torchaos_casts_in_rows(
    dtype: torch.dtype, least_db: float, counts: list[int]
) -> None:
    """But for rounding of the products' own dtype."""
    x_RK, w_ENK, dy_RN, offsets_E = _operands(counts, dtype)
    results = _run(_grouped(Scaling("row")), x_RK, w_ENK, dy_RN, offsets_E)
    expected = _run(_TorchaoCasts.apply, x_RK, w_ENK, dy_RN, counts)
    for result, reference in zip(results, expected, strict=True):
        assert _sqnr(result, reference.double()) > least_db


@pytest.mark.parametrize("kernel", ["loop", "torch"])
@pytest.mark.parametrize("scaling", [None, *GROUPED], ids=_names)
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("num_rows", [0, 40])
def test_rows_of_no_expert(
    kernel: Kernel, scaling: Scaling | None, rounds: bool, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold NaN and are not read; results are zero there, in memory that was NaN before."""
    counts, num_tail = COUNTS["empty experts"], 32
    x_RK, w_ENK, dy_RN, offsets_E = _operands(counts)
    product = PlainGroupedProduct(kernel) if scaling is None else _grouped(scaling, rounds, kernel)
    without = _run(product, x_RK, w_ENK, dy_RN, offsets_E)
    new_empty, grouped_mm = Tensor.new_empty, F.grouped_mm

    def poisoned(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = grouped_mm(rows, *args, **kwargs)
        if result.dim() == 2:
            result[sum(counts) :] = float("nan")
        return result

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **kw: new_empty(self, *size, **kw).fill_(float("nan")))
    monkeypatch.setattr(F, "grouped_mm", poisoned)
    x_RK, dy_RN = (F.pad(tensor, (0, 0, 0, num_tail), value=float("nan")) for tensor in (x_RK, dy_RN))
    y_RN, dx_RK, dw_ENK = _run(product, x_RK, w_ENK, dy_RN, offsets_E, num_rows)
    for result, expected in ((y_RN, without[0]), (dx_RK, without[1])):
        assert not result[sum(counts) :].any()
        assert torch.equal(result[: sum(counts)], expected)
    assert torch.equal(dw_ENK, without[2])


class _Counting(EmulatedKernels):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__(Scaling("row"))
        self.calls: list[str] = []

    def quantize_rows(self, x_RC: Tensor, offsets_E: Tensor | None) -> Operand:
        self.calls.append("rows")
        return super().quantize_rows(x_RC, offsets_E)

    def quantize_weights(self, w_ENK: Tensor, along: Any) -> Operand:
        self.calls.append(f"weights {along}")
        return super().quantize_weights(w_ENK, along)

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        self.calls.append("weight gradient")
        return super().weight_gradient(dy_RN, x_RK, offsets_E)

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


KINDS = ["linear", "experts"]


class _Layer(nn.Module):
    """A linear layer or experts; `expected` is made anew each time, with nothing kept."""

    def __init__(self, kind: str, keeps_frozen: bool = True) -> None:
        super().__init__()
        self.x_RK, w_ENK, self.dy_RN, offsets_E = _operands(COUNTS["odd"], torch.float32)
        self.kernels, self.args = _Counting(), (offsets_E,) if kind == "experts" else ()
        self.weight = nn.Parameter(w_ENK if kind == "experts" else w_ENK[0], requires_grad=False)
        self.make: type[LowPrecisionProduct] = ScaledGroupedProduct if kind == "experts" else ScaledLinearProduct
        self.product: Any = self.make(self.kernels, keeps_frozen=keeps_frozen)

    def forward(self, x_RK: Tensor) -> Tensor:
        y: Tensor = self.product(x_RK, self.weight, *self.args)
        return y

    def step(self) -> tuple[list[str], Tensor, Tensor]:
        """What was asked for, y and dx; checked against a product that has nothing to keep."""
        y, dx = self._run(self.product)
        calls = self.kernels.take()
        for result, expected in zip((y, dx), self._run(self.make(EmulatedKernels(Scaling("row")))), strict=True):
            assert torch.equal(result, expected)
        return calls, y, dx

    def _run(self, product: Any) -> tuple[Tensor, Tensor]:
        x_RK = self.x_RK.detach().to(self.weight.dtype).requires_grad_()
        y = product(x_RK, self.weight, *self.args)
        (dx,) = torch.autograd.grad(y, x_RK, self.dy_RN.to(y.dtype))
        return y.detach(), dx

    @property
    def num_kept(self) -> int:
        return len(self.product._kept)


FIRST = ["rows", "weights in", "weights out", "rows"]
LATER = ["rows", "rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_weight_is_quantised_once(kind: str) -> None:
    layer = _Layer(kind)
    assert layer.step()[0] == FIRST
    for _ in range(2):
        assert layer.step()[0] == LATER
    layer.eval()
    assert layer.step()[0] == LATER
    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert layer.step()[0] == FIRST
    assert layer.step()[0] == LATER
    layer.load_state_dict({"weight": torch.randn_like(layer.weight)})
    assert layer.step()[0] == FIRST


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_gathered_is_not_kept(kind: str) -> None:
    layer = _Layer(kind, keeps_frozen=False)
    for _ in range(2):
        assert layer.step()[0] == FIRST
    assert not layer.num_kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind: str, mode: Any) -> None:
    layer = _Layer(kind)
    with mode():
        first = layer(layer.x_RK)
        assert layer.kernels.take() == ["rows", "weights in"]
        assert torch.equal(layer(layer.x_RK), first)
        assert layer.kernels.take() == ["rows"]
        copied = copy.deepcopy(layer.weight)  # in inference mode it has no version
        assert torch.equal(layer.product(layer.x_RK, copied, *layer.args), first)
        layer.kernels.take()
        layer(layer.x_RK)
    assert layer.kernels.take().count("weights in") == (1 if mode is torch.no_grad else 0)
    assert layer.step()[0] == ["rows", "weights out", "rows"]
    assert layer.step()[0] == LATER
    with mode():
        assert torch.equal(layer(layer.x_RK), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainable_weight_is_never_kept(kind: str) -> None:
    layer = _Layer(kind)
    layer.weight.requires_grad_()
    for view in (lambda w: w, lambda w: w.flatten().view_as(w)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                layer.product(layer.x_RK, view(layer.weight), *layer.args)
            assert layer.kernels.take() == ["rows", "weights in"] and not layer.num_kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_unfrozen_trains_and_one_that_is_frozen_stays(kind: str) -> None:
    layer = _Layer(kind)
    layer.step()
    assert layer.num_kept == 2
    layer.weight.requires_grad_()
    before = layer(layer.x_RK)
    before.backward(layer.dy_RN)
    assert layer.kernels.take() == ["rows", "weights in", "weight gradient"] and not layer.num_kept
    assert layer.weight.grad is not None
    layer.weight.data.sub_(layer.weight.grad)  # which autograd does not count
    assert not torch.equal(layer(layer.x_RK), before)
    layer.weight.requires_grad_(False)
    layer.kernels.take()
    assert layer.step()[0] == FIRST and layer.step()[0] == LATER


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("free", ["layer", "memory", "dtype"])
def test_what_is_kept_goes_with_the_weight(kind: str, free: str) -> None:
    layer: Any = _Layer(kind)
    layer.step()
    kept = [weakref.ref(operand) for _, _, (operand,) in layer.product._kept.values()]
    product = layer.product
    assert len(kept) == 2 and all(operand() is not None for operand in kept)
    if free == "memory":
        layer.weight.data = layer.weight.data * 2
    elif free == "dtype":
        layer.to(torch.bfloat16)
    else:
        del layer
    gc.collect()
    assert not product._kept and all(operand() is None for operand in kept)
    if free != "layer":
        assert layer.step()[0] == FIRST  # the right values, though the parameter is the same


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_of_the_same_memory_are_not_mixed_up(kind: str) -> None:
    layer = _Layer(kind)
    memory = torch.randn(2, *layer.weight.shape)
    for weight in (memory[0], memory[1], memory[1].flip(0), memory[0].transpose(-2, -1).contiguous().transpose(-2, -1)):
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert layer.step()[0] == FIRST
    layer.weight = nn.Parameter(memory[0].clone(), requires_grad=False)
    assert layer.step()[0] == FIRST
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert not other.step()[1].any()
    assert layer.step()[0] == LATER


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["x", "w"])
def test_only_the_gradients_that_are_needed_are_computed(kind: str, frozen: str) -> None:
    layer = _Layer(kind)
    x_RK = layer.x_RK.requires_grad_(frozen != "x")
    layer.weight.requires_grad_(frozen != "w")
    layer(x_RK).backward(layer.dy_RN)
    expected = ["weight gradient"] if frozen == "x" else ["weights out", "rows"]
    assert layer.kernels.take() == ["rows", "weights in", *expected]
    assert (x_RK.grad is None) == (frozen == "x") and (layer.weight.grad is None) == (frozen == "w")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_backward_pass_in_two_parts_computes_each_gradient_once(kind: str, is_leaf: bool) -> None:
    layer = _Layer(kind)
    leaf, weight = layer.x_RK.requires_grad_(), layer.weight.requires_grad_()

    def run() -> Tensor:
        y: Tensor = layer.product(leaf * 1.0, weight if is_leaf else weight * 1.0, *layer.args)
        return y

    whole = torch.autograd.grad(run(), (leaf, weight), layer.dy_RN)
    y = run()
    layer.kernels.take()
    (dx,) = torch.autograd.grad(y, leaf, layer.dy_RN, retain_graph=True)
    assert layer.kernels.take() == ["weights out", "rows"]
    (dw,) = torch.autograd.grad(y, weight, layer.dy_RN)
    assert layer.kernels.take() == ["weight gradient"]
    assert torch.equal(dx, whole[0]) and torch.equal(dw, whole[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [True, False])
def test_strided_input_and_gradients(kind: str, rounds: bool) -> None:
    layer = _Layer(kind)
    layer.weight.requires_grad_()
    product: Any = layer.make(EmulatedKernels(Scaling("block")), rounds)
    for dy_RN in (torch.ones(()).expand_as(layer.dy_RN), layer.dy_RN.t().contiguous().t()):
        strided = layer.x_RK.repeat_interleave(2, 1)[:, ::2]
        results = _run(product, strided, layer.weight, dy_RN, *layer.args)
        expected = _run(product, layer.x_RK, layer.weight, dy_RN.contiguous(), *layer.args)
        for result, reference in zip(results, expected, strict=True):
            assert torch.equal(result, reference)
    x_RK = layer.x_RK.requires_grad_()
    product(x_RK, layer.weight, *layer.args).sum().backward()
    assert x_RK.grad is not None and x_RK.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_is_refused(kind: str) -> None:
    layer = _Layer(kind)
    x_RK = layer.x_RK.requires_grad_()
    layer.weight.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x_RK).square().sum(), x_RK, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|differentiate"):
        torch.autograd.grad(dx.sum(), x_RK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("scaling", [Scaling("row"), Scaling("block")], ids=_names)
def test_compiles_without_a_graph_break(kind: str, is_frozen: bool, scaling: Scaling) -> None:
    layer = _Layer(kind)
    layer.weight.requires_grad_(not is_frozen)
    x_RK = layer.x_RK.requires_grad_()
    results = []
    for compiles in (False, True):
        product: Any = layer.make(EmulatedKernels(scaling))
        function = torch.compile(product.__call__, backend="aot_eager", fullgraph=True) if compiles else product
        y = function(x_RK, layer.weight, *layer.args)
        inputs = [x_RK] if is_frozen else [x_RK, layer.weight]
        results.append((y, *torch.autograd.grad(y, inputs, layer.dy_RN)))
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)
