"""Whether a folder that a model was written to says what the model says."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.model_tensors import model_tensors, without_adapters
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family

logger = logging.getLogger("titanmoe.checkpoint")

_NUM_TOKENS = 32
_MAX_DISTANCE = {4: 1e-3, 2: 0.1, 1: float("inf")}  # by the bytes of a number


@torch.no_grad()
def some_logits(model: Decoder) -> Tensor:
    """What a model in one process says to a few tokens, which are always the same, in float32."""
    was_training = model.training
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.spec.vocab_size, (1, _NUM_TOKENS), generator=generator)
    logits = model.eval()(tokens.to(next(model.parameters()).device)).float()
    model.train(was_training)
    return logits


def logits_differ(live: Tensor, model: Decoder, family: Family, dtype: torch.dtype, folder: Path) -> str:
    """Whether a merged folder does not say what the model with its adapters said; "" if it does.

    The folder is read into the memory of the model's own weights, which are lost.

    Args:
        live: of the model, from `some_logits`.
        dtype: that was written. How far FP8 is away is logged only: it changes what experts tokens go to.
    """
    plain = build_model(model.spec)
    for name, tensor in without_adapters(model_tensors(model)).items():
        owner, _, own_name = name.rpartition(".")
        setattr(plain.get_submodule(owner), own_name, tensor)
    load_hf_weights(plain, folder, family)
    found = some_logits(plain)
    distance = ((found - live).norm() / live.norm()).item()
    logger.info("logits of the merged model are %.1e of their size away from those with live adapters", distance)
    if distance <= _MAX_DISTANCE[min(dtype.itemsize, next(plain.parameters()).dtype.itemsize)]:
        return ""
    return f"its logits are {distance:.1e} of their size away from those of the model with live adapters"
