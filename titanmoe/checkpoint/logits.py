"""Whether a folder that a model was written to says what the model says."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.adapters import adapter_tensors, load_adapter
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family

logger = logging.getLogger("titanmoe.checkpoint")

_NUM_TOKENS = 32
# Of their size, by the bytes of a number: what is rounded sends some tokens to other experts.
_MERGED_DISTANCE = {4: 1e-3, 2: 0.2, 1: 0.5}
_ADAPTED_DISTANCE = {4: 1e-3, 2: 0.02}


@torch.no_grad()
def some_logits(model: Decoder) -> Tensor:
    """What a model in one process says to a few tokens, which are always the same, in float32."""
    was_training = model.training
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.spec.vocab_size, (1, _NUM_TOKENS), generator=generator)
    logits = model.eval()(tokens.to(next(model.parameters()).device)).float()
    model.train(was_training)
    return logits


def merged_logits_differ(live: Tensor, model: Decoder, family: Family, dtype: torch.dtype, folder: Path) -> str:
    """Whether a merged folder does not say what the model with its adapters said; "" if it does.

    The folder is read into the memory of the model's own weights, which are lost; those that are stored in few bits get
    memory of their own.

    Args:
        live: of the model, from `some_logits`.
        dtype: that was written.
    """
    there = model_tensors(model)
    plain = build_model(model.spec, dtype=next(model.parameters()).dtype)
    for name, tensor in model_tensors(plain).items():
        owner, _, own_name = name.rpartition(".")
        memory = there.get(name, torch.nn.Parameter(torch.empty_like(tensor, device="cpu")))
        setattr(plain.get_submodule(owner), own_name, memory)
    load_hf_weights(plain, folder, family)
    return _difference(live, plain, _MERGED_DISTANCE[min(dtype.itemsize, next(plain.parameters()).dtype.itemsize)])


def adapted_logits_differ(live: Tensor, model: Decoder, family: Family, settings: AdapterSettings, folder: Path) -> str:
    """The same of an adapter, which is read into the model's own adapters; what these were is lost first."""
    for tensor in adapter_tensors(model).values():
        tensor.detach().fill_(torch.nan)
    load_adapter(model, folder, family, settings, tells=False)
    return _difference(live, model, _ADAPTED_DISTANCE[next(model.parameters()).dtype.itemsize])


def _difference(live: Tensor, model: Decoder, most: float) -> str:
    distance = ((some_logits(model) - live).norm() / live.norm()).item()
    logger.info("logits of what was written are %.1e of their size away from those of the live model", distance)
    if distance <= most:  # not if it is NaN
        return ""
    return f"its logits are {distance:.1e} of their size away from those of the model with live adapters"
