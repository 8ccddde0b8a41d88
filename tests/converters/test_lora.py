"""Adapters on models of every family: what gets them, what is trained, what is told, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titanmoe
from tests.models.kinds import KINDS, WIDE
from tests.parallel.adapters import starve
from titanmoe.config import ConfigError, JobConfig, load_config
from titanmoe.config.validate import validate_keys
from titanmoe.converters.apply import Conversion, convert
from titanmoe.converters.lora import LoRA
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.grouped_mm import Kernel, PlainGroupedProduct
from titanmoe.ops.scaled_product import LowPrecisionProduct

QUANTISERS = ("quantize.linear.float8", "quantize.grouped_mm.mx")
_TOKENS = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(0))


def config_of(*args: str) -> JobConfig:
    return load_config(None, [f"--{arg}" for arg in args])


def adapted(spec: Any, *args: str, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Conversion]:
    """A model with values, then adapters; and what was told."""
    model = build_model(spec, device="cpu", dtype=dtype)
    init_weights(model, seed=1)
    return model, convert(model, ["lora"], config_of(*args))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LATENT = {"kv_a_proj", "kv_b_proj", "o_proj"}
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
LINEARS = {
    "qwen3": _ATTENTION | {"experts"},
    "qwen2": _ATTENTION | _FEED_FORWARD,
    "llama3": _ATTENTION | _FEED_FORWARD,
    "glm4_moe": _ATTENTION | _FEED_FORWARD | {"experts"},
    "glm4_moe_lite": _LATENT | {"q_a_proj", "q_b_proj"} | _FEED_FORWARD | {"experts"},
    "deepseek_v3": _LATENT | {"q_proj"} | _FEED_FORWARD | {"experts"},
    "llama4": _ATTENTION | _FEED_FORWARD | {"experts"},
    "gpt_oss": _ATTENTION | {"experts"},
    "mixtral": _ATTENTION | {"experts"},
}
"""The last segments of what has adapters in the debug model of a family."""


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_debug_model_of_every_family_takes_two_steps(family: str, dora: bool) -> None:
    """From the logits that it has without adapters; shared experts and dense layers have the whole rank."""
    spec = get_family(family).flavors["debug_moe" if family == "qwen3" else "debugmodel"]
    spec = replace(spec, layers=tuple(dict.fromkeys(spec.layers)))
    model = build_model(spec, device="cpu", dtype=torch.bfloat16 if dora else torch.float32)
    init_weights(model, seed=1)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(_TOKENS)
    convert(model, ["lora"], config_of("lora.rank=8", *["lora.use_dora"] * dora))
    assert torch.equal(model(_TOKENS), before)
    owners = {name.rpartition(".")[0] for name in trained(model)}
    assert {path.rpartition(".")[2] for path in owners} == LINEARS[family]
    for path in owners:
        module = model.get_submodule(path)
        rank = 8 // module.spec.top_k if isinstance(module, Experts) else 8
        assert (module.down_lora_a if isinstance(module, Experts) else module.lora_a).shape[-2] == rank
    first = {name: value.detach().clone() for name, value in trained(model).items()}
    assert not any(value.isnan().any() for value in first.values())
    optimizer, losses = torch.optim.AdamW(trained(model).values(), lr=1e-2), []
    for _ in range(2):
        loss = titanmoe.causal_lm_loss(model, _TOKENS, _TOKENS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all((value != first[name]).any() for name, value in trained(model).items())
    after = model.state_dict()
    assert {name for name in after if name not in base} == first.keys()
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_every_linear_layer_and_expert_gets_one_but_router_embedding_and_output() -> None:
    model, conversion = adapted(KINDS["latent"], "lora.rank=9")
    owners = {name.rpartition(".")[0] for name in trained(model)}
    assert owners == {path for path, module in model.named_modules() if isinstance(module, (Linear, Experts))}
    assert not any("router" in path or path in ("tok_embeddings", "output") for path in owners)
    experts = model.layers["1"].moe.experts
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters() if "lora" in name}
    assert shapes == {
        "gate_up_lora_a": (12, 3, 40),
        "gate_up_lora_b": (12, 2, 24, 3),
        "down_lora_a": (12, 3, 24),
        "down_lora_b": (12, 40, 3),
    }
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", conversion.summary[0])]
    num_linears = len(owners) - 1
    assert num_linears + 1 in numbers and num_linears + 24 in numbers and 24 in numbers and 12 in numbers
    num_trained = sum(parameter.numel() for parameter in trained(model).values())
    share = num_trained / sum(parameter.numel() for parameter in model.parameters())
    assert f"{num_trained:,} trainable parameters in float32, {share:.2%} of all" in conversion.summary[0]
    assert {row.now for row in conversion.rows} == {"LoRA", ""}


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_first_values(init: str) -> None:
    model, _ = adapted(KINDS["latent"], "lora.rank=9", f"lora.init={init}")
    for name, parameter in trained(model).items():
        values, is_a = parameter.detach(), name.endswith("lora_a")
        rank_dim = -2 if is_a else -1
        stds = {"kaiming": (3 * values.shape[-1]) ** -0.5, "gaussian": 1 / values.shape[-2], "orthogonal": 0.1}
        expected = stds[init]
        if init == "orthogonal":
            assert not values.movedim(rank_dim, 0)[1 if is_a else 0 :: 2].any()
            values = values.movedim(rank_dim, 0)[0 if is_a else 1 :: 2]
        elif not is_a:
            assert not values.any()
            continue
        assert abs(float(values.std()) / expected - 1) < 0.2, name
        assert (init == "kaiming") == bool(values.abs().max() <= 1.001 * 3**0.5 * expected)
        if "_lora_" in name and is_a and init != "orthogonal":  # no two experts have the same
            assert len({round(float(each.sum()), 6) for each in values}) == 12
    again, _ = adapted(KINDS["latent"], "lora.rank=9", f"lora.init={init}")
    other, _ = adapted(KINDS["latent"], "lora.rank=9", f"lora.init={init}", "debug.seed=5")
    first = "layers.0.attention.q_a_proj.lora_a"
    assert torch.equal(trained(again)[first], trained(model)[first])
    assert not torch.equal(trained(other)[first], trained(model)[first])


@pytest.mark.parametrize(
    ("args", "of_linear", "of_experts"),
    [
        ((), (16, 2.0), (5, 2.0)),
        (("lora.expert_rank=4", "lora.alpha=24"), (16, 1.5), (4, 1.5)),
        (("lora.use_rslora",), (16, 8.0), (5, 32 * 5 / 16 / 5**0.5)),
        (("lora.rank=6", "lora.alpha=3", "lora.expert_rank=12"), (6, 0.5), (12, 0.5)),
    ],
    ids=str,
)
def test_ranks_and_scales(args: tuple[str, ...], of_linear: tuple, of_experts: tuple) -> None:
    """KINDS["latent"] sends each token to three experts."""
    model, _ = adapted(KINDS["latent"], *args)
    converter = LoRA.from_job(config_of(*args), torch.device("cpu"))
    linear, experts = model.layers["0"].attention.o_proj, model.layers["1"].moe.experts
    assert (linear.lora_a.shape[0], converter.scale(linear)) == pytest.approx(of_linear)
    assert (experts.down_lora_a.shape[1], converter.scale(experts)) == pytest.approx(of_experts)
    assert linear.product.scale == converter.scale(linear)
    assert experts.down_product.scale == experts.gate_up_product.scale == converter.scale(experts)


def test_target_modules_are_segments_of_paths() -> None:
    model, conversion = adapted(KINDS["latent"], "lora.target_modules=layers.0.attention.*,experts,q_proj")
    owners = {name.rpartition(".")[0] for name in trained(model)}
    assert "layers.1.moe.experts" in owners and "layers.1.attention.q_proj" in owners
    assert not any(
        "shared_experts" in path or "feed_forward" in path or "layers.1.attention.o" in path for path in owners
    )
    assert {row.why for row in conversion.rows if row.path.endswith("shared_experts.up_proj")} == {
        "not in target_modules"
    }
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize(
    ("targets", "weights"),
    [
        ("experts", {"gate_up", "down"}),
        ("q_proj,gate_proj,up_proj,down_proj", {"gate_up", "down"}),
        ("experts.gate_up_proj", {"gate_up"}),
        ("layers.*.moe.experts.down_proj", {"down"}),
        ("experts.[gu]*_proj", {"gate_up"}),
        ("attention,experts.down_*", {"down"}),
        ("attention", set()),
    ],
)
def test_weights_of_experts_may_be_targets_alone(targets: str, weights: set[str]) -> None:
    model, conversion = adapted(KINDS["latent"], "lora.rank=9", f"lora.target_modules={targets}", "lora.use_dora")
    found = {name.rpartition(".")[2] for name in trained(model) if ".experts." in name}
    assert found == {f"{weight}_lora_{part}" for weight in weights for part in ("a", "b", "magnitude")}
    (row,) = [row for row in conversion.rows if row.path.endswith(".experts")]
    assert row.now == ("" if not weights else "DoRA" if len(weights) == 2 else f"DoRA of {min(weights)}_proj")
    num_adapters = sum(name.endswith("lora_a") for name in trained(model)) + 11 * len(weights)
    assert f" {num_adapters} adapters" in conversion.summary[0]
    titanmoe.causal_lm_loss(model, _TOKENS, _TOKENS).backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("expert", 'matches none of the .* Did you mean "experts"'),
        ("layers.7", "matches none"),
        ("router.gate", r"names layers.1.moe.router.gate, which never has"),
        ("output", "names output, which never has"),
        ("tok_embeddings", "names tok_embeddings, which never has"),
        ("attention_norm", "names layers.0.attention_norm, which never has"),
        ("experts.gate_proj", "gate_proj of layers.1.moe.experts is named without the other"),
    ],
)
def test_each_target_must_be_something_that_may_have_an_adapter(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)lora.target_modules: .*{words}"):
        adapted(KINDS["latent"], f"lora.target_modules=attention,{pattern}")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 = 0"):
        adapted(KINDS["latent"], "lora.rank=2")
    adapted(KINDS["latent"], "lora.rank=2", "lora.target_modules=attention")
    forgets = "activation_checkpoint.no_preserve_rng_state"
    with pytest.raises(ConfigError, match=r"dropout: is .*, and layers that are recomputed"):
        validate_keys(config_of("model.converters=lora", "lora.dropout=0.1", forgets))
    validate_keys(config_of("model.converters=lora", "lora.dropout=0.1", forgets, "activation_checkpoint.mode=none"))
    with pytest.raises(ConfigError, match="comes after"):
        validate_keys(config_of("model.converters=lora,quantize.linear.mx"))
    for rank in ("0", "-1", "many", "1.5"):
        with pytest.raises(ConfigError, match='"scaled" or a whole number'):
            config_of(f"lora.expert_rank={rank}")
    model, _ = adapted(WIDE)
    with pytest.raises(ConfigError, match="adapters already"):
        convert(model, ["lora"], config_of())
    with pytest.raises(ConfigError, match="second time"):
        convert(model, ["quantize.linear.float8"], config_of("quantize.linear.float8.emulate"))


def test_dropout_is_for_training_only() -> None:
    model, _ = adapted(KINDS["latent"], "lora.dropout=0.5")
    for name, parameter in trained(model).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(0)
    first, second = model(_TOKENS), model(_TOKENS)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(_TOKENS), model(_TOKENS))


BASES: dict[str, tuple[torch.dtype, Kernel, tuple[str, ...]]] = {
    "loop": (torch.float32, "loop", ()),
    "torch": (torch.float32, "torch", ()),
    "bfloat16": (torch.bfloat16, "torch", ()),
    "quantised": (torch.float32, "auto", QUANTISERS),
    "float8": (torch.float32, "auto", ("quantize.frozen.float8",)),
    "mx": (torch.bfloat16, "auto", ("quantize.frozen.mx",)),
    "nf4": (torch.float32, "auto", ("quantize.frozen.nf4",)),
}
"""Dtype, kernel of plain products, and what is below adapters."""


def on_base(name: str, *args: str) -> tuple[Decoder, Tensor, Conversion]:
    """A model with adapters, the logits that it had before, and what was told."""
    dtype, kernel, names = BASES[name]
    model = build_model(WIDE, device="cpu", dtype=dtype)
    init_weights(model, seed=1)
    for _, layer in model.moe_layers():
        layer.experts.gate_up_product = layer.experts.down_product = PlainGroupedProduct(kernel)
    settings = [f"{each}.emulate" for each in names if each in QUANTISERS] + ["quantize.frozen.nf4.block_size=32"]
    if names:
        convert(model, names, config_of(*settings))
    starve(model)
    before = model(_TOKENS)
    return model, before, convert(model, ["lora"], config_of("lora.rank=8", *args))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_three_steps_move_every_adapter_that_saw_tokens_and_nothing_else(base: str, dora: bool) -> None:
    """From the logits without adapters, bit for bit."""
    model, before, _ = on_base(base, *["lora.use_dora"] * dora, f"lora.init={'orthogonal' if dora else 'kaiming'}")
    assert torch.equal(model(_TOKENS), before)
    if base == "quantised":
        products = [module.product.base for module in model.modules() if isinstance(module, Linear)]
        assert all(isinstance(product, LowPrecisionProduct) for product in products)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        titanmoe.causal_lm_loss(model, _TOKENS, _TOKENS).backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    counts = {index: layer.router.num_tokens_per_expert_E for index, layer in model.moe_layers()}
    seen = {f"layers.{index}.moe.experts": count_E > 0 for index, count_E in counts.items()}
    assert all(seen_E.any() and not seen_E[0] for seen_E in seen.values())
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != first[name]
        if "_lora_" in name:
            assert torch.equal(moved.flatten(1).any(1), seen[name.rpartition(".")[0]]), name
        else:
            assert moved.any() == ("lora_" in name), name


def test_on_a_model_in_bfloat16_adapters_are_what_they_are_told_to_be() -> None:
    for dtype in ("float32", "bfloat16"):
        model, _ = adapted(KINDS["grouped-query"], f"lora.dtype={dtype}", dtype=torch.bfloat16)
        assert {str(parameter.dtype) for parameter in trained(model).values()} == {f"torch.{dtype}"}
        assert model(_TOKENS).dtype == torch.bfloat16
