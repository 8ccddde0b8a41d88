"""Llama 4: its config.json both ways, against transformers' own, and every layout that its files come in."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import titanmoe
from tests.models.tiny_configs_gpt_oss_llama4 import VARIANTS
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.keys import map_keys
from titanmoe.models.spec import Dense, MoE, Rope, Temperature

FAMILY = get_family("llama4")
GATE_UP, DOWN = "layers.3.moe.experts.gate_up", "layers.3.moe.experts.down"
FILE_EXPERTS = "model.layers.3.feed_forward.experts"
MEANINGLESS = {"architectures", "dtype", "transformers_version", "initializer_range", "bos_token_id", "eos_token_id"}


def _config(flavor: str = "17bx16e", **changes: Any) -> dict[str, Any]:
    return FAMILY.to_hf_config(FAMILY.flavor(flavor), "bfloat16") | changes


def _transformers_config(**options: Any) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(**{"model_type": "llama4_text", **options})


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    config = _config(flavor)
    assert family_of_hf_config(config) is FAMILY
    assert FAMILY.from_hf_config(json.loads(json.dumps(config))) == FAMILY.flavor(flavor)


def test_scout_is_what_transformers_has_by_default_but_for_its_longer_context() -> None:
    ours, theirs = _transformers_config(**_config()).to_dict(), _transformers_config().to_dict()
    different = {key for key in theirs if ours[key] != theirs[key]} - MEANINGLESS
    assert different == {"rope_parameters", "max_position_embeddings"}
    assert ours["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("variant", VARIANTS["llama4"])
def test_transformers_configs_come_back(variant: str) -> None:
    theirs = _transformers_config(**VARIANTS["llama4"][variant][1]).to_dict()
    spec = FAMILY.from_hf_config(theirs)
    again = _transformers_config(**FAMILY.to_hf_config(spec, "float32")).to_dict()
    assert FAMILY.from_hf_config(again) == spec
    different = {key for key in theirs if theirs[key] != again[key]} - MEANINGLESS
    # What is not used may change: the step beside `moe_layers`, a temperature that is off, the size of no dense layer.
    assert different <= {"interleave_moe_layer_step", "floor_scale", "attn_scale", "intermediate_size_mlp"}


def test_a_multimodal_config_gives_its_text_model() -> None:
    import transformers

    text = _config("debugmodel")
    values = transformers.Llama4Config(text_config=text, architectures=["Llama4ForConditionalGeneration"]).to_dict()
    assert family_of_hf_config(values) is FAMILY
    assert FAMILY.from_hf_config(values) == FAMILY.flavor("debugmodel")
    with pytest.raises(ConfigError, match="hidden_size is missing") as caught:
        FAMILY.from_hf_config({"text_config": text | {"hidden_size": None}})
    assert "text_config.hidden_size" in caught.value.where


def test_a_multimodal_checkpoint_computes_the_same_text(tmp_path: Path) -> None:
    import transformers

    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**VARIANTS["llama4"]["like_maverick"][1], "pad_token_id": 0}
    config = transformers.Llama4Config(text_config=text, vision_config=vision, image_token_index=96)
    theirs = transformers.Llama4ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = titanmoe.from_pretrained(tmp_path, dtype=torch.float32)(tokens)
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_masks_and_positions_of_layers() -> None:
    attentions = [layer.attention for layer in FAMILY.flavor("17bx16e").layers]
    assert {attention.rope is None for attention in attentions[3::4]} == {True}
    assert [(attention.chunk, attention.qk_l2_norm) for attention in attentions[3::4]] == [(None, False)] * 12
    assert {attention.temperature for attention in attentions[3::4]} == {Temperature(8192, 0.1)}
    rest = [attention for index, attention in enumerate(attentions) if index % 4 != 3]
    assert {(a.chunk, a.qk_l2_norm, a.temperature) for a in rest} == {(8192, True, None)}
    assert all(isinstance(attention.rope, Rope) and attention.rope.interleaved for attention in rest)


def test_options_of_older_releases() -> None:
    """An empty `no_rope_layers` and an `attn_temperature_tuning` of 4 have been published."""
    absent = {key: None for key in ("layer_types", "moe_layers")}
    config = _config("17bx128e", no_rope_layers=[], attn_temperature_tuning=4, **absent)
    assert FAMILY.from_hf_config(config) == FAMILY.flavor("17bx128e")


def test_a_dense_model_needs_no_experts() -> None:
    absent = {key: None for key in ("num_local_experts", "num_experts_per_tok", "intermediate_size")}
    spec = FAMILY.from_hf_config(_config("debugmodel", moe_layers=[], interleave_moe_layer_step=0, **absent))
    assert {layer.feed_forward for layer in spec.layers} == {Dense(768)}
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "bfloat16")) == spec


def test_a_model_without_chunks_comes_back() -> None:
    spec = FAMILY.flavor("debugmodel")
    rotating = spec.layers[0]
    spec = replace(spec, layers=(replace(rotating, attention=replace(rotating.attention, chunk=None)),) * 3)
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "bfloat16")) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"moe_layers": [0], "intermediate_size_mlp": None}, "intermediate_size_mlp is missing"),
        ({"attention_chunk_size": None}, "attention_chunk_size is missing"),
        ({"no_rope_layers": [1, 0]}, "2 entries for 48 layers"),
        ({"no_rope_layers": "1110"}, "list of whole numbers"),
        ({"layer_types": ["sliding_attention"] * 48}, "list of 48"),
        ({"layer_types": ["full_attention"]}, "list of 48"),
        ({"moe_layers": 3}, "list of whole numbers"),
        ({"num_experts_per_tok": 17}, "cannot be chosen"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_config(**change))


@pytest.mark.parametrize(("flavor", "total", "active"), [("17bx16e", 107.77, 17.17), ("17bx128e", 400.71, 17.18)])
def test_sizes_of_the_text_models(flavor: str, total: float, active: float) -> None:
    """Published: 109B and 400B with the vision tower of less than 2B, 17B active."""
    spec = FAMILY.flavor(flavor)
    attention = spec.layers[0].attention
    attended = 2 * spec.dim * attention.head_dim * (attention.num_heads + attention.num_kv_heads)
    counts = {"total": 2 * spec.vocab_size * spec.dim + spec.dim, "active": 2 * spec.vocab_size * spec.dim + spec.dim}
    for layer in spec.layers:
        moe = layer.feed_forward
        for kind in counts:
            counts[kind] += attended + 2 * spec.dim
            if isinstance(moe, MoE):
                num_used = moe.num_experts if kind == "total" else moe.top_k
                counts[kind] += (num_used + 1) * 3 * spec.dim * moe.hidden_dim + moe.num_experts * spec.dim
            else:
                counts[kind] += 3 * spec.dim * moe.hidden_dim
    assert {kind: round(count / 1e9, 2) for kind, count in counts.items()} == {"total": total, "active": active}


def _filled(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Tensor:
    """A parameter, filled from the file tensors that the rules name for it."""
    parameter = torch.full(shape, float("nan"))
    pieces, unknown = map_keys(FAMILY.layouts, {name: shape}, tensors)
    assert not unknown
    for key, (_, piece) in pieces.items():
        assert tensors[key].shape == piece.shape(shape)
        region = piece.in_file_order(parameter[piece.at])
        region.copy_(tensors[key].view(region.shape))
    return parameter


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize(("dim", "hidden_dim"), [(4, 6), (5, 5), (10, 5)])
def test_stacked_files_are_in_out_with_gate_before_up(prefix: str, dim: int, hidden_dim: int) -> None:
    gate_up, down = torch.randn(3, dim, 2 * hidden_dim), torch.randn(3, hidden_dim, dim)
    tensors = {f"{prefix}{FILE_EXPERTS}.gate_up_proj": gate_up, f"{prefix}{FILE_EXPERTS}.down_proj": down}
    here = _filled(GATE_UP, (3, 2, hidden_dim, dim), tensors)
    assert torch.equal(here[:, 0], gate_up[..., :hidden_dim].transpose(1, 2))
    assert torch.equal(here[:, 1], gate_up[..., hidden_dim:].transpose(1, 2))
    assert torch.equal(_filled(DOWN, (3, dim, hidden_dim), tensors), down.transpose(1, 2))


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_quantised_releases_have_a_tensor_per_expert(prefix: str) -> None:
    shapes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    tensors = {
        f"{prefix}{FILE_EXPERTS}.{expert}.{name}.weight": torch.randn(shape)
        for expert in range(3)
        for name, shape in shapes.items()
    }
    gate_up, down = _filled(GATE_UP, (3, 2, 6, 4), tensors), _filled(DOWN, (3, 4, 6), tensors)
    for expert in range(3):
        gate, up, down_e = (tensors[f"{prefix}{FILE_EXPERTS}.{expert}.{name}.weight"] for name in shapes)
        assert torch.equal(gate_up[expert, 0], gate)
        assert torch.equal(gate_up[expert, 1], up)
        assert torch.equal(down[expert], down_e)


def test_prefixed_and_ignored_keys() -> None:
    shapes = {
        "tok_embeddings.weight": (7, 3),
        "layers.0.attention.q_proj.weight": (4, 3),
        "layers.0.moe.router.gate.weight": (5, 3),
        "layers.0.moe.shared_experts.down_proj.weight": (3, 2),
        "layers.1.feed_forward.up_proj.weight": (2, 3),
        "output.weight": (7, 3),
    }
    written = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.feed_forward.router.weight",
        "model.layers.0.feed_forward.shared_expert.down_proj.weight",
        "model.layers.1.feed_forward.up_proj.weight",
        "lm_head.weight",
    ]
    multimodal = [f"language_model.{key}" for key in written]
    assert list(map_keys(FAMILY.layouts, shapes)[0]) == written
    assert list(map_keys(FAMILY.layouts, shapes, multimodal)[0]) == multimodal
    for key in ("vision_model.model.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"):
        assert any(fnmatch(key, pattern) for pattern in FAMILY.ignored_keys)
    assert not any(fnmatch(key, pattern) for pattern in FAMILY.ignored_keys for key in multimodal)
