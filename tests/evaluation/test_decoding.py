"""Decoding with kept keys and values against whole forwards of each row by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import titanmoe
from tests.models.kinds import KINDS
from titanmoe.evaluation.decoding import decoding
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec, GroupedQuery
from titanmoe.ops.grouped_mm import PlainGroupedProduct, grouped_mm

LENGTHS = (3, 1, 8, 13)  # shorter and longer than the windows of 5 and the chunks of 6
NUM_STEPS = 10


def random_model(spec: DecoderSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    """Weights so large that tokens attend to a few others, not to all alike."""
    model = build_model(spec, device="cpu", dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def some_rows(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(100, (length + NUM_STEPS,), generator=generator).tolist() for length in lengths]


def decoded(model: Decoder, rows: list[list[int]], lengths: tuple[int, ...]) -> Tensor:
    """Logits (step, row, V), as if the model had chosen the rows' tokens."""
    found = []
    with decoding(model, max(lengths) + NUM_STEPS) as batch:
        logits_BV = batch.prefill(
            [row[:length] for row, length in zip(rows, lengths, strict=True)], torch.device("cpu")
        )
        for step in range(NUM_STEPS):
            found.append(logits_BV)
            tokens = [row[length + step] for row, length in zip(rows, lengths, strict=True)]
            logits_BV = batch.step(torch.tensor(tokens))
    return torch.stack(found)


@torch.no_grad()
def whole(model: Decoder, rows: list[list[int]], lengths: tuple[int, ...]) -> Tensor:
    each = [model(torch.tensor([row]))[0] for row in rows]
    shown = [logits[length - 1 : -1] for logits, length in zip(each, lengths, strict=True)]
    return torch.stack(shown, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7), (1,)], ids=["different", "equal", "one"])
def test_logits_are_those_of_the_whole_forward(kind: str, lengths: tuple[int, ...]) -> None:
    model, rows = random_model(KINDS[kind]), some_rows(lengths)
    expected = whole(model, rows, lengths)
    found = decoded(model, rows, lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_chunks_and_windows_hold_no_more_than_is_seen() -> None:
    spec = KINDS["sinks and windows"]
    with decoding(random_model(spec), 100) as batch:
        batch.prefill([[1] * 40], torch.device("cpu"))
        kept = [block.attention.attend for block in batch.model.blocks()]
        assert [attend.k_BKCH.shape[2] for attend in kept] == [5, 100]


def test_memory_is_taken_once() -> None:
    model = random_model(KINDS["latent"])
    with decoding(model, 30) as batch:
        batch.prefill([[1, 2], [3]], torch.device("cpu"))
        kept = [block.attention.attend for block in model.blocks()]
        before = [attend.k_BKCH.data_ptr() for attend in kept]
        for _ in range(28):
            batch.step(torch.tensor([4, 5]))
        assert [attend.k_BKCH.data_ptr() for attend in kept] == before


def test_a_second_batch_sees_nothing_of_the_first() -> None:
    model, lengths = random_model(KINDS["grouped-query"]), (2, 4)
    rows = some_rows(lengths)
    with decoding(model, 20) as batch:
        batch.prefill([[9] * 15, [8] * 3, [7]], torch.device("cpu"))
        batch.step(torch.tensor([1, 2, 3]))
        logits_BV = batch.prefill(
            [row[:length] for row, length in zip(rows, lengths, strict=True)], torch.device("cpu")
        )
    torch.testing.assert_close(logits_BV, whole(model, rows, lengths)[0])


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_left_as_it_was(is_training: bool) -> None:
    model = random_model(KINDS["grouped-query"]).train(is_training)
    before = [block.attention.attend for block in model.blocks()]
    with pytest.raises(ZeroDivisionError), decoding(model, 8) as batch:
        batch.prefill([[1, 2, 3]], torch.device("cpu"))
        assert not model.training
        _ = 1 / 0
    assert [block.attention.attend for block in model.blocks()] == before
    assert model.training is is_training
    assert all(not layer.router.num_tokens_per_expert_E.any() for _, layer in model.moe_layers())


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    kind = KINDS["grouped-query"]
    layer = kind.layers[0]
    assert isinstance(layer.attention, GroupedQuery)
    # Dense: of experts, rounding may choose others.
    model = random_model(replace(kind, layers=(layer, layer)), torch.bfloat16)
    rows = some_rows(LENGTHS)
    expected = whole(model, rows, LENGTHS).float()
    found = decoded(model, rows, LENGTHS).float()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", ["grouped-query", "latent"])
def test_a_model_with_adapters(kind: str) -> None:
    model = random_model(KINDS[kind])
    plain = whole(model, some_rows(LENGTHS), LENGTHS)
    titanmoe.convert(model, ["lora"], titanmoe.load_config(None, ["--lora.dropout=0.5"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.eval()  # without dropout, as decoding is in any case
    expected = whole(model, some_rows(LENGTHS), LENGTHS)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    found = decoded(model.train(), some_rows(LENGTHS), LENGTHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_step_is_not_padded() -> None:
    """Eight experts of one token, padded to 32 rows each, would be computed 32 times over."""
    for dtype in (torch.float32, torch.bfloat16):
        assert PlainGroupedProduct().row_multiple(torch.zeros(16, 1, 8, dtype=dtype), trains=False) == 1
    assert PlainGroupedProduct().row_multiple(torch.zeros(2, 40, 8, dtype=torch.bfloat16), trains=False) == 32


def test_products_of_a_step_are_those_of_a_batch() -> None:
    """Most experts have no rows, also the last ones; without gradients no node is made."""
    generator = torch.Generator().manual_seed(4)
    x_RK, w_ENK = torch.randn(3, 8, generator=generator), torch.randn(9, 5, 8, generator=generator)
    offsets_E = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2], dtype=torch.int32)
    with torch.no_grad():
        y_RN = grouped_mm(x_RK, w_ENK, offsets_E)
    expected = torch.stack([w_ENK[2] @ x_RK[0], w_ENK[5] @ x_RK[1], torch.zeros(5)])
    torch.testing.assert_close(y_RN, expected)
