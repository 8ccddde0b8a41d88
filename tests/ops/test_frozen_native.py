"""FP8 products with codes as they are stored: their numbers, their layouts as torch checks them, and their choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.native import needs_capability, poison, random_operands, scaled_grouped_mm
from tests.ops.test_backends import CPU, GPU, Machine
from titanmoe.ops import frozen_backends, frozen_trial, trial
from titanmoe.ops.backends import Kind, NoBackendError
from titanmoe.ops.float8 import Scaling, rounded
from titanmoe.ops.frozen import FrozenKernels, FrozenWeight, Parts
from titanmoe.ops.frozen_backends import NATIVE, choose_kernels
from titanmoe.ops.frozen_formats import format_named
from titanmoe.ops.frozen_native import EmulatedFrozenKernels, block_scaled_mm
from titanmoe.ops.frozen_trial import OfPlainWeights, slowness
from titanmoe.ops.scaled_casts import FP8

CASES: list[tuple[Kind, str]] = list(NATIVE)
each_case = pytest.mark.parametrize(("kind", "name"), CASES)
N, K = 256, 384
COUNTS = (3, 0, 37, 24)


class Case:
    """A weight in some format, rows, and the gradient of what becomes of them."""

    def __init__(self, kind: Kind, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.format = format_named(name)
        grouped = kind == "grouped_mm"
        operands = random_operands(COUNTS if grouped else sum(COUNTS), K, N, device, dtype, tail=5)
        self.x, self.dy = operands.x.requires_grad_(), operands.dy
        self.weight = OfPlainWeights(kind, self.format, None).stored(operands.w.float())
        self.arguments = (operands.offsets,) if grouped else ()
        self.counts = COUNTS if grouped else (sum(COUNTS),)
        self.kind = kind

    def computed_by(self, kernels: FrozenKernels | None) -> tuple[Tensor, Tensor]:
        """y and dx."""
        y = OfPlainWeights(self.kind, self.format, kernels).product(self.x, self.weight, *self.arguments)
        return y.detach(), *torch.autograd.grad(y, self.x, self.dy)

    def exact(self) -> tuple[Tensor, Tensor]:
        """In float64 of rows that are rounded as a scale per output, or blocks of 128, have it."""
        y, dx = torch.zeros_like(self.dy, dtype=torch.float64), torch.zeros_like(self.x, dtype=torch.float64)
        start, row = 0, Scaling("row")
        for expert, count in enumerate(self.counts):
            rows, start = slice(start, start + count), start + count
            w = self.weight.experts(expert) if self.kind == "grouped_mm" else self.weight
            values = w.dequantize(torch.float32).double()
            x, dy = self.x.detach()[rows].float(), self.dy[rows].float()
            if self.format.name == "float8-block":
                x, dy = (rounded(it.unflatten(1, (-1, 128)), -1, row).flatten(1) for it in (x, dy))
                y[rows], dx[rows] = x.double() @ values.T, dy.double() @ values
            else:
                scale = w.parts[1].view(torch.float32).flatten()
                codes = w.parts[0].view(FP8).double()
                y[rows] = rounded(x, -1, row).double() @ values.T
                dx[rows] = rounded(dy * scale, -1, row).double() @ codes
        return y, dx


def _scaled_mm(a: Tensor, b: Tensor, a_scales: Tensor, a_recipe: Any, b_scales: Tensor, b_recipe: Any, **_: Any) -> Any:
    """`F.scaled_mm` of blocks as cuBLAS documents it: scales of rows side by side, those of b padded to fours."""
    (m, k), n = a.shape, b.shape[1]
    recipe = torch.nn.functional.ScalingType
    assert (a_recipe, b_recipe) == (recipe.BlockWise1x128, recipe.BlockWise128x128)
    assert m % 16 == 0 and a.is_contiguous() and b.t().is_contiguous()
    assert a_scales.shape == (m, k // 128) and a_scales.t().is_contiguous()
    assert b_scales.shape == (-(-k // 512) * 4, n // 128) and b_scales.t().is_contiguous()
    left = a.float() * a_scales.repeat_interleave(128, 1)
    right = b.float() * b_scales[: k // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (left @ right).bfloat16()


@pytest.fixture
def slow_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    monkeypatch.setattr(F, "scaled_mm", _scaled_mm)


@each_case
def test_emulation_rounds_rows_alone(kind: Kind, name: str) -> None:
    case = Case(kind, name)
    for found, expected in zip(
        case.computed_by(EmulatedFrozenKernels(name == "float8-block")), case.exact(), strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("slow_kernels")
def test_native_numbers(kind: Kind, name: str, dtype: torch.dtype) -> None:
    """Codes and scales are those that are stored. Results are rounded to bfloat16."""
    if (kind, name) == ("linear", "float8-channel") and torch.__version__ < "2.13":
        pytest.skip("this torch multiplies no scaled rows on the CPU")
    case = Case(kind, name, dtype)
    for found, expected in zip(case.computed_by(NATIVE[kind, name][1]()), case.exact(), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-4 * float(expected.abs().max()))


@each_case
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_takes_the_layouts(kind: Kind, name: str, compiled: bool) -> None:
    """What runs are torch's checks; compiled in one graph, forward and backward."""
    case = Case(kind, name, torch.bfloat16)
    x = case.x.detach().to("meta").requires_grad_()
    weight = FrozenWeight(case.format, tuple(part.to("meta") for part in case.weight.parts), kind == "grouped_mm")
    product = OfPlainWeights(kind, case.format, NATIVE[kind, name][1]()).product
    arguments = [argument.to("meta") for argument in case.arguments]

    def function(x: Tensor) -> Tensor:
        return product(x, weight, *arguments)

    y = (torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function)(x)
    y.backward(torch.empty_like(y))
    assert y.shape == case.dy.shape and x.grad is not None and x.grad.shape == x.shape


def test_torch_wants_these_blocks() -> None:
    """What the test above relies on: F.scaled_mm itself says yes to the layout, on meta tensors."""
    sizes = {"x": (48, 384), "scales": (3, 48), "w": (256, 384), "w_scales": (2, 3)}
    x, scales, w, w_scales = (torch.empty(size, device="meta") for size in sizes.values())
    y = block_scaled_mm(x.to(FP8), scales, w.to(FP8), w_scales)
    assert (y.shape, y.dtype) == ((48, 256), torch.bfloat16)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(frozen_backends, "probe", machine.probe)
    return machine


@each_case
def test_what_is_right_and_faster_is_chosen(kind: Kind, name: str, machine: Machine) -> None:
    backend = NATIVE[kind, name][0].name
    kernels, why = choose_kernels(kind, name, GPU)
    assert kernels is not None and (kernels.name, why) == (backend, "")
    assert machine.trials == [(backend, kind, name)]
    machine.failure = "takes 2.00 ms where dequantising takes 1.00 ms"
    assert choose_kernels(kind, name, GPU) == (None, f'"{backend}" {machine.failure}')
    machine.trials.clear()
    assert choose_kernels(kind, name, GPU, "native")[0] is not None
    assert choose_kernels(kind, name, GPU, "dequantize") == (None, "")
    emulated, _ = choose_kernels(kind, name, CPU, "emulated")
    assert emulated is not None and emulated.feature_multiple == kernels.feature_multiple
    assert not machine.trials


@each_case
def test_a_cpu_dequantises(kind: Kind, name: str) -> None:
    kernels, why = choose_kernels(kind, name, CPU)
    assert kernels is None and "this is a cpu device" in why
    with pytest.raises(NoBackendError, match="this is a cpu device"):
        choose_kernels(kind, name, CPU, "native")


def test_what_is_not_even_tried(machine: Machine) -> None:
    assert choose_kernels("grouped_mm", "float8-block", GPU, "native") == (
        None,
        "torch has no product of experts with a scale per block",
    )
    for capability, tried in (((8, 9), ["scaled_mm"]), ((10, 0), ["scaled_mm"]), ((8, 0), [])):
        machine.capability = capability
        machine.trials.clear()
        for kind, name in CASES:
            choose_kernels(kind, name, GPU)
        assert [it[0] for it in machine.trials] == tried
    machine.becomes_amd("gfx942:sramecc+:xnack-")
    assert all("this is gfx942" in choose_kernels(*case, GPU)[1] for case in CASES)


class Wrong(EmulatedFrozenKernels):
    def input_gradient(self, dy_RN: Tensor, parts: Parts, offsets_E: Tensor | None, num_rows: int) -> Tensor:
        return super().input_gradient(dy_RN, parts, offsets_E, num_rows) * 1.1


@each_case
def test_a_trial_finds_what_is_wrong_or_slow(kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_NUM_FEATURES", (256, 128))
    monkeypatch.setattr(trial, "_NUM_FREE", 1 << 20)
    monkeypatch.setattr(frozen_trial, "_SIZES", {kind: (64, 256, 128)})
    times = [1e-3, 2e-3]
    monkeypatch.setattr(
        frozen_trial, "seconds", lambda *calls: [call() and it for call, it in zip(calls, times, strict=True)]
    )
    kernels: FrozenKernels = EmulatedFrozenKernels(name == "float8-block")
    monkeypatch.setattr(trial, "NATIVE", {(kind, name): (None, lambda: kernels)})
    assert trial.failure("", kind, name, CPU) == ""
    times.reverse()
    assert trial.failure("", kind, name, CPU) == "takes 2.00 ms where dequantising takes 1.00 ms"
    kernels = Wrong(name == "float8-block")
    assert "dx has a signal-to-noise ratio of" in trial.failure("", kind, name, CPU)


def test_times_are_the_least() -> None:
    tensor = torch.ones(1000, 1000)
    many, one = frozen_trial.seconds(lambda: [tensor.sum() for _ in range(20)], lambda: tensor.sum())
    assert 0 < one < many


@pytest.mark.gpu
@each_case
def test_on_a_gpu(kind: Kind, name: str) -> None:
    """Equal to what is emulated; tried as a job tries it; and what "auto" says of it."""
    needs_capability((9, 0), (9, 0))
    kernels = NATIVE[kind, name][1]()
    case = Case(kind, name, torch.bfloat16, "cuda")
    poison("cuda")
    found, expected = case.computed_by(kernels), case.computed_by(EmulatedFrozenKernels(name == "float8-block"))
    for one, other in zip(found, expected, strict=True):
        noise = (one.double() - other.double()).norm()
        assert 20 * torch.log10(other.double().norm() / noise) > 36
        assert not one[sum(COUNTS) :].any()
    weight = case.weight
    device = torch.device("cuda", 0)
    reason = trial.failure(kernels.name, kind, name, device)
    assert reason == "" or "where dequantising takes" in reason, reason
    print(slowness(kind, weight.format, kernels, device) or f"{kernels.name} is faster than dequantising")
