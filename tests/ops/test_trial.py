"""What a trial finds: nothing with right kernels, and each of the ways in which kernels are known to be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from titanmoe.ops import trial
from titanmoe.ops.backends import BACKENDS, NoBackendError, choose_backend
from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.scaled_product import Along, Operand, ScaledGroupedProduct, ScaledLinearProduct

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_NUM_FEATURES", (96, 64))
    monkeypatch.setattr(trial, "_NUM_FREE", 1 << 20)


SCALINGS = [Scaling("row"), Scaling("tensor"), Scaling("block"), Scaling("block", "down")]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_nothing_is_wrong_with_kernels_that_are_right(scaling: Scaling) -> None:
    kernels = EmulatedKernels(scaling)
    assert trial.try_linear(ScaledLinearProduct(kernels), CPU, trial.LIMIT["float8"]) == ""
    if scaling.shared_by != "tensor":  # which experts do not have: what is of no expert would spoil it
        assert trial.try_grouped(ScaledGroupedProduct(kernels), CPU, trial.LIMIT["float8"]) == ""


@pytest.mark.parametrize("kernel", ["torch", "loop"])
def test_nor_with_the_plain_product(kernel: str) -> None:
    assert trial.try_grouped(PlainGroupedProduct(kernel), CPU, trial.LIMIT["bfloat16"]) == ""  # type: ignore[arg-type]


class Broken(EmulatedKernels):
    """Right, but for what is done to its results."""

    def __init__(
        self, product: Callable[[Tensor, Tensor], object] | None, gradient: Callable[[Tensor, Tensor], object] | None
    ) -> None:
        super().__init__(Scaling("row"))
        self.product, self.gradient = product, gradient

    def multiply(
        self, rows: Operand, weights: Operand, along: Along, offsets_E: Tensor | None, num_rows: int
    ) -> Tensor:
        y = super().multiply(rows, weights, along, offsets_E, num_rows)
        if self.product is not None and offsets_E is not None:
            self.product(y, offsets_E)
        return y

    def weight_gradient(self, dy_RN: Tensor, x_RK: Tensor, offsets_E: Tensor | None) -> Tensor:
        dw = super().weight_gradient(dy_RN, x_RK, offsets_E)
        if self.gradient is not None and offsets_E is not None:
            self.gradient(dw, offsets_E)
        return dw


def leave_tail(y: Tensor, offsets: Tensor) -> None:
    y[offsets[-1] :] = 1e-30


def forget_last_row(y: Tensor, offsets: Tensor) -> None:
    y[offsets[-1] - 1] = torch.nan


def swap_experts(y: Tensor, offsets: Tensor) -> None:
    y[: offsets[0]] = y[: offsets[0]].flip(0)


def leave_empty_experts(dw: Tensor, offsets: Tensor) -> None:
    dw[torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0] = 1e-30


def double(dw: Tensor, offsets: Tensor) -> None:
    dw *= 1.1


@pytest.mark.parametrize(
    ("product", "gradient", "found"),
    [
        (leave_tail, None, "y is not zero in rows of no expert"),
        (forget_last_row, None, "y has a signal-to-noise ratio of nan dB"),
        (swap_experts, None, "y has a signal-to-noise ratio of"),
        (None, leave_empty_experts, "dw is not zero for an expert without rows"),
        (None, double, "dw has a signal-to-noise ratio of 19"),
    ],
)
def test_what_is_wrong_is_found(
    product: Callable[[Tensor, Tensor], object], gradient: Callable[[Tensor, Tensor], object], found: str
) -> None:
    assert trial.try_grouped(ScaledGroupedProduct(Broken(product, gradient)), CPU, 25.0).startswith(found)


def test_less_precision_than_promised_is_found() -> None:
    assert "less than 40" in trial.try_linear(ScaledLinearProduct(EmulatedKernels(Scaling("row"))), CPU, 40.0)


def test_all_that_can_be_configured_is_tried() -> None:
    assert trial._SCALINGS.keys() == BACKENDS.keys()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "number_format"), list(BACKENDS))
def test_what_this_gpu_has_is_right(kind: str, number_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    device = torch.device("cuda", 0)
    for backend in BACKENDS[kind, number_format]:  # type: ignore[index]
        try:
            choose_backend(kind, number_format, device, backend.name)  # type: ignore[arg-type]
        except NoBackendError as error:
            pytest.skip(str(error))
        assert trial.failure(backend.name, kind, number_format, device) == ""


@pytest.mark.gpu
def test_the_plain_product_of_this_gpu_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0 or later")
    assert trial.failure("torch", "grouped_mm", "bfloat16", torch.device("cuda", 0)) == ""
