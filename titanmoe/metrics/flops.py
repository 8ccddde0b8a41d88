"""FLOPs of training, parameters of a `DecoderSpec`, and the peak rates of accelerators.

A training step is three forwards: every product is done once more for the gradient of its input and once more for that
of its weight. A frozen weight has no gradient, so it takes two; and one before the first thing that learns, from where
on inputs have gradients. MFU (Chowdhery et al., arXiv 2204.02311, appendix B) divides those FLOPs by the peak rate; HFU
adds the FLOPs that activation checkpointing computes again. Qwen3-30B-A3B at 4,096 tokens: 23.1 GFLOP per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from titanmoe.models.adapters import is_adapter
from titanmoe.models.decoder import Block, Decoder
from titanmoe.models.flops import forward_flops_per_token, layer_flops, output_flops, projection_weights
from titanmoe.models.gradients import gradient_flow, place_after
from titanmoe.models.moe.experts import Experts
from titanmoe.models.spec import DecoderSpec, GroupedQuery, Latent, MoE


@dataclass(frozen=True)
class ParameterCount:
    total: int
    active: int
    """Parameters that one token passes through: all but the routed experts it did not choose."""


def training_flops_per_token(model: Decoder, seq_len: int) -> int:
    """FLOPs per token of a forward and a backward without recomputation. The numerator of MFU.

    DoRA's norms of rows are left out: they take the same time for any number of tokens.

    Args:
        model: the whole, converted; it may be distributed.
    """
    spec, total = model.spec, forward_flops_per_token(model.spec, seq_len)
    flows = gradient_flow(model)
    for layer, block, flow in zip(spec.layers, model.blocks(), flows, strict=True):
        total += 2 * layer_flops(layer, spec.dim, seq_len)["attention_core"] * flow.heads
        for name, num_used, learns in _weights(block):
            goes_back = name.endswith("lora_b") or flow[place_after(name) - 1]  # A learns
            total += 2 * num_used * (is_adapter(name) + learns + goes_back)
    output = model.output or model.tok_embeddings
    assert output is not None and model.norm is not None, "a whole model"
    goes_back = flows[-1].output or model.norm.weight.requires_grad
    return total + output_flops(spec) * (output.weight.requires_grad + goes_back)


def hardware_flops_per_token(model: Decoder, seq_len: int, recomputed: Sequence[bool]) -> int:
    """FLOPs per token that the device really does: training plus one more forward of the recomputed layers.

    The numerator of HFU.

    Args:
        model: as in `training_flops_per_token`.
        recomputed: for each layer, whether activation checkpointing computes all of it again. A layer that keeps the
            outputs of its products computes none of them again: False.
    """
    spec, total = model.spec, training_flops_per_token(model, seq_len)
    assert len(recomputed) == len(spec.layers), f"{len(recomputed)} flags for {len(spec.layers)} layers"
    for layer, block, flow, again in zip(spec.layers, model.blocks(), gradient_flow(model), recomputed, strict=True):
        if again and flow.output:
            total += sum(layer_flops(layer, spec.dim, seq_len).values())
            total += sum(2 * num_used for name, num_used, _ in _weights(block) if is_adapter(name))
    return total


def _weights(block: Block) -> Iterator[tuple[str, int, bool]]:
    """Of every product of a layer and its adapter: the weight's name, how many of its numbers a token meets, and
    whether it learns."""
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            weights, share = {"weight": module.in_features * module.out_features}, (1, 1)
        elif isinstance(module, Experts):
            moe = module.spec
            size, share = moe.num_experts * module.dim * moe.hidden_dim, (moe.top_k, moe.num_experts)
            weights = {"gate_up": 2 * size, "down": size}
        else:
            continue
        own = dict(module.named_parameters(recurse=False))
        weights |= {name: factor.numel() for name, factor in own.items() if name.endswith(("lora_a", "lora_b"))}
        for name, numel in weights.items():
            yield f"{path}.{name}", numel * share[0] // share[1], name in own and own[name].requires_grad


def num_parameters(spec: DecoderSpec) -> ParameterCount:
    """Parameters of the model, embeddings and norms included; tied embeddings count once, buffers not at all."""
    embeddings = spec.dim * spec.vocab_size * (1 if spec.tie_embeddings else 2)
    total = active = embeddings + spec.dim
    for layer in spec.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        always = 2 * spec.dim + projection_weights(attention, spec.dim) + _attention_vectors(attention, spec.dim)
        if isinstance(feed_forward, MoE):
            expert = 3 * spec.dim * feed_forward.hidden_dim
            expert += 2 * feed_forward.hidden_dim + spec.dim if feed_forward.bias else 0
            always += (spec.dim + feed_forward.router.gate_bias) * feed_forward.num_experts
            if feed_forward.shared is not None:
                always += 3 * spec.dim * feed_forward.shared.hidden_dim
            total += expert * feed_forward.num_experts
            active += expert * feed_forward.top_k
        else:
            always += 3 * spec.dim * feed_forward.hidden_dim
        total += always
        active += always
    return ParameterCount(total, active)


def _attention_vectors(attention: GroupedQuery | Latent, dim: int) -> int:
    """Parameters of biases, norms and sinks."""
    if isinstance(attention, Latent):
        rank = attention.q_lora_rank or 0
        biases = rank + attention.kv_lora_rank + attention.rope.dim + dim
        return rank + attention.kv_lora_rank + (biases if attention.bias else 0)
    num_vectors = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim if attention.qkv_bias else 0
    num_vectors += dim if attention.out_bias else 0
    num_vectors += 2 * attention.head_dim if attention.qk_norm else 0
    return num_vectors + (attention.num_heads if attention.sinks else 0)


# Dense (no sparsity) bfloat16 matrix rates with float32 accumulation, in TFLOP/s, from the vendors' data sheets.
# A row matches when all its words are words of the device's name; the first match counts, so variants come first.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.5),  # NVIDIA H100 data sheet (sparse 1,513)
    ("H100 NVL", 835.5),  # NVIDIA H100 NVL product brief (sparse 1,671)
    ("H100", 989.4),  # NVIDIA H100 data sheet, SXM (sparse 1,979)
    ("H800 PCIe", 756.5),  # as H100 PCIe
    ("H800", 989.4),  # as H100 SXM
    ("H200 NVL", 835.5),  # NVIDIA H200 data sheet (sparse 1,671)
    ("H200", 989.4),  # NVIDIA H200 data sheet, SXM (sparse 1,979)
    ("GH200", 989.4),  # NVIDIA GH200 data sheet (sparse 1,979)
    ("H20", 148.0),  # NVIDIA H20 specification
    ("GB300", 2500.0),  # NVIDIA GB300 NVL72 (72 GPUs, sparse 360,000)
    ("B300", 2250.0),  # NVIDIA HGX B300 (8 GPUs, sparse 36,000)
    ("GB200", 2500.0),  # NVIDIA GB200 NVL72 (72 GPUs, sparse 360,000)
    ("B200", 2250.0),  # NVIDIA HGX B200 (8 GPUs, sparse 36,000)
    ("A100", 312.0),  # NVIDIA A100 data sheet, SXM and PCIe
    ("A800", 312.0),  # as A100
    ("A30", 165.0),  # NVIDIA A30 data sheet
    ("A40", 149.7),  # NVIDIA A40 data sheet
    ("A10G", 70.0),  # AWS EC2 G5 specification
    ("A10", 125.0),  # NVIDIA A10 data sheet
    ("L40S", 362.05),  # NVIDIA L40S data sheet
    ("L40", 181.05),  # NVIDIA L40 data sheet
    ("L20", 119.5),  # NVIDIA L20 specification
    ("L4", 121.0),  # NVIDIA L4 data sheet (sparse 242)
    ("RTX 6000 Ada", 364.2),  # NVIDIA Ada GPU architecture whitepaper
    ("RTX A6000", 154.8),  # NVIDIA Ampere GA102 whitepaper
    ("RTX 3090", 71.0),  # NVIDIA Ampere GA102 whitepaper, float32 accumulation
    ("RTX 4090", 165.2),  # NVIDIA Ada GPU architecture whitepaper, float32 accumulation
    ("RTX 5090", 209.5),  # NVIDIA RTX Blackwell architecture whitepaper, float32 accumulation
    ("MI250X", 191.5),  # AMD Instinct MI250X (383.0); a device is one of its two dies
    ("MI250", 181.05),  # AMD Instinct MI250 (362.1); a device is one of its two dies
    ("MI210", 181.0),  # AMD Instinct MI210
    ("MI300A", 980.6),  # AMD Instinct MI300A
    ("MI300X", 1307.4),  # AMD Instinct MI300X
    ("MI325X", 1307.4),  # AMD Instinct MI325X
    ("MI350X", 2300.0),  # AMD Instinct MI350X
    ("MI355X", 2500.0),  # AMD Instinct MI355X
)
_OTHER_CHIPS = frozenset({"laptop", "mobile", "max", "mig", "d", "ti", "super"})


def peak_flops(device_name: str, dtype: str = "bfloat16") -> float | None:
    """Peak matrix rate of one device in FLOP/s, or None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
        dtype: what the products compute in, as the config names it. Only "bfloat16" and "float16" have a peak here:
            what float32 reaches depends on the TF32 setting, and a CPU's peak on its clock. FP8 products are by
            convention rated against the bfloat16 peak.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if dtype not in ("bfloat16", "float16") or words & _OTHER_CHIPS:
        return None
    for name, tflops in _PEAK_TFLOPS:
        if set(name.lower().split()) <= words:
            return tflops * 1e12
    return None
