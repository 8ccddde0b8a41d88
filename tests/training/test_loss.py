"""The language-model loss against cross-entropy of the model's own logits, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.data.packing import Batch
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope
from titanmoe.training.loss import causal_lm_loss, loss_sum

VOCAB, BATCH, SEQ = 53, 3, 10


def tiny(tie_embeddings: bool = False) -> Decoder:
    attention = GroupedQuery(2, 1, 8, Rope(8, 1e4), qk_norm=True)
    spec = DecoderSpec(
        dim=16,
        vocab_size=VOCAB,
        layers=(LayerSpec(attention, Dense(24)), LayerSpec(attention, MoE(4, 2, 8))),
        tie_embeddings=tie_embeddings,
    )
    model = materialize(build_model(spec), "cpu")
    init_weights(model, seed=0)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    return tokens, labels


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_causal_lm_loss_shifts_and_averages_as_hugging_face_does(tie_embeddings: bool) -> None:
    model = tiny(tie_embeddings)
    tokens, labels = batch()
    logits = model(tokens).double()
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    want_gradients = gradients(model, want)
    loss = causal_lm_loss(model, tokens, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, want_gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_first_label_is_never_used_and_inputs_stay_as_they_were() -> None:
    model = tiny()
    tokens, labels = batch()
    before = labels.clone()
    loss = causal_lm_loss(model, tokens, labels)
    assert torch.equal(labels, before)
    labels[:, 0] = 7
    assert torch.equal(loss, causal_lm_loss(model, tokens, labels))


def test_nothing_supervised_is_zero() -> None:
    model = tiny()
    tokens, _ = batch()
    loss = causal_lm_loss(model, tokens, torch.full_like(tokens, -100))
    assert loss.item() == 0
    assert not any(grad.any() for grad in gradients(model, loss).values())


def test_positions_and_documents_reach_the_model() -> None:
    """Two documents in a row have the loss of two rows."""
    model = tiny()
    tokens, _ = batch()
    halves = tokens[:1].view(2, SEQ // 2)
    labels = tokens[:1].clone()
    labels[0, SEQ // 2] = -100
    packed = causal_lm_loss(
        model,
        tokens[:1],
        labels,
        position_ids=torch.arange(SEQ // 2).repeat(2)[None],
        cu_seqlens=torch.tensor([0, SEQ // 2, SEQ], dtype=torch.int32),
    )
    torch.testing.assert_close(packed, causal_lm_loss(model, halves, halves), rtol=1e-5, atol=0)


def test_sums_over_uneven_microbatches_make_the_mean_of_the_global_batch() -> None:
    model = tiny()
    tokens, labels = batch()
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    num_tokens = int((labels != -100).sum())
    want = F.cross_entropy(model(tokens).double().flatten(0, 1), labels.flatten())
    want_gradients = gradients(model, want)
    model.zero_grad()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        loss = loss_sum(model, Batch(tokens[rows], labels[rows], positions[rows], None)) / num_tokens
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(want.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want_gradients[name], rtol=1e-4, atol=1e-7, msg=name)
