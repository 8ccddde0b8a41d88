"""Converters on models of every family: what is changed, what is told, what is refused, and what stays as it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

import titanmoe
from tests.models.kinds import WIDE
from tests.train.jobs import TINY, write_job
from titanmoe.checkpoint.pretrained import save_pretrained, spec_of_hf_folder
from titanmoe.config import ConfigError, JobConfig, load_config
from titanmoe.converters.apply import Conversion, convert
from titanmoe.converters.converter import CONVERTERS, Converter, converter
from titanmoe.models.build import build_model, init_weights
from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.ops.scaled_product import LowPrecisionProduct, ScaledGroupedProduct, ScaledLinearProduct

FP8 = ["quantize.linear.float8", "quantize.grouped_mm.float8"]
MX = ["quantize.linear.mx", "quantize.grouped_mm.mx"]


def config_of(names: Sequence[str], *args: str) -> JobConfig:
    emulate = [f"--{name}.emulate" for name in names if name.startswith("quantize.")]
    return load_config(None, [f"--model.converters={','.join(names)}", *emulate, *args])


def change(model: Decoder, names: Sequence[str], *args: str) -> Conversion:
    return convert(model, names, config_of(names, *args))


def flavor(family: str, name: str) -> DecoderSpec:
    return get_family(family).flavor(name)


def changed(model: nn.Module) -> set[str]:
    """Paths of the modules that have another product."""
    found = set()
    for path, module in model.named_modules():
        products = [getattr(module, name, None) for name in ("product", "gate_up_product", "down_product")]
        if any(isinstance(product, LowPrecisionProduct) for product in products):
            found.add(path)
    return found


def told(conversion: Conversion) -> set[str]:
    return {row.path for row in conversion.rows if row.now}


# What is changed


@pytest.mark.parametrize("names", [FP8, MX], ids=["FP8", "MXFP8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_and_all_experts_of_every_family(family: str, names: list[str]) -> None:
    name = next(flavor for flavor in get_family(family).flavors if flavor.startswith("debug") and "dense" not in flavor)
    model = build_model(flavor(family, name))
    multiple = 32 if names == MX else 16
    linear = {path for path, module in model.named_modules() if type(module) is Linear}
    fitting = {path for path in linear if not any(size % multiple for size in model.get_submodule(path).weight.shape)}
    assert len(fitting) >= 0.8 * len(linear)  # MXFP8 leaves 80 rows of a latent out in one family
    experts = {path for path, module in model.named_modules() if isinstance(module, Experts)}
    names = [name for name in names if experts or "linear" in name]
    conversion = change(model, names)
    assert changed(model) == told(conversion) == fitting | experts
    others = {row.path.rpartition(".")[2]: row.why for row in conversion.rows if row.path not in fitting | experts}
    assert others.pop("kv_a_proj", "80 x 256: not all multiples of 32").endswith("not all multiples of 32")
    assert (
        others.items()
        <= {
            "output": "computed by the loss",
            "gate": "always in float32",
        }.items()
    )
    assert [row.path for row in conversion.rows] == [
        path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Experts))
    ]
    numbers = [(len(fitting), len(linear)), (len(experts), len(experts))]
    assert len(conversion.summary) == len(names)
    for line, (number, of) in zip(conversion.summary, numbers, strict=False):
        assert f": {number} of {of} " in line and ", backend emulated" in line
        assert ("stay (80 x 256: not all multiples of 32)" in line) == (number < of)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    fresh = build_model(flavor(family, name))
    assert (
        parameters.keys() == dict(fresh.named_parameters()).keys()
        and buffers.keys() == dict(fresh.named_buffers()).keys()
    )
    assert all(type(parameter) is nn.Parameter for parameter in parameters.values())


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "671B"), ("llama4", "17bx128e"), ("gpt_oss", "120b")])
def test_the_table_of_a_large_model_fits_a_screen(family: str, name: str) -> None:
    conversion = change(build_model(flavor(family, name), dtype=torch.bfloat16), MX)
    lines = conversion.table()
    assert len(lines) < 30
    assert max(len(line) for line in lines) <= 120
    assert str(conversion).splitlines() == [*conversion.summary, *lines]


@pytest.mark.parametrize("names", [FP8, MX], ids=["FP8", "MXFP8"])
def test_biases_stay(names: list[str]) -> None:
    """They are added as they are, and learn as they did."""
    torch.manual_seed(0)
    plain, model = (build_model(WIDE, device="cpu") for _ in range(2))
    change(model, names)
    for one in (plain, model):
        init_weights(one, seed=0)
        for name, parameter in one.named_parameters():
            if name.endswith("bias"):
                parameter.data.fill_(0.3)  # twice the size of the products, and less than the activation's limit
    assert plain.state_dict().keys() == model.state_dict().keys()
    weights_R = torch.ones(40)
    offsets = torch.tensor([3, 3, 20, 30, 38, 40], dtype=torch.int32)
    for layer in ("attention.q_proj", "attention.o_proj", "moe.experts"):
        outputs, grads = [], []
        x = torch.randn(40, getattr(plain.get_submodule(f"layers.2.{layer}"), "in_features", WIDE.dim))
        for one in (plain, model):
            module = one.get_submodule(f"layers.2.{layer}")
            y = module(x, weights_R, offsets)[0] if layer.endswith("experts") else module(x)
            outputs.append(y)
            y.sum().backward()
            grads.append({name: value.grad for name, value in module.named_parameters() if name.endswith("bias")})
        assert (outputs[1] - outputs[0]).norm() < 0.05 * outputs[0].norm()
        assert not torch.equal(outputs[1], outputs[0])
        assert grads[0] and all((grads[1][name] - grad).norm() < 0.1 * grad.norm() for name, grad in grads[0].items())


UP, DOWN = Scaling("block"), Scaling("block", "down")


@pytest.mark.parametrize(
    ("name", "recipe", "scaling", "rounds_weight_gradient", "line"),
    [
        (FP8[0], "none", Scaling("tensor"), True, "FP8 (a scale per tensor)"),
        (FP8[0], "tensorwise", Scaling("tensor"), True, "FP8 (a scale per tensor)"),
        (FP8[0], "rowwise", Scaling("row"), True, "FP8 (a scale per row)"),
        (FP8[0], "rowwise_with_gw_hp", Scaling("row"), False, "FP8 (a scale per row, gradients of weights unrounded)"),
        (FP8[1], "rowwise", Scaling("row"), True, "FP8 (a scale per row)"),
        (FP8[1], "rowwise_with_gw_hp", Scaling("row"), False, "FP8 (a scale per row, gradients of weights unrounded)"),
        (MX[0], "mxfp8_cublas", DOWN, True, "MXFP8 (a scale per 32 values rounded down)"),
        (MX[0], "mxfp8_cublas_rceil", UP, True, "MXFP8 (a scale per 32 values)"),
        (
            MX[0],
            "mxfp8_rceil_wgrad_with_hp",
            UP,
            False,
            "MXFP8 (a scale per 32 values, gradients of weights unrounded)",
        ),
        (MX[1], "mxfp8", UP, True, "MXFP8 (a scale per 32 values)"),
        (MX[1], "mxfp8_wgrad_with_hp", UP, False, "MXFP8 (a scale per 32 values, gradients of weights unrounded)"),
    ],
)
def test_recipes(name: str, recipe: str, scaling: Scaling, rounds_weight_gradient: bool, line: str) -> None:
    """Both products of experts have the one that was asked for."""
    model = build_model(WIDE)
    conversion = change(model, [name], f"--{name}.recipe_name={recipe}")
    assert f" in {line}, backend emulated" in conversion.summary[0]
    for path in changed(model):
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            products = [module.gate_up_product, module.down_product]
            assert all(isinstance(product, ScaledGroupedProduct) for product in products)
        else:
            products = [module.product]
            assert isinstance(module.product, ScaledLinearProduct)
        for product in products:
            assert product.kernels.scaling == scaling
            assert product.rounds_weight_gradient is rounds_weight_gradient


def test_filters() -> None:
    """A list of a linear converter names what stays, one of experts what is changed."""
    model = build_model(WIDE)
    conversion = change(
        model,
        FP8,
        f"--{FP8[0]}.filter_fqns=output,router.gate,shared_experts,layers.[0-1].attention",
        f"--{FP8[1]}.fqns=layers.[1-2].moe.experts",
    )
    assert (
        changed(model)
        == told(conversion)
        == {
            *(f"layers.0.feed_forward.{name}_proj" for name in ("gate", "up", "down")),
            *(f"layers.{layer}.attention.{name}_proj" for layer in (2, 3) for name in "qkvo"),
            "layers.1.moe.experts",
            "layers.2.moe.experts",
        }
    )
    why = {row.path: row.why for row in conversion.rows}
    assert why["layers.1.attention.q_proj"] == '"layers.[0-1].attention" is in filter_fqns'
    assert why["layers.1.moe.shared_experts.up_proj"] == '"shared_experts" is in filter_fqns'
    assert why["layers.3.moe.experts"] == "not in fqns"
    assert why["layers.1.moe.experts"] == ""
    assert conversion.summary[1].startswith("quantize.grouped_mm.float8: 2 of 3 modules of experts in FP8")


def test_two_converters_may_share_the_linear_layers() -> None:
    model = build_model(WIDE)
    names = ["quantize.linear.float8", "quantize.linear.mx"]
    conversion = change(
        model, names, f"--{names[0]}.filter_fqns=attention", f"--{names[1]}.filter_fqns=*feed_forward,*experts"
    )
    now = {row.path: row.now for row in conversion.rows}
    assert now["layers.0.feed_forward.up_proj"] == now["layers.3.moe.shared_experts.up_proj"] == "FP8"
    assert now["layers.0.attention.o_proj"] == now["layers.3.attention.q_proj"] == "MXFP8"


@pytest.mark.parametrize(
    ("family", "name", "recipe", "small"),
    [
        # Attention 4096 x 4096 and 1024 x 4096, feed-forward 14336 x 4096.
        ("llama3", "8B", "tensorwise", "k_proj v_proj"),
        ("llama3", "8B", "rowwise", "k_proj v_proj"),
        # 2048 x 2048, 512 x 2048, 8192 x 2048
        ("llama3", "1B", "tensorwise", "k_proj v_proj"),
        ("llama3", "1B", "rowwise", "down_proj k_proj o_proj q_proj v_proj"),
    ],
)
def test_the_automatic_filter(family: str, name: str, recipe: str, small: str) -> None:
    model = build_model(flavor(family, name))
    change(model, FP8[:1], f"--{FP8[0]}.filter_fqns=auto_filter_small_kn", f"--{FP8[0]}.recipe_name={recipe}")
    stay = {path for path, module in model.named_modules() if type(module) is Linear} - changed(model)
    assert " ".join(sorted({path.rpartition(".")[2] for path in stay})) == small


def test_a_part_of_a_model_is_changed_and_the_whole_is_told() -> None:
    """Settings may name what another stage has; each stage changes its own."""
    settings = [f"--{FP8[0]}.filter_fqns=output,layers.3", f"--{FP8[1]}.fqns=layers.2.moe.experts"]
    whole = build_model(WIDE)
    expected = change(whole, FP8, *settings)
    parts = (Part((0, 1), projects=False), Part((2, 3), embeds=False))
    found = set()
    for part in parts:
        model = build_model(WIDE, part=part)
        conversion = change(model, FP8, *settings)
        assert conversion == expected
        found |= changed(model)
    assert found == changed(whole)


# What is refused


def misfits() -> DecoderSpec:
    """The experts of layer 1 have 40 hidden units, no multiple of 16."""
    layer = WIDE.layers[1]
    odd = replace(layer, feed_forward=replace(layer.feed_forward, hidden_dim=40))
    return replace(WIDE, layers=(WIDE.layers[0], odd, *WIDE.layers[2:]))


def test_sizes_that_do_not_fit_are_told_and_under_strict_refused() -> None:
    model = build_model(misfits())
    conversion = change(model, FP8[1:])
    assert changed(model) == {"layers.2.moe.experts", "layers.3.moe.experts"}
    assert conversion.summary == (
        "quantize.grouped_mm.float8: 2 of 3 modules of experts in FP8 (a scale per row), backend emulated; "
        "1 stay (64 x 40: not all multiples of 16)",
    )
    row = next(row for row in conversion.rows if row.path == "layers.1.moe.experts")
    assert (row.now, row.backend, row.why) == ("", "", "64 x 40: not all multiples of 16")
    model = build_model(misfits())
    with pytest.raises(ConfigError, match=r"change 2 of the 3 modules of experts: 1 stay \(64 x 40: not all") as error:
        change(model, FP8[1:], "--quantize.strict")
    assert error.value.where == "quantize.strict"
    assert not changed(model)
    change(model, FP8[1:], "--quantize.strict", f"--{FP8[1]}.fqns=layers.2,layers.3")  # what is not wanted may not fit


DENSE = ("qwen3", "debug_dense")
TIED = ("qwen3", "0.6B")
MOE = ("qwen3", "debug_moe")


@pytest.mark.parametrize(
    ("model", "names", "args", "message"),
    [
        pytest.param(MOE, ["quantize.linear.mxx"], (), "Did you mean quantize.linear.mx?", id="unknown name"),
        pytest.param(MOE, [MX[0], MX[0]], (), '"quantize.linear.mx" is there 2 times', id="a name twice"),
        pytest.param(
            MOE,
            FP8[:1],
            (f"--{FP8[0]}.filter_fqns=output,shared_experts",),
            'quantize.linear.float8.filter_fqns: "shared_experts" matches none of the',
            id="filter without a match",
        ),
        pytest.param(
            MOE, FP8[:1], (f"--{FP8[0]}.filter_fqns=outputs",), 'Did you mean "output"?', id="filter nearly right"
        ),
        pytest.param(
            MOE, MX[:1], (f"--{MX[0]}.filter_fqns=auto_filter_small_kn",), "matches none of the", id="a rule for FP8"
        ),
        pytest.param(
            TIED, FP8[:1], (f"--{FP8[0]}.filter_fqns=output,router.gate",), '"router.gate" matches none', id="no router"
        ),
        pytest.param(
            MOE, MX[1:], (f"--{MX[1]}.fqns=experts,shared_experts",), "none of the 4 modules of experts", id="fqns"
        ),
        pytest.param(MOE, MX[1:], (f"--{MX[1]}.fqns=",), "fqns: the list is empty", id="empty fqns"),
        pytest.param(DENSE, MX[1:], (), "is for modules of experts, and this model has none", id="dense"),
        pytest.param(
            MOE,
            MX[:1],
            (f"--{MX[0]}.filter_fqns=layers",),
            'change none of the 16 linear layers: 16 stay ("layers" is in filter_fqns)',
            id="all filtered out",
        ),
        pytest.param(
            MOE,
            FP8[:1],
            (f"--{FP8[0]}.filter_fqns=auto_filter_small_kn",),
            "16 stay (too small to gain (auto_filter_small_kn))",
            id="all too small",
        ),
        pytest.param(
            MOE,
            ["quantize.linear.float8", "quantize.linear.mx"],
            (),
            "quantize.linear.mx would convert layers.0.attention.q_proj a second time: it is FP8 already",
            id="twice",
        ),
        pytest.param(
            MOE,
            FP8[:1],
            (f"--{FP8[0]}.backend=scaled_mm",),
            'quantize.linear.float8.emulate: is on, but quantize.linear.float8.backend = "scaled_mm"',
            id="emulate and a backend",
        ),
        pytest.param(
            MOE,
            FP8[:1],
            (f"--{FP8[0]}.enable_fsdp_float8_all_gather",),
            "enable_fsdp_float8_all_gather: gathering shards in FP8 is not supported yet",
            id="gathering",
        ),
    ],
)
def test_mistakes(model: tuple[str, str], names: list[str], args: tuple[str, ...], message: str) -> None:
    """A model is then as it was, also where the mistake is in the last converter."""
    built = build_model(flavor(*model))
    config = load_config(None, [*(f"--{name}.emulate" for name in {*names} & {*FP8, *MX}), *args])
    with pytest.raises(ConfigError) as error:
        convert(built, names, config)
    assert message in str(error.value)
    assert error.value.where and error.value.mend
    assert not changed(built)


@pytest.mark.parametrize("name", [*FP8, *MX])
def test_without_the_hardware_and_without_emulation(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(build_model(WIDE, device="cpu"), [name], load_config(None))
    assert f"Set {name}.emulate = true" in error.value.mend


def test_a_tied_output_may_be_on_the_list() -> None:
    """It is by default; the embedding is no linear layer."""
    model = build_model(flavor(*TIED))
    change(model, MX[:1])
    assert len(changed(model)) == 28 * 7


def test_a_second_call_does_not_convert_again() -> None:
    model = build_model(WIDE)
    change(model, FP8[1:])
    with pytest.raises(ConfigError, match=r"layers.1.moe.experts a second time"):
        change(model, MX[1:])
    now = {row.path: row.now for row in change(model, MX[:1]).rows}
    assert now["layers.1.moe.experts"] == "converted" and now["layers.1.attention.q_proj"] == "MXFP8"
    with pytest.raises(ConfigError, match=r"layers.0.attention.q_a_proj a second time"):
        change(model, FP8[:1])


# A model with weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Hugging Face layout."""
    path = tmp_path_factory.mktemp("model")
    write_job(path, {**TINY, "moe_intermediate_size": 32})
    model = build_model(spec_of_hf_folder(path / "model")[1], device="cpu", dtype=torch.bfloat16)
    init_weights(model, seed=3)
    save_pretrained(model, path / "hf")
    return path / "hf"


@pytest.mark.parametrize("names", [FP8, MX], ids=["FP8", "MXFP8"])
def test_a_loaded_model_keeps_its_state(folder: Path, names: list[str], tmp_path: Path) -> None:
    """It computes something near to what it did, gives every parameter a gradient, and saves the same bytes."""
    plain, model = titanmoe.from_pretrained(folder), titanmoe.from_pretrained(folder)
    before = {name: (id(tensor), type(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    titanmoe.convert(model, names, config_of(names))
    after = model.state_dict(keep_vars=True)
    assert {name: (id(tensor), type(tensor)) for name, tensor in after.items()} == before
    for name, tensor in plain.state_dict().items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)

    tokens = torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, wanted = model(tokens).float(), plain(tokens).float()
    assert logits.dtype == wanted.dtype and logits.isfinite().all()
    error = float((logits - wanted).norm() / wanted.norm())
    assert 0 < error < 0.1
    titanmoe.causal_lm_loss(model, tokens, tokens).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()]

    model.load_state_dict(plain.state_dict())
    titanmoe.save_pretrained(model, tmp_path / "converted")
    titanmoe.save_pretrained(plain, tmp_path / "plain")
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()} == files


# A user's own converter


@dataclass(frozen=True)
class Doubling(Converter):
    modules = "linear layers"

    def may_change(self, module: nn.Module) -> bool:
        return isinstance(module, Linear)

    def unwanted(self, path: str, module: nn.Module) -> str:
        return "" if path.endswith("o_proj") else "only o_proj is doubled"


@register_quantize_module_handler(Doubling)
def _double(module: Linear, config: Doubling) -> Linear:
    multiply = module.product
    module.product = lambda x, weight, bias=None: 2 * multiply(x, weight, bias)
    return module


def test_a_converter_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVERTERS, "test.double", Doubling)
    monkeypatch.setattr(Doubling, "name", "test.double", raising=False)
    model = build_model(WIDE, device="cpu")
    init_weights(model, seed=0)
    tokens = torch.arange(12)[None]
    attention = model.layers["1"].attention
    before = attention.o_proj(torch.ones(1, 12, attention.o_proj.in_features))
    conversion = convert(model, ["test.double"], load_config(None))
    assert torch.equal(attention.o_proj(torch.ones(1, 12, attention.o_proj.in_features)), 2 * before)
    assert conversion.summary == ("test.double: 4 of 26 linear layers",)
    rows = {row.path: row for row in conversion.rows}
    assert rows["layers.1.attention.o_proj"].now == "test.double"
    assert rows["layers.1.attention.q_proj"].why == "only o_proj is doubled"
    assert model(tokens).isfinite().all()


def test_a_name_is_given_once() -> None:
    before = dict(CONVERTERS)

    class Other(Converter):
        def may_change(self, module: nn.Module) -> bool:
            return False

    with pytest.raises(ConfigError, match=r'there is a converter "quantize.linear.mx" already, MXLinear of titanmoe'):
        converter("quantize.linear.mx")(Other)
    assert before == CONVERTERS
    same = CONVERTERS["quantize.linear.mx"]
    assert converter("quantize.linear.mx")(same) is same  # as when a notebook's cell runs again


def test_modules_inside_of_changed_ones_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Everything(Converter):
        name = "test.everything"

        def may_change(self, module: nn.Module) -> bool:
            return True

    monkeypatch.setitem(CONVERTERS, "test.everything", Everything)
    with pytest.raises(AssertionError, match="what is in them"):
        convert(build_model(WIDE), ["test.everything"], load_config(None))


def test_plain_products_are_what_models_begin_with() -> None:
    """Or `changed` above would find nothing in any case."""
    model = build_model(WIDE)
    assert isinstance(model.get_submodule("layers.1.moe.experts").down_product, PlainGroupedProduct)
    assert not changed(model)
    assert re.search("emulated", str(change(model, MX)))
