"""One row of the parity table: a tiny random model in transformers, and the same one loaded from its files here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

Documents = tuple[tuple[int, ...], ...]
"""Lengths of the documents in each row."""
WHOLE: Documents = ((48,), (48,))
PACKED: Documents = ((5, 1, 42), (7, 23, 18))
"""Few tokens are in the first document of a row: the others would show that documents see each other."""


@dataclass(frozen=True)
class Errors:
    """How far our model is from that of transformers, which sees each document alone."""

    logits: float
    """The largest difference of any logit, in float32."""
    gradient: float
    """The largest, over parameters, of the largest difference in the gradient relative to the gradient's largest."""
    gradient_of: str
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
            "bf16": MAX_BF16_RATIO * self.bf16_theirs + BF16_FLOOR,
        }
        return [
            f"{name} is {getattr(self, name):.1e}, allowed is {limit:.1e}"
            for name, limit in limits.items()
            if not getattr(self, name) < limit
        ]


@dataclass(frozen=True)
class Row:
    """One variant of one family."""

    family: str
    variant: str
    whole: Errors
    """One document per row."""
    packed: Errors
    """Several."""

    @property
    def failures(self) -> list[str]:
        return [*self.whole.failures, *(f"packed {failure}" for failure in self.packed.failures)]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "failures": self.failures}


def compare(
    family: str, variant: str, model_type: str, options: Mapping[str, Any], folder: Path, device: str = "cpu"
) -> Row:
    """Compute one row.

    Args:
        model_type, options: what transformers makes its config of.
        folder: an empty one, for the files that both read.
    """
    reference = random_model(model_type, options)
    save(reference, folder / "model")
    reference.to(device)
    model = titanmoe.from_pretrained(folder / "model", dtype=torch.float32, device=device)
    assert model.spec.family == family, f"was loaded as a model of {model.spec.family}"
    _require_shorter_windows(model.spec, min(max(row) for row in PACKED))
    low_reference = load_reference(folder / "model", torch.bfloat16).to(device)
    low_model = titanmoe.from_pretrained(folder / "model", dtype=torch.bfloat16, device=device)
    tokens = some_tokens(model.spec.vocab_size, len(WHOLE), sum(WHOLE[0])).to(device)

    def errors(documents: Documents) -> Errors:
        logits, expected = _our_logits(model, tokens, documents), _their_logits(reference, tokens, documents)
        assert expected.std() > 0.1, "logits of hardly any size agree easily"
        ours = _gradients(model, _loss(logits, tokens, documents))
        theirs = _gradients(reference, _loss(expected, tokens, documents))
        translated = _translate(theirs, reference, folder / f"gradients{len(documents[0])}")
        gradient_errors = _gradient_errors(ours, translated, model.spec)
        worst = max(gradient_errors, key=lambda name: gradient_errors[name])
        with torch.no_grad():
            bf16 = _typical_error(_our_logits(low_model, tokens, documents), expected)
            bf16_theirs = _typical_error(_their_logits(low_reference, tokens, documents), expected)
        return Errors(_largest(logits - expected), gradient_errors[worst], worst, bf16, bf16_theirs)

    return Row(family, variant, errors(WHOLE), errors(PACKED))


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
    position_ids = torch.cat([torch.arange(length) for length in lengths]).view(tokens.shape)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return model(tokens, position_ids=position_ids.to(tokens.device), cu_seqlens=cu_seqlens.to(tokens.device))


def _loss(logits: Tensor, tokens: Tensor, documents: Documents) -> Tensor:
    """Mean cross-entropy of the next token within a document."""
    lengths = [length for row in documents for length in row]
    pairs = zip(logits.flatten(0, 1).split(lengths), tokens.flatten().split(lengths), strict=True)
    losses = [F.cross_entropy(logits[:-1], tokens[1:], reduction="sum") for logits, tokens in pairs]
    return torch.stack(losses).sum() / (sum(lengths) - len(lengths))


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def _translate(gradients: Mapping[str, Tensor], reference: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Gradients of transformers' parameters under our names.

    transformers writes them as if they were the parameters, and our loader sorts them into ours: whatever the layouts
    in memory are, both sides translate to and from the names in files.
    """
    values = {name: parameter.data for name, parameter in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        parameter.data = gradients[name]
    save(reference, folder)
    for name, parameter in reference.named_parameters():
        parameter.data = values[name]
    device = next(reference.parameters()).device
    loaded = titanmoe.from_pretrained(folder, dtype=torch.float32, device=device)
    return {name: parameter.detach() for name, parameter in loaded.named_parameters()}


def _gradient_errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], spec: DecoderSpec) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, gradient in theirs.items():
        largest = _largest(gradient)
        if name.startswith(_without_gradient(spec)):
            errors[name] = max(largest, _largest(ours[name]))
        else:
            # A gradient that is zero everywhere would agree with one that was lost.
            errors[name] = _largest(ours[name] - gradient) / largest if largest else float("inf")
    return errors


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
