"""What multiplies with frozen weights: kernels that take their codes, where they are right and faster; else none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from titanmoe.ops.backends import BACKENDS, Backend, Kind, NoBackendError, obstacle
from titanmoe.ops.frozen import FrozenKernels
from titanmoe.ops.frozen_native import ROW, BlockLinearKernels, ChannelKernels, EmulatedFrozenKernels
from titanmoe.ops.native_float8 import Float8GroupedKernels, Float8LinearKernels
from titanmoe.ops.probe import probe

# Codes are stored as e4m3fn, which an MI300 (gfx942) does not multiply.
_LINEAR = replace(
    BACKENDS["linear", "float8"][0],
    hardware="an NVIDIA GPU of compute capability 8.9 or later (L40S, H100, B200), or an AMD MI350",
    archs=("gfx950",),
)
_GROUPED = replace(
    BACKENDS["grouped_mm", "float8"][0], hardware="an NVIDIA GPU of compute capability 9.0 (H100, H200)", archs=()
)
_BLOCKS = replace(
    _GROUPED,
    name=BlockLinearKernels.name,
    hardware=f"{_GROUPED.hardware}, and CUDA 12.9 or later",
    capabilities=((9, 0), (9, 0)),
    broken=(),
)
NATIVE: Mapping[tuple[Kind, str], tuple[Backend, Callable[[], FrozenKernels]]] = MappingProxyType(
    {
        ("linear", "float8-channel"): (_LINEAR, lambda: ChannelKernels(Float8LinearKernels(ROW))),
        ("grouped_mm", "float8-channel"): (_GROUPED, lambda: ChannelKernels(Float8GroupedKernels(ROW))),
        ("linear", "float8-block"): (_BLOCKS, BlockLinearKernels),
    }
)
"""By kind of product and format: what the kernels need, and the kernels."""


def choose_kernels(
    kind: Kind, format_name: str, device: torch.device, wanted: str = "auto"
) -> tuple[FrozenKernels | None, str]:
    """
    Args:
        wanted: "native": kernels that take the codes, untried, if the device is one that may have them; "auto": those
            if, tried on this device, they are right, and faster than dequantising (see `probe`); "dequantize": none;
            "emulated": the numbers of native ones.

    Returns:
        The kernels, or None if weights are to be dequantised; and why, where they need not have been.

    Raises:
        NoBackendError: "native", and the device cannot have them.
    """
    if wanted == "dequantize":
        return None, ""
    if (kind, format_name) not in NATIVE:
        return None, "torch has no product of experts with a scale per block"
    if wanted == "emulated":
        return EmulatedFrozenKernels(format_name == "float8-block"), ""
    backend, kernels = NATIVE[kind, format_name]
    reason = obstacle(backend, device)
    if reason and wanted == "native":
        raise NoBackendError(f'"{backend.name}" {reason}')
    if not reason and wanted == "auto":
        reason = probe(backend.name, kind, format_name, device)
    return (None, f'"{backend.name}" {reason}') if reason else (kernels(), "")
