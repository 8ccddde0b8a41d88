"""FSDP2 of torch before 2.13 with parameters of bytes: it would make each require a gradient, and cast it.

Later ones do neither. What is replaced is private to torch; this file goes with the support of those versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.torch_version import TorchVersion

_IS_NEEDED = torch.__version__ < TorchVersion("2.13")


@contextlib.contextmanager
def bytes_as_parameters() -> Iterator[None]:
    """Around `fully_shard`: a shard of bytes becomes a parameter that requires no gradient, not even for a moment."""
    if not _IS_NEEDED:
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    module: Any = _fsdp_param
    module.nn = SimpleNamespace(**{**vars(nn), "Parameter": parameter})
    try:
        yield
    finally:
        module.nn = nn


def keep_bytes(model: nn.Module) -> None:
    """After `fully_shard`, of all of it: no precision policy is for bytes."""
    for module in model.modules() if _IS_NEEDED else ():
        group: Any = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for shard in group.fsdp_params if group is not None else ():
            if not shard.sharded_param.is_floating_point():
                shard.init_dtype_attrs = _without_policy(shard.init_dtype_attrs)


def _without_policy(init_dtype_attrs: Any) -> Any:
    return lambda policy: init_dtype_attrs(MixedPrecisionPolicy())
