"""Optimizers and their parameter groups."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from titanmoe.config.errors import ConfigError
from titanmoe.ops.quiet_import import import_quietly

logger = logging.getLogger("titanmoe")

Implementation = Literal["for-loop", "foreach", "fused"]


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    implementation: Implementation,
) -> Optimizer:
    """An optimizer over the parameters of `model` that require a gradient, in the groups of `parameter_groups`.

    "AdamW" is torch's (Loshchilov and Hutter, arXiv 1711.05101); its state has the parameters' dtype and placement,
    two numbers per parameter. "AdamW8bit" is torchao's (Dettmers et al., arXiv 2110.02861): that state in 8 bits with
    a float32 scale per 256 values, for every local shard of at least 4096 values that 256 divides; others stay whole.
    It ignores `implementation`: its update is one compiled kernel per parameter shape on a GPU, and runs uncompiled
    on a CPU, where it is slow (about 0.2 microseconds per parameter) but needs no compiler and starts at once.

    Raises:
        ConfigError: an unknown name, nothing to train, or AdamW8bit on a GPU without Triton and a C compiler.
    """
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ConfigError(
            "no parameter of the model, or of a stage of a pipeline, requires a gradient",
            where="optimizer",
            mend="train the model itself, or add adapters with model.converters, to modules of every stage",
        )
    if name == "AdamW":
        flags: dict[str, Any] = {"fused": implementation == "fused", "foreach": implementation == "foreach"}
        return AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **flags)
    if name == "AdamW8bit":
        return _adamw_8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    raise ConfigError(f"unknown optimizer {name!r}", where="optimizer.name", mend="known: AdamW, AdamW8bit")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by whether weight decay applies; groups without parameters are left out.

    No decay for the parameters of norm layers, for biases, for magnitudes of adapters, and for any other of at most one
    dim. Everything else decays: projections, experts, routers, adapters, and embeddings too, as in torchtitan and
    Megatron. A parameter that two modules share counts once, where it comes first.
    """
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_norm = type(module).__name__.endswith("Norm")
            is_exempt = parameter.dim() <= 1 or name.endswith(("bias", "magnitude")) or is_norm
            (exempt if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    device_type = groups[0]["params"][0].device.type
    if device_type != "cpu":
        _check_can_compile()
    AdamW8bit = import_quietly("torchao.optim").AdamW8bit
    states = import_quietly("torchao.optim.subclass_8bit").OptimState8bit

    class Plain(AdamW8bit):  # type: ignore[misc, valid-type]
        """States that are computed with in float32 say so, whatever the parameter's dtype: torchao's (0.18) take that
        one, of which a DTensor hears, and lose it in the first view of them.
        """

        @staticmethod
        def _subclass_zeros(parameter: Tensor, signed: bool, block_size: int) -> Any:
            return states.zeros(parameter.shape, signed, block_size, parameter.device)

    class Uncompiled(Plain):
        """torchao compiles its update; on a CPU that takes half a minute and a C++ compiler."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    if device_type == "cpu":
        logger.info("AdamW8bit runs uncompiled on a CPU: correct, but much slower than AdamW")
    optimizer: Optimizer = (Uncompiled if device_type == "cpu" else Plain)(groups, **settings)
    return optimizer


def _check_can_compile() -> None:
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    missing = "Triton" if importlib.util.find_spec("triton") is None else ""
    if not any(shutil.which(compiler) for compiler in compilers):
        missing = f"{missing} and a C compiler" if missing else f"a C compiler ({' or '.join(compilers)})"
    if missing:
        raise ConfigError(
            f"AdamW8bit compiles its update on a GPU, and {missing} was not found",
            where="optimizer.name",
            mend="install what is missing, or set optimizer.name = 'AdamW'",
        )
