"""A model's weights as plain numbers, one after the other, as an export writes them.

Weights that are frozen in few bits are dequantised. Where adapters are merged, a weight becomes W + scale B A, and with
DoRA each row of that times magnitude / |row| (arXiv 2402.09353, section 4.1), all in float32. Such a weight exists
while it is written; of stacked experts, one is computed at a time.

Shape suffixes: N output features, K input features, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.frozen_rows import weights_of_parts
from titanmoe.checkpoint.gather import gather_each
from titanmoe.checkpoint.model_tensors import without_adapters
from titanmoe.config.errors import ConfigError
from titanmoe.models.adapters import is_adapter
from titanmoe.ops.frozen_storage import Stored
from titanmoe.parallel.ranks import Ranks


def check_mergeable(names: Collection[str]) -> None:
    """
    Raises:
        ConfigError: an adapter's parameter is of no weight that is there, or a weight has half an adapter.
    """
    adapters = {name for name in names if is_adapter(name)}
    parts = [_adapters_of(name) for name in names if name not in adapters]
    if unknown := adapters.difference(*parts):
        raise ConfigError("is an adapter of no weight of the model", where=min(unknown))
    for a, b, magnitude in parts:
        if not adapters.isdisjoint((a, b, magnitude)) and not adapters.issuperset((a, b)):
            raise ConfigError("has no adapter beside it", where=a if a in adapters else b)


def weights_each(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], settings: AdapterSettings | None, ranks: Ranks
) -> Iterator[tuple[str, Tensor]]:
    """As `gather_each`, for a model's own tensors in the order of `as_weights`. Weights that are stored as parts, or
    have an adapter, come to rank 0 in float32.

    Every adapter's parameter is used once. Beyond the model, all adapters and a weight are in rank 0's memory.

    Args:
        settings: of the adapters, which are merged; None if there are none.
    """
    base = without_adapters(tensors) if settings is not None else tensors
    adapters = dict(gather_each({name: tensor for name, tensor in tensors.items() if name not in base}, ranks))
    weight_of = weights_of_parts(stored)
    parts: list[Tensor] = []
    for name, whole in gather_each(base, ranks):
        if name in weight_of:
            parts.append(whole)
            name = weight_of[name]
            if len(parts) < len(stored[name].part_names):
                continue
            if ranks.rank == 0:
                whole = _dequantize(stored[name], parts)
            parts.clear()
        a, b, magnitude = (adapters.pop(part, None) for part in _adapters_of(name))
        if settings is not None and a is not None and ranks.rank == 0:
            assert b is not None, name
            whole = merge(whole, a, b, magnitude, settings.scale_of(a.shape[-2]))
        yield name, whole
        del whole  # before the next comes
    assert not adapters and not parts, f"not merged: {', '.join(adapters)}"


def merge(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    """The merged weight in float32, of the shape of `weight`, on its device.

    Args:
        weight: (N, K); or of E experts (E, ..., K), with one or two dims of outputs.
        a: (r, K), or (E, r, K).
        b: (N, r), or (E, ..., r).
        magnitude: (N,), or (E, ...); None without DoRA.
    """
    merged = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if a.dim() == 2:
        return _merge_into(merged, weight, a, b, magnitude, scale)
    for expert in range(a.shape[0]):
        of_expert = None if magnitude is None else magnitude[expert]
        _merge_into(merged[expert], weight[expert], a[expert], b[expert], of_expert, scale)
    return merged


def _merge_into(out: Tensor, weight: Tensor, a_rK: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    out.copy_(weight)
    rows_NK = out.view(-1, out.shape[-1])
    norms_N = None if magnitude is None else _norms(rows_NK)
    rows_NK.addmm_(b.flatten(0, -2).float(), a_rK.float(), alpha=scale)
    if magnitude is not None and norms_N is not None:
        # A magnitude of few bits means as much more or less than |W| in as few: at first, nothing is changed.
        gain_N = magnitude.flatten().float() * norms_N / norms_N.to(magnitude.dtype).float().clamp_min(_LEAST)
        rows_NK.mul_((gain_N / _norms(rows_NK).clamp_min(_LEAST))[:, None])
    return out


_LEAST = torch.finfo(torch.float32).tiny


def _norms(rows_NK: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows_NK, dim=-1)


def _dequantize(stored: Stored, parts: Sequence[Tensor]) -> Tensor:
    """All values, float32; of stacked experts, those of one at a time."""
    if not stored.is_stack:
        return stored.format.dequantize(parts, torch.float32)
    values = torch.empty(stored.shape, dtype=torch.float32, device=parts[0].device)
    for expert in range(stored.shape[0]):
        values[expert] = stored.format.dequantize([part[expert] for part in parts], torch.float32)
    return values


def _adapters_of(name: str) -> tuple[str, str, str]:
    """What the adapter's parameters of a weight would be called: A, B, magnitude."""
    prefix = f"{name.removesuffix('weight')}lora_" if name.endswith(".weight") else f"{name}_lora_"
    return f"{prefix}a", f"{prefix}b", f"{prefix}magnitude"
