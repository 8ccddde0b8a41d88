"""Which kernels compute products on a device: found by trying, and never a slower one without being asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch

from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.grouped_mm import Kernel
from titanmoe.ops.native_float8 import Float8GroupedKernels, Float8LinearKernels
from titanmoe.ops.native_mx import MXGroupedKernels, MXLinearKernels, missing_packages
from titanmoe.ops.probe import probe
from titanmoe.ops.scaled_product import Kernels

Kind = Literal["linear", "grouped_mm"]
NumberFormat = Literal["float8", "mx"]
Capability = tuple[int, int]
"""Compute capability, of NVIDIA's GPUs."""


class NoBackendError(Exception):
    """No backend computes this product on this device; says why not, for each."""


@dataclass(frozen=True)
class Backend:
    """
    Attributes:
        name: as in the job config.
        hardware: what it needs, for people.
        kernels: makes its kernels for a scaling.
        capabilities: the first and the last NVIDIA GPUs that may have it; where they are not said, any device has it.
        archs: AMD GPUs that have it.
        broken: GPUs between those that are known not to, and why.
        missing: packages that it needs, and that are not installed.
    """

    name: str
    hardware: str
    kernels: Callable[[Scaling], Kernels]
    capabilities: tuple[Capability, Capability] | None = None
    archs: tuple[str, ...] = ()
    broken: tuple[tuple[Capability, str], ...] = ()
    missing: Callable[[], list[str]] = list


EMULATED = Backend("emulated", "any device", EmulatedKernels)

_SCALED_MM = Backend(
    "scaled_mm",
    "an NVIDIA GPU of compute capability 8.9 or later (L40S, H100, B200), or an AMD MI300 or MI350",
    Float8LinearKernels,
    capabilities=((8, 9), (12, 9)),
    archs=("gfx942", "gfx950"),
)
_SCALED_GROUPED_MM = Backend(
    "scaled_grouped_mm",
    "an NVIDIA GPU of compute capability 9.0 (H100, H200), or an AMD MI300",
    Float8GroupedKernels,
    capabilities=((9, 0), (10, 9)),
    archs=("gfx942",),
    broken=(
        ((10, 0), "its kernel for rows with a scale is made for 9.0 alone (pytorch/ao#2904)"),
        ((10, 3), "its kernel for rows with a scale ends the process (pytorch#187095)"),
    ),
)
_MX_HARDWARE = "an NVIDIA GPU of compute capability 10.0 (B200), and CUDA 12.8 or later"
_MX_CAPABILITIES = ((10, 0), (10, 9))

BACKENDS: Mapping[tuple[Kind, NumberFormat], tuple[Backend, ...]] = MappingProxyType(
    {
        ("linear", "float8"): (_SCALED_MM,),
        ("grouped_mm", "float8"): (_SCALED_GROUPED_MM,),
        ("linear", "mx"): (Backend("torchao", _MX_HARDWARE, MXLinearKernels, _MX_CAPABILITIES),),
        ("grouped_mm", "mx"): (
            Backend("torchao", _MX_HARDWARE, MXGroupedKernels, _MX_CAPABILITIES, missing=missing_packages),
        ),
    }
)
"""The fastest first."""


def choose_backend(
    kind: Kind, number_format: NumberFormat, device: torch.device, wanted: str = "auto", emulate: bool = False
) -> Backend:
    """
    Args:
        wanted: the name of a backend, which is taken untried if the device is one that may have it; or "auto": the
            first that is tried on this device and found right (see `probe`).
        emulate: take none that needs hardware.

    Raises:
        NoBackendError: there is none on this device.
    """
    if emulate or wanted == EMULATED.name:
        return EMULATED
    backends = [backend for backend in BACKENDS[kind, number_format] if wanted in ("auto", backend.name)]
    assert backends, wanted
    reasons = []
    for backend in backends:
        reason = obstacle(backend, device)
        if not reason and wanted == "auto":
            reason = probe(backend.name, kind, number_format, device)
        if not reason:
            return on_device(backend, device)
        reasons.append(f'"{backend.name}" {reason}')
    number_format_name = {"float8": "FP8", "mx": "MXFP8"}[number_format]
    what = "experts" if kind == "grouped_mm" else "linear layers"
    raise NoBackendError(f"no backend computes {number_format_name} products of {what} here: {'; '.join(reasons)}")


def obstacle(backend: Backend, device: torch.device) -> str:
    """Why a device cannot have a backend, as far as can be told without trying; "" if it may."""
    if backend.capabilities is None:
        return ""
    needs = f"needs {backend.hardware}"
    if device.type != "cuda":
        return f"{needs}; this is a {device.type} device"
    if torch.version.hip:
        arch = _arch(device)
        return "" if arch in backend.archs else f"{needs}; this is {arch}"
    capability = torch.cuda.get_device_capability(device)
    version = ".".join(map(str, capability))
    for broken, why in backend.broken:
        if capability == broken:
            return f"does not work on compute capability {version}: {why}"
    first, last = backend.capabilities
    if not first <= capability <= last:
        return f"{needs}; this is {torch.cuda.get_device_name(device)}, {version}"
    missing = backend.missing()
    return f"needs packages that are not installed: {', '.join(missing)}" if missing else ""


def on_device(backend: Backend, device: torch.device) -> Backend:
    """The backend with codes as this device has them: an MI300's e4m3 has another largest value."""
    if device.type != "cuda" or not torch.version.hip or _arch(device) != "gfx942":
        return backend
    return replace(backend, kernels=lambda scaling: backend.kernels(replace(scaling, dtype=torch.float8_e4m3fnuz)))


def _arch(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def choose_grouped_kernel(device: torch.device, wanted: Kernel = "auto") -> tuple[Kernel, str]:
    """What multiplies rows with the weights of their experts, in the dtype that they have.

    Returns:
        The kernel; and where "auto" became the slow one, why.
    """
    if wanted != "auto" or device.type != "cuda":
        return wanted, ""
    failure = _known_failure(device) or probe("torch", "grouped_mm", "bfloat16", device)
    return ("loop", failure) if failure else ("torch", "")


def _known_failure(device: torch.device) -> str:
    """What need not be tried: it would end the process that tries it."""
    hip = torch.version.hip
    if hip is None or _arch(device) not in ("gfx1200", "gfx1201"):
        return ""
    is_old = tuple(int(number) for number in hip.split(".")[:2]) < (7, 13)
    return f"ROCm {hip} has no kernel for {_arch(device)} (ROCm/TheRock#5284)" if is_old else ""
