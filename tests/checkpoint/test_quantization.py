"""quantization_config of published checkpoints, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from titanmoe.checkpoint.quantization import Scheme, parse_quantization
from titanmoe.config.errors import ConfigError

QWEN3_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
}
GLM_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "model.layers.1.mlp.gate", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
LLAMA_FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def compressed_tensors(targets: list[str] | None = None, ignore: list[str] | None = None, **weights: Any) -> dict:
    """A compressed-tensors config with one group; None as a value of `weights` removes it."""
    group = {**GLM_FP8["config_groups"]["group_0"], "targets": targets or ["Linear"]}
    group["weights"] = {key: value for key, value in {**group["weights"], **weights}.items() if value is not None}
    return {**GLM_FP8, "ignore": ignore or [], "config_groups": {"group_0": group}}


def test_no_quantisation() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {"a": 1}}):
        assert parse_quantization(config) is None


def test_at_the_top_or_in_the_text_config() -> None:
    at_the_top = parse_quantization({"quantization_config": GPT_OSS, "text_config": {}})
    inside = parse_quantization({"text_config": {"quantization_config": GPT_OSS}})
    assert at_the_top is not None and at_the_top == inside


@pytest.mark.parametrize(
    ("values", "scheme"),
    [
        (QWEN3_FP8, Scheme("block", (128, 128))),
        ({**QWEN3_FP8, "weight_block_size": [64, 256]}, Scheme("block", (64, 256))),
        ({**QWEN3_FP8, "weight_block_size": None}, Scheme("tensor")),
        ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, Scheme("tensor")),
        (LLAMA_FBGEMM, Scheme("channel")),
        (compressed_tensors(), Scheme("channel")),
        (compressed_tensors(strategy="tensor"), Scheme("tensor")),
        (compressed_tensors(strategy="block", block_structure=[128, 64]), Scheme("block", (128, 64))),
        (compressed_tensors(strategy="block", block_structure="128x64"), Scheme("block", (128, 64))),
        ({**compressed_tensors(), "format": "naive-quantized"}, Scheme("channel")),
    ],
)
def test_schemes(values: dict, scheme: Scheme) -> None:
    quantization = parse_quantization({"quantization_config": values})
    assert quantization is not None
    assert quantization.method == values["quant_method"]
    assert quantization.scheme_of("model.layers.0.self_attn.q_proj") == scheme


def test_exponents_as_bytes_only_where_the_config_says_so() -> None:
    configs = [QWEN3_FP8, {**QWEN3_FP8, "scale_fmt": "ue8m0"}, GPT_OSS, compressed_tensors()]
    parsed = [parse_quantization({"quantization_config": values}) for values in configs]
    assert [quantization and quantization.byte_exponents for quantization in parsed] == [False, True, True, False]


def test_ignored_modules_are_exact_names_or_regexes() -> None:
    quantization = parse_quantization({"quantization_config": GLM_FP8})
    assert quantization is not None
    assert quantization.ignores("lm_head")
    assert quantization.ignores("model.layers.1.mlp.gate")
    assert quantization.ignores("model.layers.7.self_attn.q_proj")
    # Neither a part of a name, nor a longer one, nor one in which a dot is another letter.
    for module in ("model.lm_head", "lm_head2", "model.layers.1.mlp.gate_proj", "model.layers.1.mlpXgate", "model"):
        assert not quantization.ignores(module)
    # A regex is for the beginning of a name, as it is where these files are made.
    anchored = parse_quantization({"quantization_config": {**GLM_FP8, "ignore": ["re:self_attn"]}})
    assert anchored is not None
    assert anchored.ignores("self_attn.q_proj") and not anchored.ignores("model.layers.7.self_attn.q_proj")


def test_a_name_or_regex_comes_before_the_class() -> None:
    linear, experts = (compressed_tensors(strategy=name)["config_groups"]["group_0"] for name in ("channel", "tensor"))
    groups = {
        "linear": linear,
        "experts": {**experts, "targets": [r"re:.*mlp\.experts\.\d+\."]},
        "activations only": {**experts, "weights": None, "targets": ["model.layers.0.mlp.gate_proj"]},
    }
    quantization = parse_quantization({"quantization_config": {**GLM_FP8, "config_groups": groups}})
    assert quantization is not None
    assert quantization.scheme_of("model.layers.3.mlp.experts.11.up_proj") == Scheme("tensor")
    assert quantization.scheme_of("model.layers.3.mlp.shared_experts.up_proj") == Scheme("channel")

    quantization = parse_quantization({"quantization_config": compressed_tensors(["model.a", "Attention"])})
    assert quantization is not None
    assert quantization.scheme_of("model.a") == Scheme("channel")
    assert quantization.scheme_of("model.b") is None


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "modelopt", "quark", "torchao", "compressed_tensors"]
)
def test_other_methods_are_named_with_those_that_work(method: str) -> None:
    with pytest.raises(ConfigError, match=f"quant_method '{method}' is not supported") as caught:
        parse_quantization({"quantization_config": {"quant_method": method, "bits": 4}})
    for supported in ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "bfloat16 release"):
        assert supported in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("fp8", "is 'fp8', not an object"),
        ({"load_in_4bit": True}, r"quant_method '\(none named\)' is not supported"),
        ({**QWEN3_FP8, "weight_block_size": [128]}, r"weight_block_size is \[128\], not two positive integers"),
        ({**QWEN3_FP8, "weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ({**QWEN3_FP8, "weight_block_size": 128}, "weight_block_size is 128"),
        ({**QWEN3_FP8, "scale_fmt": "int"}, "scale_fmt 'int' is not supported"),
        ({**QWEN3_FP8, "expert_dtype": "fp4"}, "expert_dtype 'fp4' is not supported"),
        (compressed_tensors(type="int"), r"group_0: 8-bit int weights \(format float-quantized\) are not supported"),
        (
            {**compressed_tensors(type="int", num_bits=4, strategy="group"), "format": "pack-quantized"},
            r"group_0: 4-bit int weights \(format pack-quantized\) are not supported",
        ),
        (
            {**compressed_tensors(num_bits=4, strategy="tensor_group"), "format": "nvfp4-pack-quantized"},
            r"group_0: 4-bit float weights \(format nvfp4-pack-quantized\) are not supported",
        ),
        ({**compressed_tensors(), "format": "int-quantized"}, r"\(format int-quantized\) are not supported"),
        (compressed_tensors(symmetric=False), "asymmetric 8-bit float weights"),
        (compressed_tensors(strategy="group"), "strategy 'group' is not supported"),
        (compressed_tensors(strategy="block"), "group_0.weights.block_structure is None"),
        (compressed_tensors(ignore=["re:(unclosed"]), r"ignore: 're:\(unclosed' is not a regex"),
        ({**compressed_tensors(), "ignore": "lm_head"}, "ignore is 'lm_head', not a list of names"),
        ({**compressed_tensors(), "config_groups": {}}, "has no config_groups"),
        ({**compressed_tensors(), "config_groups": {"FP8": ["Linear"]}}, "config_groups.FP8 is .*, not an object"),
        ({**compressed_tensors(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_what_is_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_quantization({"quantization_config": values})
    assert "config.json: quantization_config" in str(caught.value)
