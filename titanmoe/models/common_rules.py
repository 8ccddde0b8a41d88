"""Rules between file tensors and parameters that several families share."""

from __future__ import annotations

from titanmoe.models.keys import Axes, Rule

LAYER = "model.layers.{i}"

ENDS = (
    Rule("model.embed_tokens.weight", "tok_embeddings.weight"),
    Rule("model.norm.weight", "norm.weight"),
    Rule("lm_head.weight", "output.weight"),
)
NORMS = (
    Rule(f"{LAYER}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
)


def linears(file_prefix: str, prefix: str, *names: str, bias: bool = False) -> tuple[Rule, ...]:
    """Modules of the same name on both sides, with weights and, if some model of the family has them, biases."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return tuple(Rule(f"{file_prefix}.{name}.{kind}", f"{prefix}.{name}.{kind}") for name in names for kind in kinds)


GROUPED_QUERY = linears(f"{LAYER}.self_attn", "layers.{i}.attention", "q_proj", "k_proj", "v_proj", "o_proj", bias=True)
QK_NORMS = linears(f"{LAYER}.self_attn", "layers.{i}.attention", "q_norm", "k_norm")
LATENT = (
    *linears(f"{LAYER}.self_attn", "layers.{i}.attention", "q_proj", "q_b_proj", "kv_b_proj"),
    *linears(f"{LAYER}.self_attn", "layers.{i}.attention", "q_a_proj", "o_proj", bias=True),
    *(
        Rule(f"{LAYER}.self_attn.kv_a_proj_with_mqa.{kind}", f"layers.{{i}}.attention.kv_a_proj.{kind}")
        for kind in ("weight", "bias")
    ),
    Rule(f"{LAYER}.self_attn.q_a_layernorm.weight", "layers.{i}.attention.q_a_norm.weight"),
    Rule(f"{LAYER}.self_attn.kv_a_layernorm.weight", "layers.{i}.attention.kv_a_norm.weight"),
)
DENSE = linears(f"{LAYER}.mlp", "layers.{i}.feed_forward", "gate_proj", "up_proj", "down_proj")
SHARED_EXPERTS = linears(
    f"{LAYER}.mlp.shared_experts", "layers.{i}.moe.shared_experts", "gate_proj", "up_proj", "down_proj"
)
GATE = (Rule(f"{LAYER}.mlp.gate.weight", "layers.{i}.moe.router.gate.weight"),)
SELECTION_BIAS = (Rule(f"{LAYER}.mlp.gate.e_score_correction_bias", "layers.{i}.moe.router.expert_bias"),)


def expert_by_expert(
    file_prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """One file tensor per expert and projection, each (out, in); `file_prefix` ends with the experts' module."""
    return (
        Rule(f"{file_prefix}.{{e}}.{gate}.weight", "layers.{i}.moe.experts.gate_up", at=("e", 0)),
        Rule(f"{file_prefix}.{{e}}.{up}.weight", "layers.{i}.moe.experts.gate_up", at=("e", 1)),
        Rule(f"{file_prefix}.{{e}}.{down}.weight", "layers.{i}.moe.experts.down", at=("e",)),
    )


EXPERTS = expert_by_expert(f"{LAYER}.mlp.experts")
STACKED_EXPERTS = (
    Rule(f"{LAYER}.mlp.experts.gate_up_proj", "layers.{i}.moe.experts.gate_up", axes=Axes("e (g h) d", "e g h d")),
    Rule(f"{LAYER}.mlp.experts.down_proj", "layers.{i}.moe.experts.down"),
)
"""All experts of a layer in two file tensors, gate above up: what newer releases hold in place of EXPERTS."""
