"""What the `config.json` of DeepSeek's models, and of the models made like them, have in common.

These are latent attention, experts in groups with shared ones beside them, and dense layers before the sparse ones.
Options that are not named here and change nothing that is computed (`ep_size`, `aux_loss_alpha`, ...) are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.hf_config import HfConfig
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, Latent, LayerSpec, MoE, Router

_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def read_latent(values: Mapping[str, Any], *, interleaved: bool) -> Latent:
    """Latent attention, from all of a `config.json`: here alone, absent (refused) and `null` are not the same."""
    config = HfConfig(values)
    config.require("use_mla", True, default=True)
    num_heads, num_kv_heads = config.heads()
    if num_kv_heads != num_heads:
        raise ConfigError(
            f"latent attention has as many key-value heads as query heads, {num_heads}, not {num_kv_heads}",
            where=config.where("num_key_value_heads"),
        )
    if "q_lora_rank" not in values:
        raise ConfigError(
            "q_lora_rank is missing",
            where=config.where("q_lora_rank"),
            mend="null: queries come straight from the model dim",
        )
    rope_dim = config.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise ConfigError(f"{rope_dim} channels cannot be rotated in pairs", where=config.where("qk_rope_head_dim"))
    rope = config.rope(rope_dim, interleaved=interleaved)
    if rope.dim != rope_dim:
        raise ConfigError(
            f"only {rope.dim} of the {rope_dim} channels with positions rotated is not supported",
            where=config.where("partial_rotary_factor"),
        )
    return Latent(
        num_heads=num_heads,
        q_lora_rank=config.integer("q_lora_rank") if "q_lora_rank" in config else None,
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        v_head_dim=config.integer("v_head_dim"),
        rope=rope,
        bias=config.flag("attention_bias"),
    )


def latent_entries(attention: Latent) -> dict[str, Any]:
    """What `read_latent` reads, beside what every decoder has."""
    return {
        "attention_bias": attention.bias,
        "kv_lora_rank": attention.kv_lora_rank,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.rope.dim,
        "v_head_dim": attention.v_head_dim,
    }


def read_sigmoid_router(config: HfConfig, *, default_groups: int | None, default_scale: float) -> Router:
    """DeepSeek-V3's: sigmoid scores, chosen with a bias that balances the load (arXiv 2412.19437, 2.1.2).

    Args:
        default_groups: `n_group` and `topk_group` where the config has none; None: they are required.
        default_scale: `routed_scaling_factor` where the config has none.
    """
    config.require("scoring_func", "sigmoid", default="sigmoid")
    config.require("topk_method", "noaux_tc", default="noaux_tc")
    num_groups, top_groups = _read_groups(config, default_groups, smallest=2)
    return Router(
        score="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", default_scale),
        selection_bias=True,
        num_groups=num_groups,
        top_groups=top_groups,
    )


def read_softmax_router(config: HfConfig) -> Router:
    """DeepSeek-V2's: softmax scores, not normalised again (arXiv 2405.04434, 2.2)."""
    config.require("scoring_func", "softmax", default="softmax")
    # The authors' code normalises and then does not scale, transformers' scales and never normalises.
    config.require("norm_topk_prob", False, default=False)
    method = config.require("topk_method", "greedy", "group_limited_greedy", default="greedy")
    num_groups, top_groups = (1, 1) if method == "greedy" else _read_groups(config, None, smallest=1)
    return Router(
        score="softmax",
        normalize=False,
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score="max" if num_groups > 1 else "top2",
    )


def read_num_dense(config: HfConfig, *, default: int) -> int:
    """`first_k_dense_replace`, at most all layers; `default` where the config has none."""
    config.require("moe_layer_freq", 1, default=1)
    return min(config.integer("first_k_dense_replace", default=default, least=0), config.integer("num_hidden_layers"))


def read_layers(
    config: HfConfig,
    attention: GroupedQuery | Latent,
    is_dense: Sequence[bool],
    read_router: Callable[[HfConfig], Router],
) -> list[LayerSpec]:
    """Layers with the same attention; what only dense or only sparse ones need is read if there are any.

    The `n_shared_experts` that are always on make up one wider feed-forward.
    """
    layers = {}
    if True in is_dense:
        layers[True] = LayerSpec(attention, Dense(config.integer("intermediate_size")))
    if False in is_dense:
        num_experts, top_k = config.experts(*_NUM_EXPERTS)
        hidden_dim, num_shared = config.integer("moe_intermediate_size"), config.integer("n_shared_experts", least=0)
        shared = Dense(num_shared * hidden_dim) if num_shared else None
        layers[False] = LayerSpec(attention, MoE(num_experts, top_k, hidden_dim, read_router(config), shared))
    return [layers[dense] for dense in is_dense]


def feed_forward_entries(spec: DecoderSpec) -> dict[str, Any]:
    """What `read_num_dense`, `read_layers` and the readers of routers read, of a model whose first layers are dense."""
    dense = [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    entries: dict[str, Any] = {
        "first_k_dense_replace": len(dense),
        "intermediate_size": dense[0].hidden_dim if dense else 4 * spec.dim,
    }
    experts = first_experts(spec)
    if experts is None:
        return entries
    router = experts.router
    softmax_method = "group_limited_greedy" if router.num_groups > 1 else "greedy"
    return entries | {
        "moe_intermediate_size": experts.hidden_dim,
        "n_group": router.num_groups,
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared.hidden_dim // experts.hidden_dim if experts.shared else 0,
        "norm_topk_prob": router.normalize,
        "num_experts_per_tok": experts.top_k,
        "routed_scaling_factor": router.scale,
        "scoring_func": router.score,
        "topk_group": router.top_groups,
        "topk_method": "noaux_tc" if router.score == "sigmoid" else softmax_method,
    }


def first_experts(spec: DecoderSpec) -> MoE | None:
    return next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, MoE)), None)


def _read_groups(config: HfConfig, default: int | None, *, smallest: int) -> tuple[int, int]:
    """How many groups the experts are in, each at least `smallest`, and how many of them a token chooses among."""
    num_experts, top_k = config.experts(*_NUM_EXPERTS)
    num_groups, top_groups = config.integer("n_group", default=default), config.integer("topk_group", default=default)
    if num_experts % num_groups or num_experts // num_groups < smallest:
        raise ConfigError(
            f"{num_experts} experts cannot be in {num_groups} groups of at least {smallest}",
            where=config.where("n_group"),
        )
    if top_groups > num_groups or top_groups * (num_experts // num_groups) < top_k:
        raise ConfigError(
            f"{top_k} experts cannot be chosen from {top_groups} of {num_groups} groups of {num_experts // num_groups}",
            where=config.where("topk_group"),
        )
    return num_groups, top_groups
