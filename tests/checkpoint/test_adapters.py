"""Adapters out of a model and into one; PEFT itself is what they are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import titanmoe
from tests.checkpoint.adapted import adapted, logits, peft_loads, peft_makes, randomise
from tests.checkpoint.hf_models import MOE_SIZES, load_reference, read_all, save_reference, some_tokens
from tests.parity.reference import random_model
from tests.parity.variants import VARIANTS
from tests.ranks import run_ranks
from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.adapter_figures import Figures, table
from titanmoe.checkpoint.adapters import adapter_tensors, load_adapter, save_adapter
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.model_source import find_model
from titanmoe.checkpoint.pretrained import spec_of_hf_folder
from titanmoe.config.errors import ConfigError
from titanmoe.config.resolve import load_config, resolve
from titanmoe.config.sizes import Degrees
from titanmoe.converters.apply import convert
from titanmoe.models.build import build_model, init_adapters, materialize
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.training.errors import NotExportedError

_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MOE, _DENSE = ("qwen3", "moe"), ("qwen3", "dense")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of random models, by family and variant."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(family: str, variant: str) -> Path:
        folder = made.setdefault((family, variant), root / f"{family}-{variant}")
        if not folder.exists():
            save_reference(folder, variant, family=family)
        return folder

    return base


# Out


@pytest.mark.parametrize(
    ("kind", "options", "layout"),
    [
        (_MOE, ["rank=8"], "peft"),
        (_MOE, ["rank=8", "expert_rank=3", "use_rslora"], "peft"),
        (_MOE, ["rank=8", "target_modules=q_proj,experts"], "peft"),
        (_MOE, ["rank=8", "target_modules=layers.1.moe.experts,layers.0.attention.o_proj"], "peft"),
        (_MOE, ["rank=8", "target_modules=experts.down_proj"], "peft"),
        (_MOE, ["rank=8", "target_modules=layers.0.moe.experts.gate_up_proj,layers.1.moe.experts.down_proj"], "peft"),
        (("qwen3", "moe_with_dense_layers_and_bias"), ["rank=8"], "peft"),
        (_MOE, ["rank=8", "expert_rank=4"], "peft-per-expert"),
        (_MOE, ["rank=8", "expert_rank=4", "use_rslora"], "peft-per-expert"),
        (_DENSE, ["rank=8", "alpha=5"], "peft"),
        (_DENSE, ["rank=8", "use_dora"], "peft"),
        (("llama3", "llama3_rope"), ["rank=4"], "peft"),
        (("mixtral", "plain"), ["rank=4"], "peft"),
        (("mixtral", "plain"), ["rank=4"], "peft-per-expert"),
        (("gpt_oss", "like_the_release"), ["rank=4"], "peft"),
        (("llama4", "like_scout"), ["rank=4"], "peft"),
        (("deepseek_v3", "v3"), ["rank=8"], "peft"),
        (("glm4_moe", "plain"), ["rank=4"], "peft"),
        (("glm4_moe_lite", "plain"), ["rank=4"], "peft"),
    ],
    ids=str,
)
def test_peft_loads_what_is_written(
    kind: tuple[str, str], options: list[str], layout: str, bases: Any, tmp_path: Path
) -> None:
    model, family, settings = adapted(bases(*kind), *options)
    randomise(model)
    summary = save_adapter(model, tmp_path / "adapter", family, settings, layout=layout)
    assert summary.num_tensors == len(read_all(tmp_path / "adapter"))
    theirs = load_reference(bases(*kind))
    tokens = _tokens(*kind)
    found, without = logits(model, tokens), logits(theirs, tokens)
    expected = logits(peft_loads(theirs, tmp_path / "adapter"), tokens)
    assert (found - expected).abs().max() < 1e-4
    assert (found - without).abs().max() > 0.1
    # And here. Where rsLoRA's scales are multiplied into B, that is rounding.
    again, _, _ = adapted(bases(*kind), *options)
    load_adapter(again, tmp_path / "adapter", family, settings)
    assert (logits(again, tokens) - found).abs().max() <= (1e-5 if layout != "peft" else 0)


def test_public_calls(bases: Any, tmp_path: Path) -> None:
    """As docs/adapters.md has it: an adapter out and in, and merged; what is not asked for is refused by name."""
    config = load_config(None, ["--model.converters=lora", "--lora.rank=8", "--lora.alpha=12"])
    model, again = (titanmoe.from_pretrained(bases(*_MOE), dtype=torch.float32) for _ in range(2))
    tokens = _tokens(*_MOE)
    with pytest.raises(ConfigError, match="there are no adapters to merge"):
        titanmoe.save_pretrained(model, tmp_path / "merged", merge=config)
    for each in (model, again):
        titanmoe.convert(each, ["lora"], config)
    randomise(model)
    expected = logits(model, tokens)
    with pytest.raises(ConfigError, match="has adapters beside its weights"):
        titanmoe.save_pretrained(model, tmp_path / "merged")
    assert not any(tmp_path.iterdir())
    titanmoe.save_adapter(model, tmp_path / "adapter", config, base="some/base")
    titanmoe.load_adapter(again, tmp_path / "adapter", config)
    assert torch.equal(logits(again, tokens), expected)
    theirs = peft_loads(load_reference(bases(*_MOE)), tmp_path / "adapter")
    assert (logits(theirs, tokens) - expected).abs().max() < 1e-4
    titanmoe.save_pretrained(model, tmp_path / "merged", merge=config)
    assert torch.equal(logits(model, tokens), expected)
    merged = logits(load_reference(tmp_path / "merged"), tokens)
    assert (merged - expected).abs().max() < 1e-4


def _tokens(family: str, variant: str) -> torch.Tensor:
    vocab_size = VARIANTS[family][variant][1]["vocab_size"]
    return torch.randint(vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))


def test_names_in_the_files(bases: Any, tmp_path: Path) -> None:
    """As servers look for them."""
    model, family, settings = adapted(bases(*_MOE), "rank=8", "expert_rank=4")
    for layout, keys in (
        ("peft", ("self_attn.q_proj", "mlp.experts.base_layer", "mlp.experts")),
        ("peft-per-expert", ("mlp.experts.3.gate_proj", "mlp.experts.5.up_proj", "mlp.experts.0.down_proj")),
    ):
        save_adapter(model, tmp_path / layout, family, settings, layout=layout, base="some/base")
        found = read_all(tmp_path / layout)
        for key in keys:
            for part in ("A", "B"):
                assert f"base_model.model.model.layers.0.{key}.lora_{part}.weight" in found
        config = json.loads((tmp_path / layout / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "some/base" and (config["r"], config["lora_alpha"]) == (8, 32)
    assert config["target_modules"] == [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]


def test_stacked_experts_are_slowest_in_a_and_fastest_in_b(bases: Any, tmp_path: Path) -> None:
    model, family, settings = adapted(bases(*_MOE), "rank=8", "expert_rank=4")
    randomise(model)
    save_adapter(model, tmp_path / "adapter", family, settings)
    found, ours = read_all(tmp_path / "adapter"), adapter_tensors(model)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    for expert in range(6):
        a, b = found[f"{prefix}.base_layer.lora_A.weight"], found[f"{prefix}.base_layer.lora_B.weight"]
        assert torch.equal(a[4 * expert : 4 * expert + 4], ours["layers.1.moe.experts.gate_up_lora_a"][expert])
        whole = ours["layers.1.moe.experts.gate_up_lora_b"][expert].flatten(0, 1)
        assert torch.equal(b[:, expert::6], whole)


def test_dora_on_experts_has_no_place_in_peft(bases: Any, tmp_path: Path) -> None:
    model, family, settings = adapted(bases(*_MOE), "rank=8", "use_dora")
    with pytest.raises(ConfigError, match=r"no DoRA for stacked experts\n.*--merge.*peft-per-expert"):
        save_adapter(model, tmp_path / "adapter", family, settings)
    assert not list(tmp_path.iterdir())
    randomise(model)
    save_adapter(model, tmp_path / "adapter", family, settings, layout="peft-per-expert")
    again, _, _ = adapted(bases(*_MOE), "rank=8", "use_dora")
    load_adapter(again, tmp_path / "adapter", family, settings)
    assert torch.equal(logits(again, some_tokens()), logits(model, some_tokens()))


def test_no_layout_for_single_experts(bases: Any, tmp_path: Path) -> None:
    model, family, settings = adapted(bases("gpt_oss", "like_the_release"), "rank=4")
    with pytest.raises(ConfigError, match="no names of their own"):
        save_adapter(model, tmp_path / "adapter", family, settings, layout="peft-per-expert")


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_one_weight_of_experts_is_not_for_servers(name: str, bases: Any, tmp_path: Path) -> None:
    """vLLM wants an adapter on gate, up and down of every expert that has one."""
    model, family, settings = adapted(bases(*_MOE), "rank=8", f"target_modules=experts.{name}_proj")
    with pytest.raises(ConfigError, match=rf"experts\.{name}_lora_a: other weights of the same experts"):
        save_adapter(model, tmp_path / "adapter", family, settings, layout="peft-per-expert")


def test_a_changed_value_is_found_before_the_folder_is_there(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titanmoe.checkpoint.safetensors_io import TensorWriter

    write = TensorWriter.write

    def write_wrong(self: TensorWriter, key: str, tensor: torch.Tensor, row: int = 0) -> None:
        write(self, key, tensor * (1.001 if "layers.1.self_attn.v_proj.lora_B" in key else 1), row)

    monkeypatch.setattr(TensorWriter, "write", write_wrong)
    model, family, settings = adapted(bases(*_MOE), "rank=8")
    randomise(model)
    with pytest.raises(NotExportedError, match=r"layers\.1\.attention\.v_proj\.lora_b \[0, 0\]"):
        save_adapter(model, tmp_path / "adapter", family, settings)
    assert not list(tmp_path.iterdir())


# In


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        (_MOE, {"target_parameters": _EXPERTS}, ["expert_rank=8"]),
        (
            _MOE,
            {"target_parameters": _EXPERTS, "rank_pattern": {"gate_up_proj": 4, "down_proj": 4}},
            ["expert_rank=4"],
        ),
        (
            _MOE,
            {"target_parameters": _EXPERTS, "rank_pattern": {"gate_up_proj": 6, "down_proj": 3}, "use_rslora": True},
            ["expert_rank=6", "use_rslora"],
        ),
        (
            _MOE,
            {"target_parameters": _EXPERTS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1.*\.k_proj": 3.0}},
            ["expert_rank=8"],
        ),
        (_MOE, {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}, ["expert_rank=16"]),
        (_MOE, {"target_parameters": ["mlp.experts.down_proj"]}, ["expert_rank=8"]),
        (_MOE, {"target_parameters": ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]}, ["expert_rank=8"]),
        (_DENSE, {"target_modules": "all-linear", "use_dora": True}, ["use_dora"]),
        (_DENSE, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, ["use_rslora"]),
    ],
    ids=str,
)
def test_what_peft_made_is_loaded(
    kind: tuple[str, str], theirs: dict[str, Any], ours: list[str], bases: Any, tmp_path: Path
) -> None:
    options = {"r": 8, "lora_alpha": 20, "target_modules": _ATTENTION, **theirs}
    made = peft_makes(load_reference(bases(*kind)), tmp_path / "theirs", **options)
    if options["target_modules"] != "all-linear":
        names = [f"experts.{name}" if name in ("gate_proj", "up_proj") and kind == _MOE else name
                 for name in options["target_modules"]]  # fmt: skip
        names += [f"layers.{name}".replace("layers.mlp", "moe").replace("mlp", "moe")
                  for name in options.get("target_parameters", [])]  # fmt: skip
        ours = [*ours, f"target_modules={','.join(names)}"]
    model, family, settings = adapted(bases(*kind), "rank=8", "alpha=20", *ours)
    without = logits(model, some_tokens())
    load_adapter(model, tmp_path / "theirs", family, settings)
    expected = logits(made, some_tokens())
    assert (logits(model, some_tokens()) - expected).abs().max() < 1e-4
    assert (without - expected).abs().max() > 0.1
    # And where no config says what the adapter has.
    assert (logits(_found(tmp_path / "theirs"), some_tokens()) - expected).abs().max() < 1e-4


def _found(folder: Path) -> nn.Module:
    source = find_model(folder, torch.float32)
    model = materialize(source.build(), "cpu")
    source.fill(model)
    return model


def test_adapters_of_routers_are_refused(bases: Any, tmp_path: Path) -> None:
    """PEFT's "all-linear" has them, and PEFT writes its targets in any order."""
    peft_makes(load_reference(bases(*_MOE)), tmp_path / "theirs", r=8, target_modules="all-linear")
    with pytest.raises(ConfigError, match=r"names layers\.\d\.moe\.router\.gate, which never has an adapter"):
        _found(tmp_path / "theirs")


def _apart(bases: Any, folder: Path) -> nn.Module:
    """An adapter in which gate and up of each expert have an A of their own; what PEFT makes of it."""
    model, family, settings = adapted(bases(*_MOE), "rank=8", "expert_rank=4")
    save_adapter(model, folder, family, settings, layout="peft-per-expert")
    generator = torch.Generator().manual_seed(1)
    found = {
        key: 0.2 * torch.randn(tensor.shape, generator=generator) for key, tensor in sorted(read_all(folder).items())
    }
    save_file(found, folder / "adapter_model.safetensors")
    return peft_loads(load_reference(bases(*_MOE)), folder)


def test_gate_and_up_apart_take_twice_the_rank(bases: Any, tmp_path: Path) -> None:
    expected = logits(_apart(bases, tmp_path / "adapter"), some_tokens())
    model, family, settings = adapted(bases(*_MOE), "rank=8", "expert_rank=8")
    first = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    load_adapter(model, tmp_path / "adapter", family, settings)
    assert (logits(model, some_tokens()) - expected).abs().max() < 1e-4
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(bases(*_MOE))}))
    assert (logits(_found(tmp_path / "adapter"), some_tokens()) - expected).abs().max() < 1e-4
    # The half of the rank that `down` does not need can still learn: A is as it was, and B is zero.
    a, b = (adapter_tensors(model)[f"layers.0.moe.experts.down_lora_{part}"] for part in "ab")
    assert torch.equal(a[:, 4:], first["layers.0.moe.experts.down_lora_a"][:, 4:]) and not b[..., 4:].any()
    with pytest.raises(ConfigError, match=r"rank 8 \(gate and up have an A each\), the model 4\n.*expert_rank = 8"):
        load_adapter(*_of(adapted(bases(*_MOE), "rank=8", "expert_rank=4"), tmp_path / "adapter"))


def _of(found: tuple[Any, Any, AdapterSettings], folder: Path) -> tuple[Any, Path, Any, AdapterSettings]:
    model, family, settings = found
    return model, folder, family, settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["rank=4", "expert_rank=4", "alpha=16"], "the adapter has rank 8, the model 4\n.*lora.rank = 8"),
        (["rank=8", "expert_rank=2"], "the adapter has rank 4, the model 2\n.*lora.expert_rank = 4"),
        (["rank=8", "expert_rank=4", "alpha=8"], "lora_alpha / r is 4, the model's is 1\n.*lora.alpha = 32"),
        (["rank=8", "expert_rank=4", "use_rslora"], "use_rslora = false"),
        (["rank=8", "expert_rank=4", "use_dora"], "has use_dora false\n  Set lora.use_dora = false"),
        (["rank=8", "expert_rank=4", "target_modules=q_proj,experts"], r"in the files only .*k_proj\.lora_A"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_are_not_the_adapters(options: list[str], words: str, bases: Any, tmp_path: Path) -> None:
    model, family, settings = adapted(bases(*_MOE), "rank=8", "expert_rank=4")
    save_adapter(model, tmp_path / "adapter", family, settings)
    other = adapted(bases(*_MOE), *options)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(other[0]).items()}
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_adapter(*_of(other, tmp_path / "adapter"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(other[0]).items())


@pytest.mark.parametrize(
    "change", ["missing", "unknown", "shape", "nan", "modules_to_save", "init_lora_weights", "pickled"]
)
def test_a_folder_that_is_not_an_adapter_of_the_model(change: str, bases: Any, tmp_path: Path) -> None:
    model, family, settings = adapted(bases(*_MOE), "rank=8", "expert_rank=4")
    folder = tmp_path / "adapter"
    save_adapter(model, folder, family, settings)
    tensors = read_all(folder)
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    words = key
    if change == "missing":
        del tensors[key]
    elif change == "unknown":
        words = key.replace("k_proj", "x_proj")
        tensors[words] = tensors[key].clone()
    elif change == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif change == "nan":
        tensors[key][3, 1] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    if change in ("modules_to_save", "init_lora_weights"):
        words = change
        config = json.loads((folder / "adapter_config.json").read_text())
        config[change] = {"modules_to_save": ["lm_head"], "init_lora_weights": "pissa"}[change]
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if change == "pickled":
        words = "never loaded"
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError) as caught:
        load_adapter(model, folder, family, settings)
    assert words in str(caught.value)


# Ranks


def _load_and_save(base: Path, source: Path, target: Path, degrees: Degrees) -> None:
    family, spec = spec_of_hf_folder(base)
    config = resolve(["--lora.rank=8", "--lora.expert_rank=4"]).config
    model = build_model(spec)
    convert(model, ["lora"], config)
    parallelize(
        model,
        Mesh.build(torch.device("cpu"), degrees),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        accumulates=False,
        reshard_after_forward="default",
        recompute=resolve(["--activation_checkpoint.mode=none"]).config.activation_checkpoint,
        compile_backend=None,
        cpu_offload=False,
        parts=[],
    )
    load_hf_weights(materialize(model, "cpu"), base, family)
    init_adapters(model, 0)
    settings = AdapterSettings.of(config.lora)
    load_adapter(model, source, family, settings)
    save_adapter(model, target, family, settings)


@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"dp_shard": 2, "ep": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_ranks_read_and_write_the_files_of_one(degrees: dict[str, int], tmp_path: Path) -> None:
    random_model("qwen3_moe", {**MOE_SIZES, "vocab_size": 98}).save_pretrained(tmp_path / "base")
    model, family, settings = adapted(tmp_path / "base", "rank=8", "expert_rank=4")
    randomise(model)
    save_adapter(model, tmp_path / "one", family, settings)
    run_ranks(_load_and_save, 2, tmp_path / "base", tmp_path / "one", tmp_path / "two", Degrees(**degrees))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# Figures


def test_figures_of_values() -> None:
    values = torch.arange(101.0).flip(0)
    found = {"a.lora_b": Figures.of(values.view(1, 101))}
    first, *lines = table(None, found)
    assert first.split()[:2] == ["parameter", "shape"] and len(lines) == 1
    assert lines[0].split() == ["a.lora_b", "1", "x", "101", "after", "50", "29.2", "0", "25", "50", "75", "100"]
    assert [line.split()[-8] for line in list(table(found, found))[1:]] == ["before", "after"]
