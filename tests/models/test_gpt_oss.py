"""gpt-oss: its config.json both ways, against transformers' own, and how its files order gate, up, in and out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny_configs_gpt_oss_llama4 import VARIANTS
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.keys import map_keys
from titanmoe.models.spec import MoE, Rope

FAMILY = get_family("gpt_oss")
GATE_UP, DOWN = "layers.3.moe.experts.gate_up", "layers.3.moe.experts.down"
FILE_EXPERTS = "model.layers.3.mlp.experts"


def _config(flavor: str = "20b", **changes: Any) -> dict[str, Any]:
    return FAMILY.to_hf_config(FAMILY.flavor(flavor), "bfloat16") | changes


def _transformers_config(**options: Any) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(**{"model_type": "gpt_oss", **options})


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    config = _config(flavor)
    assert family_of_hf_config(config) is FAMILY
    assert FAMILY.from_hf_config(json.loads(json.dumps(config))) == FAMILY.flavor(flavor)


def test_plain_rope_without_windows_comes_back_too() -> None:
    spec = FAMILY.flavor("20b")
    plain = Rope(64, 1e4)
    layers = (replace(layer, attention=replace(layer.attention, window=None, rope=plain)) for layer in spec.layers)
    spec = replace(spec, layers=tuple(layers))
    config = FAMILY.to_hf_config(spec, "bfloat16")
    assert FAMILY.from_hf_config(config) == spec
    theirs = _transformers_config(**config)
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert FAMILY.from_hf_config(theirs.to_dict()) == spec


def test_120b_is_what_transformers_has_by_default() -> None:
    ours, theirs = _transformers_config(**_config("120b")).to_dict(), _transformers_config().to_dict()
    meaningless = {"architectures", "dtype", "transformers_version"}
    different = {key for key in theirs if ours[key] != theirs[key]} - meaningless
    assert not different
    assert FAMILY.from_hf_config(theirs) == FAMILY.flavor("120b")


@pytest.mark.parametrize("variant", VARIANTS["gpt_oss"])
def test_transformers_configs_come_back(variant: str) -> None:
    model_type, options = VARIANTS["gpt_oss"][variant]
    theirs = _transformers_config(**options).to_dict()
    assert theirs["model_type"] == model_type
    ours = FAMILY.to_hf_config(FAMILY.from_hf_config(theirs), "float32")
    again = _transformers_config(**ours).to_dict()
    meaningless = {"architectures", "dtype", "transformers_version", "initializer_range"}
    assert {key for key in theirs if theirs[key] != again[key]} <= meaningless


def test_layers_alternate_where_no_types_are_given() -> None:
    config = _config("debugmodel", num_hidden_layers=5, layer_types=None, sliding_window=77)
    windows = [layer.attention.window for layer in FAMILY.from_hf_config(config).layers]
    assert windows == [77, None, 77, None, 77]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"rope_scaling": None}, "rope_parameters or rope_scaling is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"num_experts_per_tok": 33}, "cannot be chosen"),
        ({"layer_types": ["full_attention"] * 23}, "list of 24"),
        ({"layer_types": ["chunked_attention"] * 24}, "list of 24"),
        ({"swiglu_limit": "7"}, "'7' is not a number"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_config(**change))


@pytest.mark.parametrize(
    ("flavor", "published_total", "published_active"), [("20b", 20.91, 3.61), ("120b", 116.83, 5.13)]
)
def test_sizes_are_those_of_the_model_card(flavor: str, published_total: float, published_active: float) -> None:
    """Of the embeddings, the card counts the output's only as active."""
    spec = FAMILY.flavor(flavor)
    attention, experts = spec.layers[0].attention, spec.layers[0].feed_forward
    assert isinstance(experts, MoE)
    dim, heads, kv = spec.dim, attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    attended = (dim + 1) * (heads + 2 * kv) + (heads + 1) * dim + attention.num_heads
    expert = (dim + 1) * 2 * experts.hidden_dim + (experts.hidden_dim + 1) * dim
    beside = 2 * dim + attended + (dim + 1) * experts.num_experts
    embedding, num_layers = spec.vocab_size * dim, len(spec.layers)
    total = 2 * embedding + dim + num_layers * (beside + experts.num_experts * expert)
    active = embedding + dim + num_layers * (beside + experts.top_k * expert)
    assert round(total / 1e9, 2) == published_total
    assert round(active / 1e9, 2) == published_active


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


@pytest.mark.parametrize(("dim", "hidden_dim"), [(4, 6), (5, 5)])
def test_bf16_files_interleave_gate_and_up_and_are_in_out(dim: int, hidden_dim: int) -> None:
    tensors = {
        f"{FILE_EXPERTS}.gate_up_proj": torch.randn(3, dim, 2 * hidden_dim),
        f"{FILE_EXPERTS}.gate_up_proj_bias": torch.randn(3, 2 * hidden_dim),
        f"{FILE_EXPERTS}.down_proj": torch.randn(3, hidden_dim, dim),
        f"{FILE_EXPERTS}.down_proj_bias": torch.randn(3, dim),
    }
    gate_up, bias, down, down_bias = tensors.values()
    here = _filled(GATE_UP, (3, 2, hidden_dim, dim), tensors)
    assert torch.equal(here[:, 0], gate_up[..., ::2].transpose(1, 2))
    assert torch.equal(here[:, 1], gate_up[..., 1::2].transpose(1, 2))
    assert torch.equal(_filled(DOWN, (3, dim, hidden_dim), tensors), down.transpose(1, 2))
    here = _filled(f"{GATE_UP}_bias", (3, 2, hidden_dim), tensors)
    assert torch.equal(here[:, 0], bias[..., ::2])
    assert torch.equal(here[:, 1], bias[..., 1::2])
    assert torch.equal(_filled(f"{DOWN}_bias", (3, dim), tensors), down_bias)


@pytest.mark.parametrize(("dim", "hidden_dim"), [(32, 64), (64, 64)])
def test_mxfp4_files_mean_what_transformers_makes_of_them(dim: int, hidden_dim: int) -> None:
    """transformers decodes and transposes into the bf16 form; our rules take the decoded values as they lie."""
    from transformers.integrations import mxfp4

    def random_blocks(out: int, num_in: int) -> Tensor:
        blocks = torch.randint(256, (3, out, num_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (3, out, num_in // 32), dtype=torch.uint8)
        return mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)

    bf16 = {
        f"{FILE_EXPERTS}.gate_up_proj": random_blocks(2 * hidden_dim, dim),
        f"{FILE_EXPERTS}.down_proj": random_blocks(dim, hidden_dim),
    }
    decoded = {f"{key}_blocks": tensor.transpose(1, 2).contiguous() for key, tensor in bf16.items()}
    for name, shape in ((GATE_UP, (3, 2, hidden_dim, dim)), (DOWN, (3, dim, hidden_dim))):
        assert torch.equal(_filled(name, shape, decoded), _filled(name, shape, bf16))


def test_every_parameter_of_a_layer_has_its_place() -> None:
    names = {
        "layers.1.attention.sinks": "model.layers.1.self_attn.sinks",
        "layers.1.attention.o_proj.bias": "model.layers.1.self_attn.o_proj.bias",
        "layers.1.moe.router.gate.weight": "model.layers.1.mlp.router.weight",
        "layers.1.moe.router.gate.bias": "model.layers.1.mlp.router.bias",
        "layers.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    }
    pieces, unknown = map_keys(FAMILY.layouts, dict.fromkeys(names, (3,)))
    assert not unknown
    assert {name: key for key, (name, _) in pieces.items()} == names
