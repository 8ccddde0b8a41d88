"""One row of the parity table: a tiny random model in transformers, and the same one loaded from its files here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import titanmoe
from tests.parity.reference import load_reference, random_model, save, some_tokens
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec, GroupedQuery, MoE

MAX_LOGITS_ERROR = 1e-4
MAX_GRADIENT_ERROR = 1e-4
MAX_BF16_RATIO = 1.5
BF16_FLOOR = 1e-3

WHOLE = ((48,), (48,))
PACKED = ((13, 1, 34), (29, 19))
"""Lengths of the documents in each of two rows."""


@dataclass(frozen=True)
class Row:
    """Errors of one variant of one family."""

    family: str
    variant: str
    logits: float
    """The largest difference of any logit, in float32."""
    gradient: float
    """The largest, over parameters, of the largest difference in the gradient relative to the gradient's largest."""
    gradient_of: str
    packed_logits: float
    """As above, for documents packed into rows here and each document alone in transformers."""
    packed_gradient: float
    packed_gradient_of: str
    bf16: float
    """What bfloat16 changes in a token's logits: root mean square, relative to the standard deviation of all logits. A
    quarter of the tokens have less. (Where rounding changes the choice of experts, the logits of that token, and of
    those that see it, change by any amount: the worst or the mean token would measure luck.)"""
    bf16_theirs: float
    """The same of transformers in bfloat16."""

    @property
    def failures(self) -> list[str]:
        """The figures that are beyond their tolerances; what is not a number is beyond any."""
        limits = {
            "logits": MAX_LOGITS_ERROR,
            "gradient": MAX_GRADIENT_ERROR,
            "packed_logits": MAX_LOGITS_ERROR,
            "packed_gradient": MAX_GRADIENT_ERROR,
            "bf16": MAX_BF16_RATIO * self.bf16_theirs + BF16_FLOOR,
        }
        return [
            f"{name} is {getattr(self, name):.1e}, allowed is {limit:.1e}"
            for name, limit in limits.items()
            if not getattr(self, name) < limit
        ]


def compare(family: str, variant: str, model_type: str, options: Mapping[str, Any], folder: Path) -> Row:
    """Compute one row.

    Args:
        model_type, options: what transformers makes its config of.
        folder: an empty one, for the files that both read.
    """
    reference = random_model(model_type, options)
    save(reference, folder / "model")
    model = titanmoe.from_pretrained(folder / "model", dtype=torch.float32)
    assert model.spec.family == family, f"was loaded as a model of {model.spec.family}"
    _require_shorter_windows(model.spec, min(max(row) for row in PACKED))

    tokens = some_tokens(model.spec.vocab_size, len(WHOLE), sum(WHOLE[0]))
    logits, expected = _our_logits(model, tokens, WHOLE), _their_logits(reference, tokens, WHOLE)
    assert expected.std() > 0.1, "logits of hardly any size agree easily"
    gradient, gradient_of = _worst_gradient(model, reference, logits, expected, tokens, WHOLE, folder / "gradient")
    packed, expected_packed = _our_logits(model, tokens, PACKED), _their_logits(reference, tokens, PACKED)
    packed_gradient, packed_gradient_of = _worst_gradient(
        model, reference, packed, expected_packed, tokens, PACKED, folder / "packed_gradient"
    )
    with torch.no_grad():
        bf16 = _our_logits(titanmoe.from_pretrained(folder / "model", dtype=torch.bfloat16), tokens, WHOLE)
        bf16_theirs = _their_logits(load_reference(folder / "model", torch.bfloat16), tokens, WHOLE)
    return Row(
        family,
        variant,
        _largest(logits - expected),
        gradient,
        gradient_of,
        _largest(packed - expected_packed),
        packed_gradient,
        packed_gradient_of,
        _typical_error(bf16, expected),
        _typical_error(bf16_theirs, expected),
    )


Documents = tuple[tuple[int, ...], ...]


def _their_logits(reference: nn.Module, tokens: Tensor, documents: Documents) -> Tensor:
    """Each document alone; the result is as if they were in rows."""
    rows = [
        torch.cat([reference(document[None]).logits[0] for document in row.split(lengths)])
        for row, lengths in zip(tokens, documents, strict=True)
    ]
    return torch.stack(rows)


def _our_logits(model: Decoder, tokens: Tensor, documents: Documents) -> Tensor:
    if documents == WHOLE:
        return model(tokens)
    lengths = [length for row in documents for length in row]
    position_ids = torch.cat([torch.arange(length) for length in lengths]).view_as(tokens)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return model(tokens, position_ids=position_ids, cu_seqlens=cu_seqlens)


def _loss(logits: Tensor, tokens: Tensor, documents: Documents) -> Tensor:
    """Mean cross-entropy of the next token within a document."""
    lengths = [length for row in documents for length in row]
    pairs = zip(logits.flatten(0, 1).split(lengths), tokens.flatten().split(lengths), strict=True)
    losses = [F.cross_entropy(logits[:-1], tokens[1:], reduction="sum") for logits, tokens in pairs]
    return torch.stack(losses).sum() / (sum(lengths) - len(lengths))


def _worst_gradient(
    model: Decoder,
    reference: nn.Module,
    logits: Tensor,
    expected: Tensor,
    tokens: Tensor,
    documents: Documents,
    folder: Path,
) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and which parameter's it is."""
    ours = _gradients(model, _loss(logits, tokens, documents))
    theirs = _gradients(reference, _loss(expected, tokens, documents))
    # transformers writes them as if they were the parameters, and our loader sorts them into ours: whatever the
    # layouts in memory are, both sides have translated to and from the names of the files.
    parameters = {name: parameter.data for name, parameter in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        parameter.data = theirs[name]
    save(reference, folder)
    for name, parameter in reference.named_parameters():
        parameter.data = parameters[name]
    expected_gradients = titanmoe.from_pretrained(folder, dtype=torch.float32)
    errors = {}
    for name, parameter in expected_gradients.named_parameters():
        largest = _largest(parameter)
        if name.startswith(_without_gradient(model.spec)):
            errors[name] = max(largest, _largest(ours[name]))
        else:
            # A gradient that is zero everywhere would agree with one that was lost.
            errors[name] = _largest(ours[name] - parameter) / largest if largest else float("inf")
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _without_gradient(spec: DecoderSpec) -> tuple[str, ...]:
    """Beginnings of the names of parameters whose gradient is zero but for rounding, whatever their values."""
    prefixes = []
    for index, layer in enumerate(spec.layers):
        attention, moe = layer.attention, layer.feed_forward
        if isinstance(attention, GroupedQuery) and attention.rope is None and not attention.sinks:
            prefixes.append(f"layers.{index}.attention.k_proj.bias")  # adds the same to every score of a query
        if isinstance(moe, MoE) and moe.top_k == 1 and moe.router.normalize:
            prefixes.append(f"layers.{index}.moe.router.gate.")  # the weight of the only expert is 1
    return tuple(prefixes)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def _largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item()


def _typical_error(logits: Tensor, expected: Tensor) -> float:
    error_BS = (logits.float() - expected).square().mean(dim=-1).sqrt()
    return (error_BS.quantile(0.25) / expected.std()).item()


def _require_shorter_windows(spec: DecoderSpec, num_tokens: int) -> None:
    for layer in spec.layers:
        if isinstance(layer.attention, GroupedQuery):
            for reach in (layer.attention.window, layer.attention.chunk):
                assert reach is None or reach < num_tokens, f"a window of {reach} does not cut {num_tokens} tokens"
