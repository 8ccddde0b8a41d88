"""What a model must be like to be spread over a mesh."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.config.sizes import Degrees
from titanmoe.models.decoder import Decoder
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.models.spec import DecoderSpec, Dense, MoE, num_experts, num_heads
from titanmoe.ops.frozen_formats import column_multiple, row_multiple
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.shards import tensor_dim


def check_model_can_be_split(spec: DecoderSpec, degrees: Degrees) -> None:
    """
    Raises:
        ConfigError: not every rank would get as much as the others of what one of the degrees deals.
    """
    experts = num_experts(spec)
    if degrees.ep > 1 and not experts:
        raise ConfigError("the model has no experts", where=_EXPERT, mend="Set it to 1.")
    _check(_EXPERT, "experts", experts, degrees.ep)
    what = "attention heads"
    if degrees.cp > 1 and degrees.tp > 1:
        _check(f"{_CONTEXT} * {_TENSOR}", what, num_heads(spec), degrees.cp * degrees.tp)
    _check(_CONTEXT, what, num_heads(spec), degrees.cp)
    _check(_TENSOR, what, num_heads(spec), degrees.tp)
    _check(_TENSOR, "hidden units of feed-forwards", _hidden_dims(spec), degrees.tp)
    _check(_TENSOR, "words", [spec.vocab_size], degrees.tp)
    hidden_dims = {layer.feed_forward.hidden_dim for layer in spec.layers if isinstance(layer.feed_forward, MoE)}
    _check(_EXPERT_TENSOR, "hidden units of experts", hidden_dims, degrees.etp)


def check_stored_can_be_split(model: Decoder, degrees: Degrees) -> None:
    """
    Args:
        model: before it is split.

    Raises:
        ConfigError: a rank's part of a weight that is stored in few bits would begin within what shares a scale.
    """
    for path, module in model.named_modules():
        for stored in getattr(module, "stored", {}).values():
            if isinstance(module, Linear):
                key, degree, dim = _TENSOR, degrees.tp, tensor_dim(f"{path}.weight", model.spec, degrees.tp)
            else:
                key, degree, dim = _EXPERT_TENSOR, degrees.etp, 0 if stored.name == "gate_up" else 1
            if dim is None or degree == 1:
                continue
            multiple = (row_multiple, column_multiple)[dim](stored.format)
            size, what = stored.shape[-2:][dim], ("outputs", "inputs")[dim]
            if size % (degree * multiple):
                raise ConfigError(
                    f"a rank's part of {path} would be {size / degree:g} of its {size} {what}, not a multiple of "
                    f"{multiple}, which share scales in {stored.format.name}",
                    where=key,
                    mend="Lower it, choose another format, or leave this module out in filter_fqns.",
                )


def check_products_can_be_split(model: Decoder) -> None:
    """
    Args:
        model: each rank's part of which is known.

    Raises:
        ConfigError: what a rank has of a weight is not of a size that its product in low precision can have.
    """
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            _check_sizes(path, module, "weight", module.product, _TENSOR)
        elif isinstance(module, Experts):
            _check_sizes(path, module, "gate_up", module.gate_up_product, _EXPERT_TENSOR)
            _check_sizes(path, module, "down", module.down_product, _EXPERT_TENSOR)


def _check_sizes(path: str, module: Linear | Experts, name: str, product: Any, degree: str) -> None:
    kernels = getattr(getattr(product, "base", product), "kernels", None)
    if kernels is None:
        return
    stored = module.stored.get(name)
    shape = stored.read(module).matrix_shape if stored else local_tensor(getattr(module, name)).shape
    if any(size % kernels.feature_multiple for size in shape[-2:]):
        raise ConfigError(
            f"a rank's part of {path} is {shape[-2]} x {shape[-1]}, but its product wants multiples of "
            f"{kernels.feature_multiple}",
            where=degree,
            mend="Lower it, or leave this module out of the converter.",
        )


_EXPERT, _EXPERT_TENSOR = "parallelism.expert_parallel_degree", "parallelism.expert_tensor_parallel_degree"
_MOST = 256  # ranks that are suggested
_CONTEXT, _TENSOR = "parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree"


def _hidden_dims(spec: DecoderSpec) -> set[int]:
    """Of feed-forwards that every token goes through."""
    layers = [layer.feed_forward for layer in spec.layers]
    dense = [layer if isinstance(layer, Dense) else layer.shared for layer in layers]
    return {layer.hidden_dim for layer in dense if layer is not None}


def _check(key: str, what: str, numbers: Collection[int], degree: int) -> None:
    common = math.gcd(*numbers)
    if common % degree:
        raise ConfigError(
            f"the model's {common} {what} cannot be dealt evenly to {degree} ranks: {common} is not a multiple of "
            f"{degree}",
            where=key,
            mend=f"Choose one of {', '.join(str(size) for size in range(1, _MOST + 1) if common % size == 0)}.",
        )
