"""Writing FP8: which tensors, what they come back as, and what transformers makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hf_models import load_reference, read_all, some_tokens
from tests.checkpoint.small_models import SPEC, WIDE, build, names_in
from titanmoe.checkpoint.hf_entries import config_entries, entries_of
from titanmoe.checkpoint.hf_save import check_exportable, save_hf
from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.checkpoint.pretrained import from_pretrained, save_pretrained
from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model
from titanmoe.models.common_rules import STACKED_EXPERTS
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope
from titanmoe.ops.scaled_casts import dequantize_blocks


def test_fp8_is_for_the_linears_and_comes_back_as_it_was_rounded(tmp_path: Path) -> None:
    model = build(WIDE)
    save_pretrained(model, tmp_path / "model", dtype=torch.float8_e4m3fn, max_shard_bytes=100_000)
    tensors, back = (
        read_all(tmp_path / "model"),
        dict(from_pretrained(tmp_path / "model", dtype=torch.float32).named_parameters()),
    )
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    codes = {key for key, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    scales = {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert {key + "_scale_inv" for key in codes} == scales
    assert {tensors[key].dtype for key in tensors.keys() - codes - scales} == {torch.bfloat16}
    segments = {key.split(".")[-2] for key in codes}
    assert segments == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(codes) == 2 * 4 + 3 * 3 + 3
    assert tensors["model.layers.1.mlp.gate_proj.weight_scale_inv"].shape == (3, 2)
    for name, parameter in model.named_parameters():
        difference = (back[name] - parameter).abs().max() / parameter.abs().max()
        is_fp8 = name.endswith(("_proj.weight", "experts.gate_up", "experts.down"))
        assert (1e-3 < difference < 1 / 16) if is_fp8 else difference < 2**-8, name
    codes_gate = tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    scales_gate = tensors["model.layers.0.mlp.experts.2.up_proj.weight_scale_inv"]
    assert torch.equal(back["layers.0.moe.experts.gate_up"][2, 1], dequantize_blocks(codes_gate, scales_gate))


def test_fp8_config_lists_the_linears_that_are_not_quantised(tmp_path: Path) -> None:
    save_pretrained(build(WIDE), tmp_path / "model", dtype=torch.float8_e4m3fn)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"],
    }
    tied = replace(WIDE, tie_embeddings=True)
    save_pretrained(build(tied), tmp_path / "tied", dtype=torch.float8_e4m3fn)
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["modules_to_not_convert"]
    save_pretrained(build(), tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("variant", ["moe", "dense"])
def test_transformers_loads_fp8(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it dequantises; of blocks that are partial it makes other blocks, so here are none."""
    from transformers.quantizers import quantizer_finegrained_fp8

    # Wanted for placing modules on several devices only.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    feed_forward = MoE(4, 2, 128) if variant == "moe" else Dense(384)
    attention = GroupedQuery(4, 2, 64, Rope(64, 1e4), qk_norm=True)
    layers = (LayerSpec(attention, feed_forward),) * 2
    tied = variant == "dense"
    spec = DecoderSpec(256, 97, layers, tie_embeddings=tied, max_seq_len=64, family="qwen3")
    model = build(spec)
    save_pretrained(model, tmp_path / "model", dtype=torch.float8_e4m3fn, max_shard_bytes=300_000)
    ours = from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs = load_reference(tmp_path / "model").float()
    tokens = some_tokens()
    with torch.no_grad():
        found, expected, before = ours(tokens), theirs(tokens).logits, model(tokens)
    # What FP8 changes is thousands of times more than what the order of sums does.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_fp8_is_for_linears_and_experts_only(name: str) -> None:
    """By the kinds of modules in the model: every linear but the output and the routers'."""
    family = get_family(name)
    spec = family.flavor("debugmodel_moe" if name == "qwen3" else "debugmodel")
    model = build_model(spec)
    if name in ("llama4", "gpt_oss"):
        with pytest.raises(ConfigError, match=f"files of family '{name}' hold .* stacked or transposed"):
            check_exportable(model, family, spec, torch.float8_e4m3fn)
        return
    modules = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {path for path in modules if path == "output" or path.endswith(".router.gate")}
    experts = {path for path, _ in model.named_parameters() if ".experts." in path and "shared_experts" not in path}
    expected = {f"{path}.weight" for path in modules - kept} | experts
    entries = entries_of(model_tensors(model), family, torch.float8_e4m3fn)
    assert {entry.name for entry in entries if entry.dtype == torch.float8_e4m3fn} == expected
    of_kept = {entry.key.removesuffix(".weight") for entry in entries if entry.name.removesuffix(".weight") in kept}
    listed = config_entries(model_tensors(model), family, entries)["quantization_config"]["modules_to_not_convert"]
    assert of_kept <= set(listed) and kept


def test_what_has_no_fp8_form_is_refused(tmp_path: Path) -> None:
    stacked = replace(FAMILY, rules=[rule for rule in FAMILY.rules if "experts" not in rule.pattern])
    stacked = replace(stacked, rules=(*stacked.rules, *STACKED_EXPERTS))
    with pytest.raises(ConfigError, match=r"hold model.layers.0.mlp.experts.gate_up_proj stacked or transposed"):
        save_hf(build(), tmp_path / "model", stacked, SPEC, dtype=torch.float8_e4m3fn)
    model = build()
    model.layers["1"].feed_forward.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"layers.1.feed_forward.up_proj.weight: has values that are not finite"):
        save_pretrained(model, tmp_path / "model", dtype=torch.float8_e4m3fn)
    assert names_in(tmp_path) == set()
    save_pretrained(model, tmp_path / "model")
    assert names_in(tmp_path) == {"model"}
