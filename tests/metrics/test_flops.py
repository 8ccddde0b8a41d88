"""FLOPs and parameters against torch's counter on the real model, and against published figures."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.ranks import pretend
from titanmoe.config import load_config
from titanmoe.config.sizes import Degrees
from titanmoe.converters.apply import convert
from titanmoe.metrics.flops import (
    forward_flops_per_token,
    hardware_flops_per_token,
    layer_flops,
    num_parameters,
    peak_flops,
    training_flops_per_token,
)
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Part
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.flops import output_flops
from titanmoe.models.spec import (
    ClampedSwiGLU,
    DecoderSpec,
    Dense,
    GroupedQuery,
    Latent,
    LayerSpec,
    MoE,
    Rope,
    Router,
)
from titanmoe.ops.low_rank import LowRankGroupedProduct
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

PLAIN = GroupedQuery(4, 2, 16, Rope(16, 1e4))
BIASED = GroupedQuery(4, 1, 8, Rope(8, 1e4), qkv_bias=True, out_bias=True, qk_norm=True)
SINKS = GroupedQuery(4, 4, 16, None, sinks=True, qkv_bias=True)
LATENT = Latent(4, 20, 24, 12, 20, Rope(8, 1e4), bias=True)
DIRECT = Latent(2, None, 24, 8, 16, Rope(8, 1e4))
EXPERTS = MoE(8, 3, 24, Router(selection_bias=True), shared=Dense(40))
BIASED_EXPERTS = MoE(8, 2, 24, Router(gate_bias=True), bias=True, activation=ClampedSwiGLU())
SPECS = {
    "dense": DecoderSpec(32, 100, (LayerSpec(PLAIN, Dense(48)),) * 2),
    "tied and biased": DecoderSpec(32, 100, (LayerSpec(BIASED, Dense(48)),), tie_embeddings=True),
    "latent": DecoderSpec(32, 100, (LayerSpec(LATENT, EXPERTS), LayerSpec(DIRECT, Dense(48)))),
    "biased experts": DecoderSpec(32, 100, (LayerSpec(SINKS, BIASED_EXPERTS),)),
    "mixed": DecoderSpec(32, 100, (LayerSpec(PLAIN, Dense(48)), LayerSpec(BIASED, EXPERTS), LayerSpec(PLAIN, EXPERTS))),
}


def attention_forward(q, k, v, *args, out_shape=None, **kwargs):
    """Scores and values of a causal square: half of 2 * 2 * B * N * S * S * H."""
    batch, heads, seq_len, head_dim = q
    return 2 * batch * heads * seq_len * seq_len * head_dim


def attention_backward(grad, q, *args, **kwargs):
    """Two products for each of the forward's; the flash kernel's own recomputation is not counted as training."""
    return 2 * attention_forward(q, None, None)


class _Inside(TorchDispatchMode):
    """Runs this package's operators as the functions they are, so that others see the products in them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "titanmoe":
            return func(*args, **(kwargs or {}))
        with self:
            return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))


@contextlib.contextmanager
def counter():
    """torch's counter of FLOPs, which is told what the kernels do that it does not know."""
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        torch.ops.aten.addmm_: lambda y, x, w, *args, **kwargs: 2 * x[0] * x[1] * w[1],
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counted, _Inside():
        yield counted


@pytest.mark.parametrize("name", SPECS)
def test_flops_equal_torchs_counter_on_the_decoder(name):
    spec, batch, seq_len = SPECS[name], 2, 64
    model = build_model(spec, device="cpu")
    init_weights(model, seed=0)
    tokens = torch.randint(0, spec.vocab_size, (batch, seq_len))
    with counter() as forward:
        logits = model(tokens)
    assert forward.get_total_flops() == forward_flops_per_token(spec, seq_len) * batch * seq_len
    with counter() as backward:
        logits.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == training_flops_per_token(model, seq_len) * batch * seq_len


@pytest.mark.parametrize(
    ("name", "converters", "settings"),
    [
        ("dense", ["lora"], []),
        ("tied and biased", ["lora"], []),
        ("latent", ["lora"], []),
        ("mixed", ["lora"], []),
        ("mixed", ["quantize.frozen.float8", "lora"], ["lora.expert_rank=5"]),
        ("biased experts", ["quantize.frozen.nf4", "lora"], ["quantize.frozen.nf4.block_size=8"]),
        # Nothing has a gradient before what learns: not the inputs of a first adapter, nor its whole layer.
        ("biased experts", ["lora"], ["lora.target_modules=experts"]),
        ("mixed", ["lora"], ["lora.target_modules=layers.1.attention.o_proj"]),
        ("latent", ["lora"], ["lora.target_modules=q_b_proj"]),
        ("latent", ["lora"], ["lora.target_modules=shared_experts.down_proj"]),
    ],
)
def test_flops_of_adapters_equal_torchs_counter(name, converters, settings, monkeypatch):
    """Where factors of experts see rows. With tokens they are multiplied with more than is needed, which saves time."""
    monkeypatch.setattr(LowRankGroupedProduct, "suits_tokens", lambda *_: False)
    spec, batch, seq_len = SPECS[name], 2, 64
    model = build_model(spec, device="cpu")
    init_weights(model, seed=0)
    convert(model, converters, load_config(None, ["--lora.rank=6", *(f"--{setting}" for setting in settings)]))
    tokens = torch.randint(0, spec.vocab_size, (batch, seq_len))
    with counter() as counted:
        model(tokens).sum().backward()
    assert counted.get_total_flops() == training_flops_per_token(model, seq_len) * batch * seq_len
    if settings and "target_modules" in settings[0]:
        return
    with counter() as again, torch.no_grad():
        model(tokens)
    again = again.get_total_flops() - output_flops(spec) * batch * seq_len
    everything = hardware_flops_per_token(model, seq_len, [True] * len(spec.layers))
    assert everything * batch * seq_len == counted.get_total_flops() + again


def test_a_model_of_which_a_part_is_on_a_mesh_takes_as_many():
    spec, degrees = SPECS["mixed"], Degrees(pp=2, dp_shard=2, tp=2, ep=2)
    whole = build_model(spec)
    convert(whole, ["quantize.frozen.float8", "lora"], load_config(None, ["--lora.rank=6"]))
    expected = [hardware_flops_per_token(whole, 64, [again] * 3) for again in (False, True)]
    with pretend(0, degrees.num_ranks):
        mesh = Mesh.build(torch.device("cpu"), degrees)
        part = whole.view(Part((0, 1), projects=False))
        parallelize(part, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert [hardware_flops_per_token(whole, 64, [again] * 3) for again in (False, True)] == expected


def test_layers_before_the_first_adapter_are_not_computed_again():
    spec = SPECS["mixed"]
    model = build_model(spec)
    convert(model, ["lora"], load_config(None, ["--lora.target_modules=layers.2.moe"]))
    total, layers = training_flops_per_token(model, 64), range(3)
    again = [hardware_flops_per_token(model, 64, [index == layer for index in layers]) - total for layer in layers]
    assert again[:2] == [0, 0] and again[2] > sum(layer_flops(spec.layers[2], spec.dim, 64).values())


@pytest.mark.parametrize("name", SPECS)
def test_parameters_equal_the_decoders(name):
    model = build_model(SPECS[name])
    count = num_parameters(SPECS[name])
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        parameter.numel() * (layer.spec.num_experts - layer.spec.top_k) // layer.spec.num_experts
        for _, layer in model.moe_layers()
        for parameter in layer.experts.parameters()
    )
    assert count.active == count.total - idle


@pytest.mark.parametrize(
    ("flavor", "total", "active", "tolerance"),
    # Total and activated parameters of the model cards, in billions; the tolerance is their last digit.
    [
        ("30B-A3B", 30.5, 3.3, 0.06),
        ("235B-A22B", 235, 22, 0.5),
        ("0.6B", 0.6, 0.6, 0.05),
        ("4B", 4.0, 4.0, 0.05),
        ("8B", 8.2, 8.2, 0.05),
        ("14B", 14.8, 14.8, 0.05),
        ("32B", 32.8, 32.8, 0.05),
    ],
)
def test_published_parameter_counts(flavor, total, active, tolerance):
    count = num_parameters(FAMILY.flavors[flavor])
    assert count.total / 1e9 == pytest.approx(total, abs=tolerance)
    assert count.active / 1e9 == pytest.approx(active, abs=tolerance)


@pytest.mark.parametrize(
    ("change", "mean_keys"),
    [({}, 32), ({"window": 16}, 14), ({"window": 64}, 32), ({"chunk": 16}, 8), ({"chunk": 32, "window": 8}, 7)],
)
def test_windows_and_chunks_cost_what_they_show(change, mean_keys):
    """2 * keys * (16 + 16) channels * 4 heads, for 64 tokens."""
    layer = LayerSpec(replace(PLAIN, **change), Dense(48))
    assert layer_flops(layer, 32, 64)["attention_core"] == 2 * mean_keys * 32 * 4


def test_latent_attention_has_channels_of_two_sizes():
    flops = layer_flops(LayerSpec(Latent(4, None, 24, 12, 10, Rope(8, 1e4)), Dense(48)), 32, 64)
    assert flops["attention_core"] == 64 * 4 * (20 + 10)
    assert flops["attention_projections"] == 2 * (32 * 80 + 32 * (24 + 8) + 24 * 4 * (12 + 10) + 40 * 32)


def test_published_flops_of_qwen3_30b():
    # 23.0 GFLOP per token behind the published 299.4 TFLOP/s at 13,011 tokens/s (Megatron-Bridge, 4,096 tokens).
    flops = training_flops_per_token(build_model(FAMILY.flavors["30B-A3B"]), 4096)
    assert flops == pytest.approx(299.4e12 / 13_011, rel=0.005)


def test_hardware_flops_add_a_forward_of_each_recomputed_layer():
    spec = SPECS["mixed"]
    model = build_model(spec)
    layers = [sum(layer_flops(layer, spec.dim, 64).values()) for layer in spec.layers]
    total = training_flops_per_token(model, 64)
    assert hardware_flops_per_token(model, 64, [False] * 3) == total
    assert hardware_flops_per_token(model, 64, [False, True, False]) == total + layers[1]
    assert hardware_flops_per_token(model, 64, [True] * 3) == total + sum(layers)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("AMD Instinct MI250X / MI250", 191.5),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI355X", 2500.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops_by_device_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_float32_has_no_stated_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float16") == peak_flops("NVIDIA H100 80GB HBM3")
