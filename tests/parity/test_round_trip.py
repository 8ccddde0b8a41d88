"""Files of transformers come back bit for bit, whatever layout they were read in, and load in transformers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import titanmoe
from tests.parity.reference import load_reference, random_model, read_all, save, some_tokens
from tests.parity.variants import VARIANTS
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import get_family

_ALL = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


def _saved(
    folder: Path, variant: tuple[str, Mapping[str, Any]], dtype: torch.dtype = torch.float32, **options: bool
) -> nn.Module:
    """A random model as transformers saves it, in several files."""
    model = random_model(*variant)
    save(model, folder)
    if dtype != torch.float32 or options:
        model = load_reference(folder, dtype)
        for file in folder.iterdir():
            file.unlink()
        save(model, folder, **options)
    return model


def _assert_same_files(folder: Path, expected: Path) -> None:
    ours, theirs = read_all(folder), read_all(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key


def _assert_same_model(folder: Path, expected: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """The folder, loaded by transformers, has the expected tensors and gives the expected logits, bit for bit."""
    reloaded = load_reference(folder, dtype)
    tensors = reloaded.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    tokens = some_tokens(expected.config.vocab_size, 2, 40)
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, expected(tokens).logits)


def check_round_trip(model_type: str, options: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Files of a random model come back bit for bit in `dtype`, with a config.json that means the same."""
    reference = _saved(folder / "theirs", (model_type, options), dtype)
    assert len(list((folder / "theirs").glob("*.safetensors"))) > 2
    model = titanmoe.from_pretrained(folder / "theirs", dtype=dtype)
    titanmoe.save_pretrained(model, folder / "ours", max_shard_bytes=50_000)
    _assert_same_files(folder / "ours", folder / "theirs")
    _assert_same_model(folder / "ours", reference, dtype)
    theirs, ours = (json.loads((folder / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert ours["architectures"] == theirs["architectures"]
    assert titanmoe.from_pretrained(folder / "ours", dtype=dtype).spec == model.spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "variant"), _ALL)
def test_there_and_back_is_bit_exact(tmp_path: Path, family: str, variant: str, dtype: torch.dtype) -> None:
    check_round_trip(*VARIANTS[family][variant], tmp_path, dtype)


@pytest.mark.parametrize(("family", "variant"), _ALL)
def test_the_names_and_layouts_of_transformers_memory_are_read(tmp_path: Path, family: str, variant: str) -> None:
    """Newer releases of some families ship them: experts stacked, gate above up, or transposed."""
    reference = _saved(tmp_path / "theirs", VARIANTS[family][variant], save_original_format=False)
    model = titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    titanmoe.save_pretrained(model, tmp_path / "ours")
    _assert_same_model(tmp_path / "ours", reference)


def _rewrite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the folder's weights by one file with these tensors."""
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


_TIED = [(family, variant) for family, variant in _ALL if VARIANTS[family][variant][1].get("tie_word_embeddings")]


@pytest.mark.parametrize(("family", "variant"), _TIED)
def test_a_copy_of_the_tied_embedding_is_dropped_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, variant: str
) -> None:
    reference = _saved(tmp_path / "theirs", VARIANTS[family][variant])
    tensors = read_all(tmp_path / "theirs")
    assert "lm_head.weight" not in tensors
    _rewrite(tmp_path / "theirs", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    with caplog.at_level(logging.INFO, "titanmoe"):
        model = titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert len([line for line in caplog.messages if "lm_head.weight" in line]) == 1
    titanmoe.save_pretrained(model, tmp_path / "ours")
    _assert_same_model(tmp_path / "ours", reference)


_WITH_EXTRA_LAYERS = [(family, variant) for family, variant in _ALL if get_family(family).extra_layer_key]


@pytest.mark.parametrize(("family", "variant"), _WITH_EXTRA_LAYERS)
def test_layers_that_predict_several_tokens_are_dropped_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, variant: str
) -> None:
    """As releases store them: layers beyond the last, each with tensors that no other layer has."""
    reference = _saved(tmp_path / "theirs", VARIANTS[family][variant])
    tensors = read_all(tmp_path / "theirs")
    num_layers, dim = reference.config.num_hidden_layers, reference.config.hidden_size
    last = f"model.layers.{num_layers - 1}."
    extra = {}
    for index in (num_layers, num_layers + 1):
        prefix = f"model.layers.{index}."
        extra |= {key.replace(last, prefix): tensor for key, tensor in tensors.items() if key.startswith(last)}
        extra |= {f"{prefix}{name}.weight": torch.ones(dim) for name in ("enorm", "hnorm", "shared_head.norm")}
        extra |= {
            f"{prefix}eh_proj.weight": torch.ones(dim, 2 * dim),
            f"{prefix}embed_tokens.weight": tensors["model.embed_tokens.weight"],
            f"{prefix}shared_head.head.weight": tensors["model.embed_tokens.weight"],
        }
    _rewrite(tmp_path / "theirs", {key: tensor.clone() for key, tensor in (tensors | extra).items()})
    with caplog.at_level(logging.INFO, "titanmoe"):
        model = titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    lines = [line for line in caplog.messages if "dropped" in line]
    found = f"Layers for multi-token prediction, dropped: {num_layers}, {num_layers + 1} ({len(extra)} tensors)"
    assert lines == [found]
    titanmoe.save_pretrained(model, tmp_path / "ours")
    _assert_same_model(tmp_path / "ours", reference)

    # Such a tensor in one of the model's own layers is a mistake.
    _rewrite(tmp_path / "theirs", {**tensors, f"{last}eh_proj.weight": torch.ones(dim, 2 * dim)})
    with pytest.raises(ConfigError, match="eh_proj"):
        titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS["llama4"])
def test_the_text_model_of_a_multimodal_llama4(tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str) -> None:
    """Releases are of this kind: every name has a prefix, and the sizes are in `text_config`."""
    import transformers

    model_type, options = VARIANTS["llama4"][variant]
    text = random_model(model_type, options)
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 8, "projector_output_dim": 8}
    vision |= {"projector_input_dim": 8}
    config = transformers.Llama4Config(text_config=text.config.to_dict(), vision_config=vision)
    whole = transformers.Llama4ForConditionalGeneration(config)
    whole.language_model.load_state_dict(text.state_dict())
    save(whole, tmp_path / "theirs")
    prefixes = {key.partition(".")[0] for key in read_all(tmp_path / "theirs")}
    assert prefixes == {"language_model", "vision_model", "multi_modal_projector"}
    with caplog.at_level(logging.INFO, "titanmoe"):
        model = titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert len([line for line in caplog.messages if "vision_model" in line]) == 1
    titanmoe.save_pretrained(model, tmp_path / "ours")
    _assert_same_model(tmp_path / "ours", text)


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_llama4_with_a_tensor_per_expert(tmp_path: Path, prefix: str) -> None:
    """What the quantised releases hold in place of the stacked and transposed tensors."""
    reference = _saved(tmp_path / "theirs", VARIANTS["llama4"]["like_scout"])
    tensors = {}
    for key, tensor in read_all(tmp_path / "theirs").items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", key)
        if match is None:
            tensors[prefix + key] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = (
                zip(("gate", "up"), matrix.T.chunk(2), strict=True) if match[2] == "gate_up" else [("down", matrix.T)]
            )
            for name, part in parts:
                tensors[f"{prefix}{match[1]}.{expert}.{name}_proj.weight"] = part
    _rewrite(tmp_path / "theirs", tensors)
    model = titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    titanmoe.save_pretrained(model, tmp_path / "ours")
    _assert_same_model(tmp_path / "ours", reference)


def test_saving_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    reference = _saved(tmp_path / "theirs", VARIANTS["qwen3"]["moe"])
    for parameter in reference.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)  # no numbers of bfloat16 any more
    save(reference, tmp_path / "theirs")
    model = titanmoe.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    titanmoe.save_pretrained(model, tmp_path / "ours", dtype=torch.bfloat16)
    ours, rounded = read_all(tmp_path / "ours"), 0
    for key, tensor in read_all(tmp_path / "theirs").items():
        assert torch.equal(tensor.bfloat16(), ours[key]), key
        rounded += not torch.equal(tensor, ours[key].float())
    assert rounded == len(ours)


def test_loading_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    model = random_model(*VARIANTS["qwen3"]["dense"])
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)
    save(model, tmp_path)
    exact, rounded = titanmoe.from_pretrained(tmp_path, dtype=torch.float32), titanmoe.from_pretrained(tmp_path)
    for (name, parameter), low in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert low.dtype == torch.bfloat16
        assert torch.equal(parameter.bfloat16(), low), name
