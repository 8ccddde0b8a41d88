"""Whole models from quantised checkpoints: exactly the values that codes and scales stand for, sharded or not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.checkpoint.quantized_files import Checkpoint, random_weights, write_folder
from tests.checkpoint.test_quantization import GPT_OSS, LLAMA_FBGEMM, QWEN3_FP8, compressed_tensors
from tests.ranks import full_tensor, run_ranks
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.pretrained import from_pretrained, spec_of_hf_folder
from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model, materialize
from titanmoe.models.family import get_family
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, Latent, LayerSpec, MoE, Rope, Router

_ATTENTION = GroupedQuery(4, 2, 32, Rope(32, 1e4), qk_norm=True)


def _qwen3(feed_forward: Dense | MoE) -> DecoderSpec:
    """No size is a multiple of 128 but that of the queries, and no matrix but theirs is square."""
    return DecoderSpec(dim=200, vocab_size=97, layers=(LayerSpec(_ATTENTION, feed_forward),) * 2, family="qwen3")


_MOE, _DENSE = _qwen3(MoE(3, 2, 144, Router())), _qwen3(Dense(280))


def _small(family: str) -> DecoderSpec:
    """Two layers of the family's debug model, with few and small experts."""
    spec = get_family(family).flavors["debugmodel"]
    layers = []
    for layer in spec.layers[:2]:
        feed_forward = replace(layer.feed_forward, hidden_dim=64)
        if isinstance(feed_forward, MoE):
            shared = feed_forward.shared and Dense(64)
            feed_forward = replace(feed_forward, num_experts=3, top_k=min(feed_forward.top_k, 2), shared=shared)
        layers.append(LayerSpec(replace(layer.attention, num_heads=4, num_kv_heads=2), feed_forward))
    return replace(spec, dim=96, vocab_size=97, layers=tuple(layers))


def _deepseek_v3() -> DecoderSpec:
    """A dense layer and one of experts; its `kv_a_proj_with_mqa` has 146 rows, a block and a part of one."""
    spec = get_family("deepseek_v3").flavors["671B"]
    attention, experts = spec.layers[-1].attention, spec.layers[-1].feed_forward
    assert isinstance(attention, Latent) and isinstance(experts, MoE)
    rope = Rope(16, 1e4, interleaved=True)
    attention = replace(attention, num_heads=2, q_lora_rank=136, kv_lora_rank=130, qk_nope_head_dim=24, rope=rope)
    attention = replace(attention, v_head_dim=40)
    router = replace(experts.router, num_groups=2, top_groups=1)
    experts = replace(experts, num_experts=4, top_k=2, hidden_dim=144, router=router, shared=Dense(144))
    layers = (LayerSpec(attention, Dense(280)), LayerSpec(attention, experts))
    return replace(spec, dim=200, vocab_size=97, layers=layers)


def _with_shape(tensors: Checkpoint, key: str, *shape: int) -> None:
    tensors.files[key] = tensors.files[key].reshape(shape)


def _blocks(checkpoint: Checkpoint, key: str, weight: Tensor) -> None:
    scale_dtype = torch.bfloat16 if ".0." in key else torch.float32
    checkpoint.add_fp8(key, weight, (128, 128), key + "_scale_inv", scale_dtype)


def _channels(checkpoint: Checkpoint, key: str, weight: Tensor) -> None:
    checkpoint.add_fp8(key, weight, (1, weight.shape[1]), key + "_scale", torch.bfloat16)


def _whole(checkpoint: Checkpoint, key: str, weight: Tensor) -> None:
    checkpoint.add_fp8(key, weight, tuple(weight.shape), key + "_scale")
    _with_shape(checkpoint, key + "_scale")
    checkpoint.files[key.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)


def _per_output_of_stacks(checkpoint: Checkpoint, key: str, weight: Tensor) -> None:
    checkpoint.add_fp8(
        key, weight, (weight.shape[-2], 1) if weight.dim() == 3 else (1, weight.shape[1]), key + "_scale"
    )


@dataclass(frozen=True)
class _Case:
    """A model, its quantization_config, and which of its tensors are quantised how."""

    spec: DecoderSpec
    quantization_config: dict[str, Any]
    quantized: str  # a regex of keys
    quantize: Callable[[Checkpoint, str, Tensor], None]
    layout: int = 0


_PROJECTIONS = r".*(_proj|\.w[123])\.weight"
_CASES = {
    # The down projections of the last layer are left as they are, and the config says nothing of it.
    "fp8_experts": _Case(_MOE, QWEN3_FP8, r"(?!.*layers\.1\..*down).*_proj\.weight", _blocks),
    "fp8_stacked_experts": _Case(_MOE, QWEN3_FP8, r".*_proj(\.weight)?", _blocks, layout=1),
    "fp8_latent_attention": _Case(_deepseek_v3(), QWEN3_FP8, r"(.*_proj|.*_proj_with_mqa)\.weight", _blocks),
    "compressed_tensors_per_channel": _Case(
        _DENSE,
        compressed_tensors(ignore=["lm_head", r"re:.*\.1\.self_attn\."]),
        r"(?!.*\.1\.self_attn).*_proj\.weight",
        _channels,
    ),
    "compressed_tensors_per_tensor": _Case(_MOE, compressed_tensors(strategy="tensor"), _PROJECTIONS, _whole),
    "fbgemm": _Case(_DENSE, LLAMA_FBGEMM, _PROJECTIONS, _channels),
    "compressed_tensors_per_channel_of_stacks": _Case(
        _small("llama4"),
        compressed_tensors(ignore=["re:.*self_attn", "re:.*router", "re:.*lm_head"]),
        r".*feed_forward\..*_proj(\.weight)?",
        _per_output_of_stacks,
    ),
    "mxfp4": _Case(_small("gpt_oss"), GPT_OSS, r".*_blocks", Checkpoint.add_mxfp4, layout=1),
}


def _shard_of(key: str) -> int:
    """Scales are in the file before that of their weights, after it, or in the same."""
    weight = re.sub(r"_(scale_inv|scale|scales)$", "", key)
    return 1 if weight == key else sum(key.encode()) % 3


def _write(folder: Path, case: _Case) -> tuple[Path, Path]:
    """The quantised checkpoint, and one that holds the values it stands for."""
    family = get_family(case.spec.family)
    checkpoint = Checkpoint()
    for key, weight in random_weights(family, case.spec, family.layouts[case.layout]).items():
        if re.fullmatch(case.quantized, key):
            case.quantize(checkpoint, key, weight)
        else:
            checkpoint.add_plain(key, weight.bfloat16())
    config = family.to_hf_config(case.spec, "bfloat16")
    quantized = write_folder(
        folder / "quantized", {**config, "quantization_config": case.quantization_config}, checkpoint.files, _shard_of
    )
    # gpt-oss names and transposes its quantised tensors differently.
    plain = {
        key.removesuffix("_blocks"): values.mT if key.endswith("_blocks") else values
        for key, values in checkpoint.values.items()
    }
    return quantized, write_folder(folder / "plain", config, plain)


@pytest.fixture(scope="module", params=list(_CASES))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _write(tmp_path_factory.mktemp(request.param), _CASES[request.param])


@pytest.fixture
def fp8_folder(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return _write(tmp_path, _CASES["fp8_experts"])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_the_values_that_the_codes_stand_for(folders: tuple[Path, Path], dtype: torch.dtype) -> None:
    quantized, plain = (from_pretrained(folder, dtype=dtype).state_dict() for folder in folders)
    assert quantized.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(quantized[name], tensor), name
        assert tensor.float().std() > 0.01, name


def test_scales_are_in_the_files_before_and_after(folders: tuple[Path, Path]) -> None:
    """Otherwise the test above would show less than it says."""
    weight_map = json.loads((folders[0] / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name for key, name in weight_map.items() if re.search(r"_(scale_inv|scale|scales)$", key)}
    assert len(shards) == 3


def _load_sharded(folder: Path) -> tuple[int, dict[str, Tensor]]:
    family, spec = spec_of_hf_folder(folder)
    model = build_model(spec)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    materialize(model, "cpu")
    summary = load_hf_weights(model, folder, family)
    return summary.bytes_read, {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}


def test_sharded_loading(folders: tuple[Path, Path]) -> None:
    quantized, plain = folders
    expected = from_pretrained(plain, dtype=torch.float32).state_dict()
    num_bytes = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    for bytes_read, tensors in run_ranks(_load_sharded, 2, quantized):
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name
        assert bytes_read < 0.75 * num_bytes


def test_transformers_loads_the_same_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    # It asks for a package that loading on the CPU does without.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    # And for blocks that are whole.
    spec = replace(_MOE, dim=64, layers=(LayerSpec(_ATTENTION, MoE(3, 2, 96, Router())),) * 2)
    config = {**QWEN3_FP8, "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head", "mlp.gate"]}

    def quantize(checkpoint: Checkpoint, key: str, weight: Tensor) -> None:
        checkpoint.add_fp8(key, weight, (32, 32), key + "_scale_inv")

    folder, _ = _write(tmp_path, _Case(spec, config, _PROJECTIONS, quantize))
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model = from_pretrained(folder, dtype=torch.float32)
    experts = reference.model.layers[1].mlp.experts
    assert torch.equal(model.get_parameter("layers.1.moe.experts.gate_up").flatten(1, 2), experts.gate_up_proj)
    assert torch.equal(model.get_parameter("layers.1.moe.experts.down"), experts.down_proj)
    q_proj = reference.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(model.get_parameter("layers.1.attention.q_proj.weight"), q_proj)
    tokens = torch.arange(40).view(2, 20)
    # What was not quantised keeps the dtype of the files there.
    assert (model(tokens) - reference.float()(tokens).logits).abs().max() < 1e-4


def test_transformers_loads_the_same_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    monkeypatch.setattr("transformers.quantizers.quantizer_mxfp4.is_accelerate_available", lambda: True)
    folder, _ = _write(tmp_path, _CASES["mxfp4"])
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    model = from_pretrained(folder, dtype=torch.float32)
    experts = reference.model.layers[1].mlp.experts
    gate_up = model.get_parameter("layers.1.moe.experts.gate_up")
    assert torch.equal(gate_up[:, 0].mT, experts.gate_up_proj[..., ::2])
    assert torch.equal(gate_up[:, 1].mT, experts.gate_up_proj[..., 1::2])
    assert torch.equal(model.get_parameter("layers.1.moe.experts.down").mT, experts.down_proj)
    tokens = torch.arange(40).view(2, 20)
    assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4


def test_one_line_says_what_was_quantised(fp8_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        from_pretrained(fp8_folder)
    # 2 layers of 4 attention weights and 3 experts with 3 matrices, less 3 that were left.
    assert "Quantised (fp8): 23 of " in caplog.text


def test_layers_for_more_tokens_are_dropped_with_their_scales(tmp_path: Path) -> None:
    """Nor does it matter that one of them lacks a scale."""
    folder, plain = _write(tmp_path, _CASES["fp8_latent_attention"])

    def add_layer(tensors: dict[str, Tensor]) -> None:
        layer = {key.replace("layers.1.", "layers.2."): t.clone() for key, t in tensors.items() if "layers.1." in key}
        del layer["model.layers.2.mlp.experts.0.up_proj.weight_scale_inv"]
        tensors |= layer | {"model.layers.2.eh_proj.weight": torch.zeros(200, 400).bfloat16()}

    _edit(folder, add_layer)
    expected = from_pretrained(plain, dtype=torch.float32).state_dict()
    for name, tensor in from_pretrained(folder, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# Accidents on the way from a folder to a model


def _edit(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors, and write them in one file."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    edit(tensors)
    for file in (*files, folder / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


_GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
_SCALE = _GATE + "_scale_inv"


def _set_nan(tensors: dict[str, Tensor]) -> None:
    tensors[_SCALE][1, 1] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(_SCALE), f"{_GATE}: is FP8, and no file has its scale"),
        (lambda tensors: tensors.pop(_GATE), f"{_SCALE}: is a scale, and no file has the weight"),
        (lambda tensors: tensors.update({_SCALE: torch.ones(2, 3)}), rf"{_SCALE}: is a scale of shape \[2, 3\]"),
        (lambda tensors: tensors.update({_SCALE: torch.ones(2, 2).long()}), f"{_SCALE}: is a scale of dtype I64"),
        (lambda tensors: tensors.update({_GATE: torch.ones(144, 200)}), f"{_SCALE}: is a scale, but its weight"),
        (lambda tensors: tensors.update({_GATE: tensors[_GATE].to(torch.float8_e5m2)}), f"{_GATE}: F8_E5M2 weights"),
        (lambda tensors: tensors.update({_GATE: tensors[_GATE].to(torch.int8)}), f"{_GATE}: int8 weights"),
        (_set_nan, rf"{_SCALE}: a scale is nan \(row 1, column 1"),
    ],
)
def test_damaged_tensors(fp8_folder: Path, edit: Callable[[dict[str, Tensor]], None], message: str) -> None:
    _edit(fp8_folder, edit)
    with pytest.raises(ConfigError, match=message) as caught:
        from_pretrained(fp8_folder)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("quantization_config", "message"),
    [
        (None, "holds F8_E4M3 codes, and config.json has no quantization_config"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not supported"),
        ({**QWEN3_FP8, "weight_block_size": [64, 64]}, r"with a scale per block of \[64, 64\]"),
        (GPT_OSS, "is F8_E4M3 in a checkpoint that quantization_config says is mxfp4"),
    ],
)
def test_configs_of_other_files(fp8_folder: Path, quantization_config: dict | None, message: str) -> None:
    file = fp8_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization_config}))
    with pytest.raises(ConfigError, match=message) as caught:
        from_pretrained(fp8_folder)
    assert str(fp8_folder) in str(caught.value)


def test_a_shard_that_was_cut_off(fp8_folder: Path) -> None:
    file = fp8_folder / "model-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model-00001\.safetensors: the file is cut short"):
        from_pretrained(fp8_folder)
