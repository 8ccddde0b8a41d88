"""Which kernels compute products in low precision on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.scaled_product import Kernels

Kind = Literal["linear", "grouped_mm"]
NumberFormat = Literal["float8", "mx"]


class NoBackendError(Exception):
    """No backend computes this product on this device; says why not, for each."""


@dataclass(frozen=True)
class Backend:
    """
    Attributes:
        name: as in the job config.
        hardware: what it needs, for people.
        kernels: makes its kernels for a scaling.
    """

    name: str
    hardware: str
    kernels: Callable[[Scaling], Kernels]


EMULATED = Backend("emulated", "any device", EmulatedKernels)


def choose_backend(
    kind: Kind, number_format: NumberFormat, device: torch.device, wanted: str = "auto", emulate: bool = False
) -> Backend:
    """
    Raises:
        NoBackendError: there is none on this device.
    """
    if emulate or wanted == "emulated":
        return EMULATED
    raise NoBackendError(f"a {device.type} device has no {number_format} products")
