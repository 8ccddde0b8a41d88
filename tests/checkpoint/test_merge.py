"""Adapters merged into weights: by the formula, in transformers, and out of runs whose steps have adapters only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.adapted import adapted, logits, peft_loads, randomise, run_export
from tests.checkpoint.hf_models import load_reference, read_all, save_reference, some_tokens
from tests.checkpoint.memory import forget_peak, needs_proc, status_mib
from tests.parity.reference import random_model
from tests.ranks import run_ranks
from tests.train.jobs import TINY, assert_close, curve, run, tensors, write_job
from titanmoe import cli
from titanmoe.checkpoint import adapters as adapters_module
from titanmoe.checkpoint import merge as merge_module
from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.base_model import BaseModel, checksum_of
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.merge import check_mergeable, merge
from titanmoe.checkpoint.pretrained import from_pretrained, save_pretrained
from titanmoe.checkpoint.safetensors_io import TensorWriter
from titanmoe.config.errors import ConfigError
from titanmoe.config.resolve import resolve
from titanmoe.trainer import build

FP8 = torch.float8_e4m3fn


# The formula


def _by_formula(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    whole = weight.double() + scale * b.double() @ a.double()
    if magnitude is None:
        return whole
    return magnitude.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("has_magnitude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_the_formula(dtype: torch.dtype, has_magnitude: bool) -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(3, 2, 5, 16).to(dtype)
    a, b, magnitude = draw(3, 4, 16), draw(3, 2, 5, 4), draw(3, 2, 5).abs() if has_magnitude else None
    found = merge(weight, a, b, magnitude, 0.7)
    assert found.dtype == torch.float32 and found.shape == weight.shape
    for expert in range(3):
        for half in range(2):
            m = None if magnitude is None else magnitude[expert, half]
            expected = _by_formula(weight[expert, half], a[expert], b[expert, half], m, 0.7)
            assert (found[expert, half] - expected).abs().max() < 1e-5
    linear = merge(weight[0, 0], a[0], b[0, 0], None if magnitude is None else magnitude[0, 0], 0.7)
    assert torch.equal(linear, found[0, 0])


def test_small_additions_are_not_lost_to_rounding() -> None:
    """Added in bfloat16, either of them would be."""
    weight, a = torch.ones(4, 8, dtype=torch.bfloat16), torch.full((2, 8), 0.5)
    b = torch.full((4, 2), 2.0**-9)
    assert torch.equal(merge(weight, a, b, None, 1.0), torch.full((4, 8), 1 + 2.0**-9))


def test_every_adapter_has_a_weight() -> None:
    whole = ["l.weight", "l.lora_a", "l.lora_b", "l.lora_magnitude", "e.down", "e.down_lora_a", "e.down_lora_b"]
    check_mergeable(whole)
    with pytest.raises(ConfigError, match=r"x\.lora_a: is an adapter of no weight"):
        check_mergeable([*whole, "x.lora_a"])
    with pytest.raises(ConfigError, match=r"e\.down_lora_a: has no adapter beside it"):
        check_mergeable(whole[:-1])


# Models


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (("qwen3", "moe"), ["rank=8", "expert_rank=4"]),
        (("qwen3", "moe"), ["rank=8", "use_rslora"]),
        (("qwen3", "moe"), ["rank=8", "use_dora"]),
        (("qwen3", "moe"), ["rank=8", "target_modules=experts.gate_up_proj"]),
        (("qwen3", "moe_with_dense_layers_and_bias"), ["rank=8", "target_modules=experts,down_proj"]),
        (("qwen3", "dense"), ["rank=8", "use_dora"]),
        (("gpt_oss", "like_the_release"), ["rank=4", "use_dora"]),
        (("llama4", "like_scout"), ["rank=4", "use_dora"]),
        (("mixtral", "plain"), ["rank=4"]),
        (("deepseek_v3", "v3"), ["rank=8"]),
        (("glm4_moe", "plain"), ["rank=4"]),
    ],
    ids=str,
)
def test_a_merged_folder_says_what_the_live_model_says(
    kind: tuple[str, str], options: list[str], tmp_path: Path
) -> None:
    save_reference(tmp_path / "base", kind[1], family=kind[0])
    model, family, settings = adapted(tmp_path / "base", *options)
    randomise(model, std=0.1)
    tokens = some_tokens() % model.spec.vocab_size
    live, without = logits(model, tokens), logits(load_reference(tmp_path / "base"), tokens)
    save_hf(model, tmp_path / "merged", family, model.spec, adapters=settings)
    found = logits(load_reference(tmp_path / "merged"), tokens)
    assert (found - live).abs().max() < 1e-4 and (live - without).abs().max() > 0.1
    assert torch.equal(logits(model, tokens), live), "the model was changed"
    # Rounded once, from float32.
    save_hf(model, tmp_path / "bf16", family, model.spec, dtype=torch.bfloat16, adapters=settings)
    whole, rounded = read_all(tmp_path / "merged"), read_all(tmp_path / "bf16")
    assert all(torch.equal(whole[name].bfloat16(), rounded[name].bfloat16()) for name in rounded)


def test_merged_in_fp8_blocks(tmp_path: Path) -> None:
    save_reference(tmp_path / "base", "moe")
    model, family, settings = adapted(tmp_path / "base", "rank=8")
    randomise(model, std=0.05)
    save_hf(model, tmp_path / "merged", family, model.spec, adapters=settings)
    save_hf(model, tmp_path / "fp8", family, model.spec, dtype=FP8, adapters=settings)
    exact = from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found = from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    for name, tensor in exact.named_parameters():
        assert (found.get_parameter(name) - tensor).abs().max() <= tensor.abs().max() / 14, name


def _merge_on_ranks(base: Path, target: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, family, settings = adapted(base, "rank=8", "use_dora")
    randomise(model)
    for block in model.blocks():
        fully_shard(block)
    fully_shard(model)
    save_hf(model, target, family, model.spec, adapters=settings)


def test_two_ranks_write_the_files_of_one(tmp_path: Path) -> None:
    save_reference(tmp_path / "base", "moe")
    model, family, settings = adapted(tmp_path / "base", "rank=8", "use_dora")
    randomise(model)
    save_hf(model, tmp_path / "one", family, model.spec, adapters=settings)
    run_ranks(_merge_on_ranks, 2, tmp_path / "base", tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# Runs


_EXPERT_PARALLEL = ("--parallelism.expert_parallel_degree=2", "--training.local_batch_size=2")
_SECTIONS = """
[checkpoint]
enable = true
interval = 2
initial_load_in_hf = true
[lora]
rank = 8
expert_rank = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a run of four steps that trained adapters for it."""
    found = tmp_path_factory.mktemp("job")
    job = write_job(found, more=_SECTIONS)
    sizes = {key: value for key, value in TINY.items() if key != "architectures"}
    random_model("qwen3_moe", sizes).save_pretrained(found / "model")
    run(job, found / "run", "--model.converters=lora", "--training.steps=4")
    return found


def test_steps_hold_adapters_and_refer_to_their_base(folder: Path) -> None:
    found = tensors(folder / "run", 4)
    parameters = {name.removeprefix("model.") for name in found if name.startswith("model.")}
    assert len(parameters) == 24 and all("lora_" in name for name in parameters)
    # And the optimizer's states of these, no others.
    states = {name.removeprefix("optimizer.").rpartition(".")[0] for name in found if name.startswith("optimizer.")}
    assert states == parameters
    manifest = json.loads((folder / "run/checkpoint/step-4/manifest.json").read_text())
    assert manifest["base"] == {"path": str(folder / "model"), "checksum": checksum_of(folder / "model")}


@pytest.mark.parametrize("options", [(), _EXPERT_PARALLEL, ("--parallelism.pipeline_parallel_degree=2",)], ids=str)
def test_a_resumed_run_goes_on_as_it_would_have(options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    """On one rank, and on two."""
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint/step-4")
    ranks = 2 if options else 1
    job = folder / "job.toml"
    run(job, tmp_path / "run", "--model.converters=lora", "--training.steps=4", *options, ranks=ranks)
    found, expected = tensors(tmp_path / "run", 4), tensors(folder / "run", 4)
    assert found.keys() == expected.keys()
    if ranks == 1:
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    else:
        assert_close(tmp_path / "run", folder / "run")


def test_a_resumed_run_wants_the_base_it_began_with(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "model", tmp_path / "other")
    with (tmp_path / "other/model.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    options = ("--model.converters=lora", "--training.steps=5", f"--checkpoint.initial_load_path={tmp_path / 'other'}")
    outcome = run(folder / "job.toml", tmp_path / "run", *options, code=2)
    assert "holds other weights than those that the adapters were trained on" in str(outcome.told)


def test_steps_that_hold_whole_models_are_not_gone_on_from_with_adapters_alone(folder: Path, tmp_path: Path) -> None:
    """What would then be saved refers to a base, which the frozen weights of those steps may not be."""
    options = ("--model.converters=lora", "--training.steps=1")
    run(folder / "job.toml", tmp_path / "run", *options, "--checkpoint.initial_load_in_hf=false")
    outcome = run(folder / "job.toml", tmp_path / "run", "--model.converters=lora", "--training.steps=2", code=2)
    assert "step-1: holds the whole model, not adapters for" in str(outcome.told)
    assert "initial_load_in_hf = false" in str(outcome.told)
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]


def test_a_checksum_is_of_the_weights_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "moved")
    base = BaseModel.of(folder / "model")
    base.check(BaseModel.of(tmp_path / "moved"))
    save_reference(tmp_path / "other", "moe")
    with pytest.raises(ConfigError, match="holds other weights"):
        base.check(BaseModel.of(tmp_path / "other"))


def test_a_run_is_merged_and_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_export(capsys, "--checkpoint", folder / "run", "--output", tmp_path / "m", "--merge", "--dtype=float32")
    assert "of their size away from those of the live model" in out and "verified 69 tensors" in out
    run_export(capsys, "--checkpoint", folder / "run", "--output", tmp_path / "a", "--format=peft")
    tokens = some_tokens()
    base = load_reference(folder / "model")
    expected = logits(peft_loads(base, tmp_path / "a"), tokens)
    assert (logits(load_reference(tmp_path / "m"), tokens) - expected).abs().max() < 1e-4
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "model")


def test_statistics_before_training_and_after(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What training began with follows from the seed: it is in no checkpoint."""
    run(folder / "job.toml", tmp_path / "run", "--model.converters=lora", "--lora.use_dora", "--training.steps=1")
    arguments = ["--checkpoint", tmp_path / "run", "--format=peft-per-expert", "--statistics"]
    assert cli.main(["export", *map(str, arguments), f"--output={tmp_path}/a", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_tensors"] == (2 * 4 + 2 * 8 * 3) * 3
    before, after = figures["statistics"]["before"], figures["statistics"]["after"]
    weight = read_all(folder / "model")["model.layers.1.self_attn.o_proj.weight"]
    module = "layers.1.attention.o_proj.lora"
    most = weight.shape[1] ** -0.5
    a, b, magnitude = (before[f"{module}_{part}"] for part in ("a", "b", "magnitude"))
    assert -most <= a["min"] < -0.9 * most and 0.9 * most < a["max"] <= most and a["shape"] == [8, 32]
    assert b["min"] == b["max"] == 0
    assert magnitude["mean"] == pytest.approx(weight.norm(dim=1).mean().item(), rel=1e-5)
    step = tensors(tmp_path / "run", 1)[f"model.{module}_b"]
    after_b = after[f"{module}_b"]
    assert after_b["std"] == pytest.approx(step.std(correction=0).item(), rel=1e-5)
    assert after_b["max"] == step.max() > 0 and after_b["median"] in step
    assert after_b["quartile1"] <= after_b["median"] <= after_b["quartile3"]

    assert cli.main(["export", *map(str, arguments), f"--output={tmp_path}/b"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "before" in line or "after" in line]
    assert len(lines) == 2 * len(after) and lines[0].split()[0] == "layers.0.attention.q_proj.lora_a"


@pytest.mark.parametrize("format", ["--merge", "--format=peft-per-expert"])
@pytest.mark.parametrize(
    ("was", "options", "words"),
    [
        (
            "rank = 8",
            'rank = 8\ntarget_modules = ["q_proj"]',
            "only in the checkpoint: model.layers.0.attention.k_proj",
        ),
        ("rank = 8", "rank = 8\nuse_dora = true", "only in the model: model.layers.0.attention.k_proj.lora_magnitude"),
        (
            "expert_rank = 4",
            "expert_rank = 2",
            "of another shape: model.layers.0.moe.experts.down_lora_a (8, 4, 16) in",
        ),
    ],
    ids=["left over", "missing", "shape"],
)
def test_adapters_that_are_not_the_configs(
    was: str, options: str, words: str, format: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every tensor of the checkpoint belongs to a weight, and every adapter has its tensors, or nothing is written."""
    config = (folder / "job.toml").read_text().replace("[model]", '[model]\nconverters = ["lora"]', 1)
    assert was in config
    (tmp_path / "other.toml").write_text(config.replace(was, options))
    told = run_export(
        capsys, "--checkpoint", folder / "run/checkpoint/step-4", "--output", tmp_path / "m", format,
        "--config", tmp_path / "other.toml", code=2,
    )  # fmt: skip
    assert words in told and not (tmp_path / "m").exists()


def test_adapters_of_another_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with one layer more."""
    sizes = {key: value for key, value in TINY.items() if key != "architectures"} | {"num_hidden_layers": 3}
    random_model("qwen3_moe", sizes).save_pretrained(tmp_path / "model")
    config = f'[model]\nname = "auto"\nhf_assets_path = "{tmp_path}/model"\ntokenizer_path = "builtin"\n'
    (tmp_path / "other.toml").write_text(f'{config}converters = ["lora"]\n{_SECTIONS}')
    step = folder / "run/checkpoint/step-4"
    for options in (["--merge", f"--base={tmp_path}/model"], ["--format=peft", "--no-verify"]):
        arguments = ["--checkpoint", step, "--output", tmp_path / "m", "--config", tmp_path / "other.toml", *options]
        told = run_export(capsys, *arguments, code=2)
        assert "holds other weights than those" in told or "only in the model: model.layers.2.attention" in told
        assert not (tmp_path / "m").exists()


def test_an_export_of_adapters_alone_needs_no_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", folder / "run", "--output", tmp_path / "a", "--format=peft"]
    assert "/nowhere: no such folder" in run_export(capsys, *arguments, "--base=/nowhere", code=2)
    run_export(capsys, *arguments, "--base=/nowhere", "--no-verify")
    run_export(capsys, *arguments[:2], "--output", tmp_path / "b", "--format=peft")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    # The folder is a model, too, on the base that it names; in another layout, and merged, it is the same.
    run_export(capsys, "--checkpoint", tmp_path / "b", "--output", tmp_path / "c", "--format=peft-per-expert")
    run_export(capsys, "--checkpoint", tmp_path / "c", "--output", tmp_path / "m", "--merge", "--dtype=float32")
    run_export(capsys, "--checkpoint", folder / "run", "--output", tmp_path / "n", "--merge", "--dtype=float32")
    found, expected = read_all(tmp_path / "m"), read_all(tmp_path / "n")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    told = run_export(capsys, "--checkpoint", tmp_path / "a", "--output", tmp_path / "x", "--merge", code=2)
    assert "the adapter is for /nowhere, which is no folder here" in told and "--base" in told


def test_a_wrong_adapter_is_found_by_its_logits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing values took what is wrong for right."""
    monkeypatch.setattr(adapters_module, "_difference", lambda *args: "")
    write = TensorWriter.write

    def write_wrong(self: TensorWriter, key: str, tensor: Tensor, row: int = 0) -> None:
        write(self, key, -tensor if "q_proj.lora_B" in key else tensor, row)

    monkeypatch.setattr(TensorWriter, "write", write_wrong)
    told = run_export(capsys, "--checkpoint", folder / "run", "--output", tmp_path / "new/a", "--format=peft", code=1)
    assert "away from those of the model with live adapters" in told
    assert not list(tmp_path.iterdir())


def test_a_wrong_merge_is_found_by_its_logits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing and comparing values agree with each other; only the live model knows better."""
    right = merge_module.merge
    monkeypatch.setattr(merge_module, "merge", lambda *args: right(*args[:-1], -args[-1]))
    told = run_export(
        capsys, "--checkpoint", folder / "run", "--output", tmp_path / "m", "--merge", "--dtype=float32", code=1
    )
    assert "away from those of the model with live adapters" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "has adapters beside its weights"),
        (("--merge", "--format=peft"), "merged adapters are a model"),
        (("--statistics", "--merge"), "--statistics is for adapters"),
        (("--merge", "--base=/nowhere"), "no such folder"),
    ],
    ids=str,
)
def test_wrong_words(
    options: tuple[str, ...], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run_export(capsys, "--checkpoint", folder / "run", "--output", tmp_path / "m", *options, code=2)
    assert words in told and not list(tmp_path.iterdir())


def test_a_run_goes_on_from_an_adapter(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first loss is that after the steps that made the adapter; on two ranks, too."""
    run_export(capsys, "--checkpoint", folder / "run/checkpoint/step-2", "--output", tmp_path / "a", "--format=peft")
    options = ("--model.converters=lora", "--training.steps=1", f"--checkpoint.initial_adapter_path={tmp_path / 'a'}")
    run(folder / "job.toml", tmp_path / "one", *options)
    run(folder / "job.toml", tmp_path / "two", *options, *_EXPERT_PARALLEL, ranks=2)
    run(folder / "job.toml", tmp_path / "none", *options[:2])
    first = {name: curve(tmp_path / name)[0][1] for name in ("one", "two", "none")}
    assert first["one"] < first["none"] - 1e-3 and abs(first["two"] - first["one"]) < 1e-5 * first["one"]


def test_adapters_that_begin_anew_have_the_magnitudes_of_the_base(folder: Path, tmp_path: Path) -> None:
    options = ("--model.converters=lora", "--lora.use_dora", "--optimizer.lr=1e-4")
    run(folder / "job.toml", tmp_path / "run", *options, "--training.steps=1")
    anew = ("--training.steps=2", "--checkpoint.exclude_from_loading=model,optimizer")
    run(folder / "job.toml", tmp_path / "run", *options, *anew)
    saved = [tensors(tmp_path / "run", step) for step in (1, 2)]
    names = [name for name in saved[0] if name.startswith("model.") and name.endswith("lora_magnitude")]
    assert names
    for name in names:
        torch.testing.assert_close(saved[1][name], saved[0][name], rtol=0, atol=1e-3)
        assert saved[1][name].min() > 0.01


def test_what_is_wrong_with_adapters_is_told_before_the_base_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(capsys, "--checkpoint", folder / "run/checkpoint/step-2", "--output", tmp_path / "a", "--format=peft")
    shutil.copytree(folder / "run", tmp_path / "old")

    def arrange(rank: int) -> None:
        build.load_hf_weights = lambda *args, **kwargs: pytest.fail("the base was read")

    options = ("--model.converters=lora", "--training.steps=5", "--lora.rank=4")
    told = []
    for run_folder, more in (("new", (f"--checkpoint.initial_adapter_path={tmp_path / 'a'}",)), ("old", ())):
        outcome = run(folder / "job.toml", tmp_path / run_folder, *options, *more, code=2, before=arrange)
        told.append(str(outcome.told))
    assert "Set lora.rank = 8" in told[0]
    assert "step-4: " in told[1] and "lora_a" in told[1]


@pytest.mark.parametrize(
    ("converters", "options"),
    [("lora", ()), ("lora", _EXPERT_PARALLEL), ("quantize.frozen.float8,lora", _EXPERT_PARALLEL)],
    ids=str,
)
def test_a_run_that_writes_a_model_at_its_end_merges(
    converters: str, options: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """And what `export` makes of the checkpoint of its ranks is the same."""
    more = (f"--model.converters={converters}", "--training.steps=2", "--checkpoint.last_save_in_hf", *options)
    run(folder / "job.toml", tmp_path / "run", *more, ranks=2 if options else 1)
    arguments = ["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--merge"]
    assert cli.main([*arguments, "--dtype=float32"]) == 0
    found, expected = read_all(tmp_path / "run/checkpoint/step-2-hf"), read_all(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("kind", ["float8", "float8 block", "mx", "nf4"])
def test_adapters_are_merged_into_the_base_that_they_were_trained_on(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quantised one: the model that was trained is what is exported. Steps have none of its weights, and resume."""
    name, *block = kind.split()
    options = [f"--model.converters=quantize.frozen.{name},lora", "--quantize.frozen.nf4.block_size=16"]
    options += ["--quantize.frozen.float8.recipe_name=block"] * bool(block)
    for last in (2, 3) if kind == "mx" else (3,):
        run(folder / "job.toml", tmp_path / "run", *options, f"--training.steps={last}")
    assert all("lora_" in name for name in tensors(tmp_path / "run", 3))
    config = resolve([f"--job.config_file={tmp_path}/run/config.toml"]).config
    base = from_pretrained(folder / "model", dtype=torch.float32, converters=[f"quantize.frozen.{name}"], config=config)
    save_pretrained(base, tmp_path / "base")
    for layout in ("peft", "peft-per-expert"):
        run_export(capsys, "--checkpoint", tmp_path / "run", "--output", tmp_path / layout, "--format", layout)
    run_export(capsys, "--checkpoint", tmp_path / "run", "--output", tmp_path / "m", "--merge", "--dtype=float32")
    expected = logits(peft_loads(load_reference(tmp_path / "base"), tmp_path / "peft"), some_tokens())
    assert (logits(load_reference(tmp_path / "m"), some_tokens()) - expected).abs().max() < 1e-4
    without = logits(peft_loads(load_reference(folder / "model"), tmp_path / "peft"), some_tokens())
    assert (without - expected).abs().max() > 1e-2
    run_export(capsys, "--checkpoint", tmp_path / "run", "--output", tmp_path / "fp8", "--merge", "--dtype=float8")


# Memory


def _peak_while_merging(folder: Path) -> tuple[float, float]:
    """MiB of the model, and of what merging it took beyond that."""
    model, family, settings = adapted(folder, "rank=8", dtype=torch.bfloat16)
    randomise(model)
    forget_peak()
    before = status_mib("VmRSS")
    save_hf(model, folder.parent / "merged", family, model.spec, adapters=settings)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    return size, status_mib("VmHWM") - before


@needs_proc
def test_one_weight_at_a_time_is_merged(tmp_path: Path) -> None:
    sizes = {
        **{key: value for key, value in TINY.items() if key != "architectures"},
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "moe_intermediate_size": 512,
        "num_experts": 16,
    }
    random_model("qwen3_moe", sizes).bfloat16().save_pretrained(tmp_path / "base")
    [(size, peak)] = run_ranks(_peak_while_merging, 1, tmp_path / "base", fresh=True)
    # A layer's largest weight is 16 MiB in float32.
    assert size > 70 and peak < 40, (size, peak)


def test_settings_are_those_of_the_config() -> None:
    plain, stabilised = AdapterSettings(16, 32.0), AdapterSettings(16, 32.0, use_rslora=True)
    assert (plain.scale_of(16), plain.scale_of(4), plain.alpha_of(4)) == (2.0, 2.0, 8.0)
    assert (stabilised.scale_of(16), stabilised.scale_of(4)) == (8.0, 4.0)
