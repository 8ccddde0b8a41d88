"""Frozen weights in few bits in a model: what is stored, how near its logits are, what has gradients, what is told."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import titanmoe.converters.frozen
from tests.models.kinds import KINDS, WIDE
from titanmoe import convert, load_config
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.models.build import build_model, init_adapters, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.frozen_native import EmulatedFrozenKernels
from titanmoe.ops.frozen_storage import Stored

CASES = {
    "float8": ("quantize.frozen.float8", [], 25.0, 8.5),
    "float8-block": ("quantize.frozen.float8", ["--quantize.frozen.float8.recipe_name=block"], 25.0, 8.01),
    "float8-emulated": ("quantize.frozen.float8", ["--quantize.frozen.float8.backend=emulated"], 20.0, 8.5),
    "mx": ("quantize.frozen.mx", [], 25.0, 8.25),
    "nf4": ("quantize.frozen.nf4", ["--quantize.frozen.nf4.block_size=32"], 15.0, 4.27),
}
each_case = pytest.mark.parametrize("case", CASES)
_MORE = ("float8-block", "float8-emulated", "mx", "nf4")
TOKENS = torch.arange(48).view(2, 24)


@functools.cache
def _plain() -> Decoder:
    model = materialize(build_model(WIDE), "cpu")
    init_weights(model, seed=1)
    return model


def _settings(case: str) -> tuple[str, JobConfig]:
    name, flags, *_ = CASES[case]
    return name, load_config(None, [f"--model.converters={name}", *flags])


def _frozen(case: str, model: Decoder | None = None) -> Decoder:
    model = copy.deepcopy(_plain()) if model is None else model
    name, config = _settings(case)
    convert(model, [name], config)
    return model


def _db(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.detach(), other.detach()
    return 20 * math.log10(exact.norm() / (exact - other).norm())


@each_case
def test_logits_are_near(case: str) -> None:
    with torch.no_grad():
        assert _db(_plain()(TOKENS), _frozen(case)(TOKENS)) > CASES[case][2]


@each_case
def test_bytes(case: str) -> None:
    """The weights take what the format says, and are there in no other form."""
    model = _frozen(case)
    stored = [weight for module in model.modules() for weight in getattr(module, "stored", {}).values()]
    parts = [parameter for parameter in model.parameters() if parameter.dtype == torch.uint8]
    num_values = sum(weight.numel for weight in stored)
    assert num_values == sum(
        parameter.numel()
        for module in _plain().modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, (Linear, Experts)) and not name.endswith("bias")
    )
    num_bytes = sum(part.numel() for part in parts)
    assert num_bytes == sum(weight.num_bytes for weight in stored)
    assert 8 * num_bytes / num_values <= CASES[case][3] * 1.001
    assert not any(part.requires_grad for part in parts)


def _live_bytes() -> int:
    """Of all tensors that there are. What a compiler traced with, in a test before, has no memory to ask for."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu"]
    storages = [each.untyped_storage() for each in tensors if not torch._is_functional_tensor(each)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@each_case
def test_memory_of_parameters(case: str) -> None:
    """No tensor stays that is not bits of weights, adapters, or what is not quantised, also after a step."""
    name, config = _settings(case)
    plain = {name: parameter.numel() for name, parameter in _plain().named_parameters()}
    before = _live_bytes()
    model = build_model(WIDE)
    convert(model, [name, "lora"], config)
    init_weights(materialize(model, "cpu"), seed=1)
    model(TOKENS).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None
    quantised = [weight for module in model.modules() for weight in getattr(module, "stored", {}).values()]
    num_values = sum(weight.numel for weight in quantised)
    num_adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    expected = num_values * CASES[case][3] / 8 + 4 * (num_adapters + sum(plain.values()) - num_values)
    assert 0.95 * expected < _live_bytes() - before < 1.05 * expected


def test_names_and_types() -> None:
    state = _frozen("nf4").state_dict()
    assert all(type(tensor) is Tensor for tensor in state.values())
    at = "layers.1.moe.experts."
    assert [name.removeprefix(at) for name in state if name.startswith(at)] == [
        *("gate_up_payload", "gate_up_scale", "gate_up_scale_group"),
        *("down_payload", "down_scale", "down_scale_group"),
    ]
    assert [name for name in state if name.startswith("layers.2.attention.q_proj.")] == [
        f"layers.2.attention.q_proj.{name}" for name in ("bias", "weight_payload", "weight_scale", "weight_scale_group")
    ]


@each_case
def test_values_are_those_of_the_weights(case: str) -> None:
    model, plain = _frozen(case), dict(_plain().named_modules())
    for path, module in model.named_modules():
        for name, stored in getattr(module, "stored", {}).items():
            weight = getattr(plain[path], name)
            values = stored.read(module).dequantize(torch.float32)
            assert _db(weight, values.view(weight.shape)) > (19 if case == "nf4" else 30)


@each_case
def test_gradients_pass_through(case: str) -> None:
    """Those of the embedding are as near as the logits; the weights have none."""
    model, plain = _frozen(case), copy.deepcopy(_plain())
    for each in (model, plain):
        each(TOKENS).square().mean().backward()
    assert model.tok_embeddings is not None and plain.tok_embeddings is not None
    assert model.tok_embeddings.weight.grad is not None and plain.tok_embeddings.weight.grad is not None
    assert _db(plain.tok_embeddings.weight.grad, model.tok_embeddings.weight.grad) > CASES[case][2] - 6
    assert all(parameter.grad is None for parameter in model.parameters() if parameter.dtype == torch.uint8)


@each_case
def test_random_weights_are_quantised(case: str) -> None:
    """A model that is converted first and gets its values then is the same."""
    model = materialize(_frozen(case, build_model(WIDE)), "cpu")
    init_weights(model, seed=1)
    expected = _frozen(case).state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])] == []


def test_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a module's parts are made, the weights of those before are gone."""
    model, seen = copy.deepcopy(_plain()), []
    weights = {path: weakref.ref(module.weight) for path, module in model.named_modules() if isinstance(module, Linear)}
    add_to = Stored.add_to

    def count(self: Stored, module: Linear, device: torch.device) -> None:
        seen.append(sum(weight() is not None for weight in weights.values()))
        add_to(self, module, device)

    monkeypatch.setattr(Stored, "add_to", count)
    _frozen("float8", model)
    assert seen == sorted(seen, reverse=True) and seen[0] == len(weights) and seen[-1] <= 1


@each_case
def test_adapters_on_top(case: str) -> None:
    """At first they add nothing; then they alone have gradients."""
    model = _frozen(case)
    before = model(TOKENS)
    conversion = convert(model, ["lora"], load_config(None, ["--lora.rank=8"]))
    assert "29 of 29" in conversion.summary[0]
    after = model(TOKENS)
    assert torch.equal(before, after)
    after.square().mean().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("case", ["float8", *(pytest.param(it, marks=pytest.mark.slow) for it in _MORE)])
def test_a_layer_compiles_as_a_whole_below_adapters(case: str) -> None:
    """The first, whose input needs no gradient."""
    grads = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model = materialize(build_model(replace(WIDE, layers=WIDE.layers[1:2])), "cpu")
        init_weights(model, seed=1)
        _frozen(case, model)
        convert(model, ["lora"], load_config(None, ["--lora.rank=8"]))
        init_adapters(model, seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.fill_(0.02)
        if is_compiled:
            for block in model.blocks():
                block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
        model(TOKENS).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    for name, expected in grads[0].items():
        assert (grads[1][name] - expected).norm() < (0.05 if "emulated" in case else 1e-4) * expected.norm(), name


def test_what_is_told() -> None:
    model = copy.deepcopy(_plain())
    name, config = _settings("nf4")
    conversion = convert(model, [name, "lora"], config)
    assert conversion.summary[0] == (
        "quantize.frozen.nf4: 29 of 29 linear layers and groups of experts become frozen NF4 (a scale per 32 values, "
        "quantised in turn): 620,544 values of 4.26 bits"
    )
    assert sum(line.endswith("  frozen NF4 + LoRA  dequantised in pieces") for line in conversion.table()) == 15
    again = convert(_frozen("nf4"), ["lora"], config).table()
    assert any("nf4-32-128 32 x 64" in line and "converted + LoRA" in line for line in again)


def test_what_multiplies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of product has its own kernels, tried once; sizes that they cannot have are dequantised."""
    tried, kernels = [], EmulatedFrozenKernels(has_blocks=False)
    kernels.feature_multiple = 64

    def choose(kind: str, *args: object) -> tuple[EmulatedFrozenKernels | None, str]:
        tried.append(kind)
        return (kernels, "") if kind == "linear" else (None, '"scaled_grouped_mm" takes 2 ms where ... takes 1 ms')

    monkeypatch.setattr(titanmoe.converters.frozen, "choose_kernels", choose)
    model = copy.deepcopy(_plain())
    conversion = convert(model, ["quantize.frozen.float8"], load_config(None, []))
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    num_native = sum(module.product.kernels is kernels for module in linears)
    assert 0 < num_native < len(linears)
    assert all(
        (module.product.kernels is None) == bool(module.in_features % 64 or module.out_features % 64)
        for module in linears
    )
    assert conversion.summary[0].endswith(
        f"; {num_native} of {len(linears)} linear layers multiplied as they are stored, by emulated; "
        'groups of experts dequantised, as "scaled_grouped_mm" takes 2 ms where ... takes 1 ms'
    )
    backends = {line.rpartition("  ")[2] for line in conversion.table() if "frozen FP8" in line}
    assert backends == {"emulated", "dequantised in pieces"}
    assert tried == ["linear", "grouped_mm"]


def test_native_kernels_are_refused_without_their_hardware() -> None:
    model = copy.deepcopy(_plain())
    with pytest.raises(ConfigError, match="this is a cpu device") as error:
        convert(model, ["quantize.frozen.float8"], load_config(None, ["--quantize.frozen.float8.backend=native"]))
    assert error.value.where == "quantize.frozen.float8.backend"
    assert list(model.state_dict()) == list(_plain().state_dict())


@pytest.mark.parametrize(
    ("converters", "flags", "words"),
    [
        (["quantize.frozen.mx"], ["--quantize.frozen.mx.fqns=layers.9"], "matches none"),
        (["quantize.frozen.mx"], ["--quantize.frozen.mx.filter_fqns=expert"], "matches none"),
        (["quantize.frozen.nf4"], ["--quantize.frozen.nf4.block_size=48"], "not a power of two"),
        (["quantize.frozen.nf4", "quantize.frozen.mx"], [], "a second time"),
        (["quantize.linear.float8", "quantize.frozen.mx"], ["--quantize.linear.float8.emulate"], "a second time"),
        (["lora", "quantize.frozen.mx"], [], 'Name "lora" last'),
        (["quantize.frozen.nf4"], ["--quantize.strict"], "not a multiple of 64"),
    ],
)
def test_mistakes_are_refused(converters: list[str], flags: list[str], words: str) -> None:
    model = copy.deepcopy(_plain())
    with pytest.raises(ConfigError, match=words):
        convert(model, converters, load_config(None, flags))
    assert list(model.state_dict()) == list(_plain().state_dict())


def test_modules_are_chosen_by_segments() -> None:
    model = copy.deepcopy(_plain())
    flags = ["--quantize.frozen.float8.fqns=experts,attention", "--quantize.frozen.float8.filter_fqns=layers.1"]
    convert(model, ["quantize.frozen.float8"], load_config(None, flags))
    changed = {path for path, module in model.named_modules() if getattr(module, "stored", {})}
    assert changed == {
        *(f"layers.0.attention.{name}_proj" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *(f"layers.{layer}.attention.{name}_proj" for layer in (2, 3) for name in "qkvo"),
        *(f"layers.{layer}.moe.experts" for layer in (2, 3)),
    }


def test_what_does_not_fit_stays() -> None:
    """Inputs of 40 and 56 are no multiples of 32, and 24 is none of 64; a scale per output fits any."""
    model = build_model(KINDS["grouped-query"])
    with pytest.raises(ConfigError, match="40 inputs: not a multiple of 32"):
        convert(model, ["quantize.frozen.mx"], load_config(None, []))
    convert(model, ["quantize.frozen.float8"], load_config(None, []))


def test_values_that_are_not_finite_are_refused() -> None:
    model = copy.deepcopy(_plain())
    with torch.no_grad():
        model.get_submodule("layers.1.moe.experts").down[2, 3, 4] = math.nan
    with pytest.raises(ConfigError, match="not finite"):
        _frozen("mx", model)
