"""The choice of what multiplies: what a device has, what a trial finds, and never the slow one by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from titanmoe.ops import backends
from titanmoe.ops.backends import (
    BACKENDS,
    EMULATED,
    Kind,
    NoBackendError,
    NumberFormat,
    choose_backend,
    choose_grouped_kernel,
)
from titanmoe.ops.float8 import Scaling

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SCALING = {"scaled_mm": Scaling("tensor"), "scaled_grouped_mm": Scaling("row"), "torchao": Scaling("block")}


class Machine:
    """A GPU that is not there, and what trials on it would find."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.capability, self.arch, self.failure = (9, 0), "", ""
        self.trials: list[tuple[str, str, str]] = []
        patch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=self.arch))
        patch.setattr(backends, "probe", self.probe)
        self.patch = patch

    def probe(self, name: str, kind: str, number_format: str, device: torch.device) -> str:
        assert device == GPU
        self.trials.append((name, kind, number_format))
        return self.failure

    def becomes_amd(self, arch: str) -> None:
        self.arch = arch
        self.patch.setattr(torch.version, "hip", "7.0")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


ALL: list[tuple[Kind, NumberFormat]] = list(BACKENDS)


@pytest.mark.parametrize(("kind", "number_format"), ALL)
def test_a_cpu_has_none_but_can_emulate_them(kind: Kind, number_format: NumberFormat) -> None:
    with pytest.raises(NoBackendError, match=r"needs an NVIDIA GPU of compute capability .*; this is a cpu device"):
        choose_backend(kind, number_format, CPU)
    name = BACKENDS[kind, number_format][0].name
    with pytest.raises(NoBackendError, match=f'"{name}" needs'):
        choose_backend(kind, number_format, CPU, name)
    assert choose_backend(kind, number_format, CPU, emulate=True) is EMULATED
    assert choose_backend(kind, number_format, CPU, "emulated") is EMULATED
    assert choose_backend(kind, number_format, CPU, name, emulate=True) is EMULATED


@pytest.mark.parametrize(
    ("kind", "number_format", "capability", "name"),
    [
        ("linear", "float8", (8, 9), "scaled_mm"),
        ("linear", "float8", (9, 0), "scaled_mm"),
        ("linear", "float8", (10, 0), "scaled_mm"),
        ("grouped_mm", "float8", (9, 0), "scaled_grouped_mm"),
        ("linear", "mx", (10, 0), "torchao"),
    ],
)
def test_what_a_gpu_has_is_tried_first(
    machine: Machine, kind: Kind, number_format: NumberFormat, capability: tuple[int, int], name: str
) -> None:
    machine.capability = capability
    backend = choose_backend(kind, number_format, GPU)
    assert backend.name == name
    assert machine.trials == [(name, kind, number_format)]
    assert backend.kernels(SCALING[name]).name == name
    machine.failure = "dw is wrong"
    with pytest.raises(NoBackendError, match=f'"{name}" dw is wrong'):
        choose_backend(kind, number_format, GPU)


def test_a_backend_that_is_named_is_not_tried(machine: Machine) -> None:
    machine.failure = "dw is wrong"
    assert choose_backend("grouped_mm", "float8", GPU, "scaled_grouped_mm").name == "scaled_grouped_mm"
    assert not machine.trials


@pytest.mark.parametrize(
    ("kind", "number_format", "capability", "why"),
    [
        ("linear", "float8", (8, 0), r"this is NVIDIA H100, 8\.0"),
        ("grouped_mm", "float8", (8, 9), r"this is NVIDIA H100, 8\.9"),
        ("grouped_mm", "float8", (10, 0), "ao#2904"),
        ("grouped_mm", "float8", (10, 3), "pytorch#187095"),
        ("grouped_mm", "float8", (12, 0), r"this is NVIDIA H100, 12\.0"),
        ("linear", "mx", (9, 0), r"this is NVIDIA H100, 9\.0"),
        ("grouped_mm", "mx", (12, 0), r"this is NVIDIA H100, 12\.0"),
    ],
)
def test_what_a_gpu_does_not_have_is_not_even_tried(
    machine: Machine, kind: Kind, number_format: NumberFormat, capability: tuple[int, int], why: str
) -> None:
    machine.capability = capability
    for wanted in ("auto", BACKENDS[kind, number_format][0].name):
        with pytest.raises(NoBackendError, match=why):
            choose_backend(kind, number_format, GPU, wanted)
    assert not machine.trials


def test_packages_that_are_missing_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.prototype.moe_training.kernels.mxfp8 import cute_utils

    machine.capability = (10, 0)
    monkeypatch.setattr(cute_utils, "_missing_cutedsl_runtime_packages", lambda: ["nvidia-cutlass-dsl"])
    with pytest.raises(NoBackendError, match="not installed: nvidia-cutlass-dsl"):
        choose_backend("grouped_mm", "mx", GPU)
    monkeypatch.setattr(cute_utils, "_missing_cutedsl_runtime_packages", list)
    assert choose_backend("grouped_mm", "mx", GPU).name == "torchao"


def test_an_mi300_has_its_own_codes(machine: Machine) -> None:
    machine.becomes_amd("gfx942:sramecc+:xnack-")
    for kind, name in (("linear", "scaled_mm"), ("grouped_mm", "scaled_grouped_mm")):
        kernels = choose_backend(kind, "float8", GPU).kernels(Scaling("row"))  # type: ignore[arg-type]
        assert (kernels.name, kernels.scaling.dtype) == (name, torch.float8_e4m3fnuz)  # type: ignore[attr-defined]
    with pytest.raises(NoBackendError, match="this is gfx942"):
        choose_backend("grouped_mm", "mx", GPU)
    machine.becomes_amd("gfx950:sramecc+:xnack-")
    kernels = choose_backend("linear", "float8", GPU).kernels(Scaling("row"))
    assert kernels.scaling.dtype == torch.float8_e4m3fn  # type: ignore[attr-defined]
    with pytest.raises(NoBackendError, match="this is gfx950"):
        choose_backend("grouped_mm", "float8", GPU)


def test_the_plain_product_of_experts(machine: Machine) -> None:
    assert choose_grouped_kernel(CPU) == ("auto", "")
    assert choose_grouped_kernel(GPU, "loop") == ("loop", "")
    assert choose_grouped_kernel(GPU, "torch") == ("torch", "")
    assert not machine.trials
    assert choose_grouped_kernel(GPU) == ("torch", "")
    machine.failure = "dw is not zero for an expert without rows"
    assert choose_grouped_kernel(GPU) == ("loop", machine.failure)
    assert machine.trials == 2 * [("torch", "grouped_mm", "bfloat16")]


@pytest.mark.parametrize(
    ("arch", "hip", "kernel", "num_trials"),
    [
        ("gfx1201", "7.1.25424-4179531dcd", "loop", 0),
        ("gfx1200:sramecc-:xnack-", "7.12.1", "loop", 0),
        ("gfx1201", "7.13.0", "torch", 1),
        ("gfx942:sramecc+:xnack-", "7.1.25424-4179531dcd", "torch", 1),
    ],
)
def test_what_is_known_to_end_a_process_is_not_tried(
    machine: Machine, arch: str, hip: str, kernel: str, num_trials: int
) -> None:
    machine.arch = arch
    machine.patch.setattr(torch.version, "hip", hip)
    found, failure = choose_grouped_kernel(GPU)
    assert found == kernel and len(machine.trials) == num_trials
    assert ("ROCm/TheRock#5284" in failure) == (kernel == "loop")
