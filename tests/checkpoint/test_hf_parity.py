"""Tiny checkpoints of transformers give the same logits and gradients here, and come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.checkpoint.hf_models import VARIANTS, load_reference, read_all, save_reference, some_tokens
from titanmoe.checkpoint.pretrained import from_pretrained, save_pretrained
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.keys import map_keys


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_those_of_transformers(tmp_path: Path, variant: str, max_shard_size: str) -> None:
    reference = save_reference(tmp_path, variant, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "40KB")
    model = from_pretrained(tmp_path, dtype=torch.float32)
    tokens = some_tokens()
    logits, expected = model(tokens), reference(tokens).logits
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4

    for result in (logits, expected):
        F.cross_entropy(result[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    by_file_key, _ = map_keys([FAMILY.rules], {name: gradient.shape for name, gradient in gradients.items()})
    num_compared = 0
    for key, parameter in reference.named_parameters():
        # In memory, transformers stacks experts much as we do.
        prefix = key.replace("model.", "", 1).replace(".mlp.experts.", ".moe.experts.")
        if key.endswith("experts.gate_up_proj"):
            ours = gradients[prefix.removesuffix("_proj")].flatten(1, 2)
        elif key.endswith("experts.down_proj"):
            ours = gradients[prefix.removesuffix("_proj")]
        else:
            ours = gradients[by_file_key[key][0]]
        largest = parameter.grad.abs().max()
        assert largest > 0, key
        assert (ours - parameter.grad).abs().max() < 1e-4 * largest, key
        num_compared += 1
    assert num_compared == len(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_bit_exact(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    save_reference(tmp_path / "theirs", variant, dtype, max_shard_size="40KB")
    model = from_pretrained(tmp_path / "theirs", dtype=dtype)
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=50_000)
    theirs, ours = read_all(tmp_path / "theirs"), read_all(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype == dtype
        assert torch.equal(tensor, ours[key]), key

    reference, reloaded = load_reference(tmp_path / "theirs", dtype), load_reference(tmp_path / "ours", dtype)
    tokens = some_tokens()
    assert torch.equal(reloaded(tokens).logits, reference(tokens).logits)
    assert reloaded.config.architectures == reference.config.architectures


def test_saving_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    reference = save_reference(tmp_path / "theirs", "moe")
    model = from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    save_pretrained(model, tmp_path / "ours", dtype=torch.bfloat16)
    ours = read_all(tmp_path / "ours")
    for key, tensor in read_all(tmp_path / "theirs").items():
        assert torch.equal(tensor.bfloat16(), ours[key]), key
    tokens = some_tokens()
    rounded = reference
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(load_reference(tmp_path / "ours")(tokens).logits, rounded(tokens).logits)


def test_loading_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    save_reference(tmp_path, "dense")
    exact, rounded = from_pretrained(tmp_path, dtype=torch.float32), from_pretrained(tmp_path)
    for (name, parameter), low in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert low.dtype == torch.bfloat16
        assert torch.equal(parameter.bfloat16(), low), name
