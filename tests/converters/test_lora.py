"""Adapters on models of every family: what gets them, what is trained, what is told, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titanmoe
from tests.models.kinds import KINDS, WIDE
from titanmoe.config import ConfigError, JobConfig, load_config
from titanmoe.config.validate import validate_keys
from titanmoe.converters.apply import Conversion, convert
from titanmoe.converters.lora import LoRA
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_no_logit_of_any_family(family: str) -> None:
    flavors = get_family(family).flavors
    spec = flavors["debug_moe" if family == "qwen3" else "debugmodel"]
    for dtype, args in ((torch.float32, ()), (torch.bfloat16, ("lora.use_dora",))):
        model = build_model(spec, device="cpu", dtype=dtype)
        init_weights(model, seed=1)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        before = model(_TOKENS)
        convert(model, ["lora"], config_of("lora.rank=8", *args))
        assert torch.equal(model(_TOKENS), before)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in base.items())
        assert {name for name in after if name not in base} == set(trained(model))
        assert all(not parameter.isnan().any() for parameter in trained(model).values())


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
    assert num_linears + 1 in numbers and num_linears + 24 in numbers and 12 in numbers
    assert sum(parameter.numel() for parameter in trained(model).values()) in numbers
    assert {row.now for row in conversion.rows} == {"LoRA", ""}


def test_first_values_of_a_are_uniform_up_to_one_over_the_square_root_of_inputs() -> None:
    model, _ = adapted(KINDS["latent"], "lora.rank=9")
    for name, parameter in trained(model).items():
        if name.endswith("lora_b"):
            assert not parameter.any()
        else:
            most = parameter.shape[-1] ** -0.5
            assert 0.9 * most < parameter.abs().max() <= most
            assert abs(float(parameter.detach().std()) / (most / 3**0.5) - 1) < 0.2
    again, _ = adapted(KINDS["latent"], "lora.rank=9")
    other, _ = adapted(KINDS["latent"], "lora.rank=9", "debug.seed=5")
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


@pytest.mark.parametrize("pattern", ["expert", "router.gate", "output", "tok_embeddings", "layers.7"])
def test_each_target_must_match_what_may_have_an_adapter(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f'"{re.escape(pattern)}" matches none'):
        adapted(KINDS["latent"], f"lora.target_modules=experts,{pattern}")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 = 0"):
        adapted(KINDS["latent"], "lora.rank=2")
    adapted(KINDS["latent"], "lora.rank=2", "lora.target_modules=attention")
    with pytest.raises(ConfigError, match="comes after"):
        validate_keys(config_of("model.converters=lora,quantize.linear.mx"))
    for rank in ("0", "-1", "many", "1.5"):
        with pytest.raises(ConfigError, match="whole number"):
            validate_keys(config_of("model.converters=lora", f"lora.expert_rank={rank}"))
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


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "quantised", "frozen"])
def test_three_steps_move_every_adapter_that_saw_tokens_and_nothing_else(base: str, dora: bool) -> None:
    model = build_model(WIDE, device="cpu", dtype=torch.bfloat16 if base == "bfloat16" else torch.float32)
    init_weights(model, seed=1)
    names = [*{"quantised": QUANTISERS, "frozen": ["quantize.frozen.mx"]}.get(base, ()), "lora"]
    emulate = [f"{name}.emulate" for name in names if name in QUANTISERS]
    conversion = convert(model, names, config_of("lora.rank=8", *emulate, *["lora.use_dora"] * dora))
    if base == "quantised":
        kind = "DoRA" if dora else "LoRA"
        assert {row.now for row in conversion.rows} == {f"FP8 + {kind}", f"MXFP8 + {kind}", ""}
        products = [module.product.base for module in model.modules() if isinstance(module, Linear)]
        assert all(isinstance(product, LowPrecisionProduct) for product in products)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(3):
        titanmoe.causal_lm_loss(model, _TOKENS, _TOKENS).backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    seen = {f"layers.{index}.moe.experts": layer.router.num_tokens_per_expert_E for index, layer in model.moe_layers()}
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() != before[name]).flatten(1 if "experts." in name and "_lora_" in name else 0)
        if "_lora_" in name:
            assert moved.any(1)[seen[name.rpartition(".")[0]] > 0].all(), name
        else:
            assert moved.any() == ("lora_" in name), name


def test_on_a_model_in_bfloat16_adapters_are_what_they_are_told_to_be() -> None:
    for dtype in ("float32", "bfloat16"):
        model, _ = adapted(KINDS["grouped-query"], f"lora.dtype={dtype}", dtype=torch.bfloat16)
        assert {str(parameter.dtype) for parameter in trained(model).values()} == {f"torch.{dtype}"}
        assert model(_TOKENS).dtype == torch.bfloat16
