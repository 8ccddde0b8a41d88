"""Adapters whose files contradict themselves, runs whose settings or bases moved, and folders that must stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.adapted import run_export
from tests.checkpoint.hf_models import read_all
from tests.parity.reference import random_model
from tests.train.jobs import TINY, run, write_job
from titanmoe import cli

_SECTIONS = """
[checkpoint]
enable = true
interval = 2
keep_latest_k = 0
initial_load_in_hf = true
[lora]
rank = 8
alpha = 16.0
expert_rank = 4
"""
_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
_EXPERTS = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in float16, a run of two steps that trained adapters for it, and these as PEFT has them."""
    found = tmp_path_factory.mktemp("job")
    job = write_job(found, more=_SECTIONS)
    sizes = {key: value for key, value in TINY.items() if key != "architectures"}
    random_model("qwen3_moe", sizes).to(torch.float16).save_pretrained(found / "model")
    run(job, found / "run", "--model.converters=lora", "--training.steps=2", "--optimizer.lr=5e-2")
    assert cli.main(["export", f"--checkpoint={found / 'run'}", f"--output={found / 'peft'}", "--format=peft"]) == 0
    return found


def _first_rows(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key][: len(tensors[key]) // 2].contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, t: _first_rows(t, f"{_Q}A.weight"), "q_proj.lora_A.weight: is of rank 4, adapter_config.json says"),
        (
            lambda c, t: t.update({f"{_Q}B.weight": t[f"{_Q}B.weight"][:, :4].contiguous()}),
            "q_proj.lora_B.weight: is of rank 4, and the other factor",
        ),
        (lambda c, t: _first_rows(t, _EXPERTS), "is of rank 4, and the other factor of the module is of rank 2"),
        (lambda c, t: c.update(r=4), "is of rank 8, adapter_config.json says 4"),
        (lambda c, t: c.update(alpha_pattern={"q_proj": float("nan")}), "alpha_pattern is not an object of numbers"),
        (lambda c, t: c.update(alpha_pattern=["q_proj"]), "alpha_pattern is not an object of numbers"),
        (lambda c, t: c.update(alpha_pattern={"q_proj": "8"}), "alpha_pattern is not an object of numbers"),
        (lambda c, t: c.update(rank_pattern={"q_proj": 0}), "rank_pattern is not an object of numbers"),
        (lambda c, t: c.update(lora_alpha=0), "lora_alpha is 0, and must be above zero"),
        (lambda c, t: c.update(lora_alpha=10**400), "r or lora_alpha is missing, or not a number"),
        (lambda c, t: c.update(lora_alpha=float("nan")), "r or lora_alpha is missing, or not a number"),
        (lambda c, t: c.update(base_model_name_or_path=""), "the adapter is for a model that it does not name"),
    ],
    ids=[
        "A has fewer ranks", "B has fewer ranks", "experts", "r", "nan", "list", "text", "no rank", "no alpha", "huge",
        "alpha is nan", "no base",
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None],
    words: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(folder / "peft", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    monkeypatch.chdir(folder / "model")
    for options in (["--format=peft"], ["--merge"]):
        told = run_export(capsys, "--checkpoint", tmp_path / "a", "--output", tmp_path / "x", *options, code=2)
        assert words in told and not (tmp_path / "x").exists()


def test_a_step_keeps_the_scale_that_it_was_trained_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run went on with another one, which is told."""
    shutil.copytree(folder / "run", tmp_path / "run")
    options = ("--model.converters=lora", "--lora.alpha=160", "--lora.use_rslora", "--training.steps=4")
    told = run(folder / "job.toml", tmp_path / "run", *options).told
    assert "lora.alpha: 16.0 -> 160.0" in told and "lora.use_rslora: false -> true" in told
    for step, alpha, use_rslora in ((2, 16.0, False), (4, 160.0, True)):
        output = tmp_path / f"step-{step}"
        arguments = ["--checkpoint", tmp_path / f"run/checkpoint/step-{step}", "--output", output, "--format=peft"]
        was_told = "adapters are scaled as when they were saved" in run_export(capsys, *arguments)
        assert was_told == (step == 2)
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["lora_alpha"], config["use_rslora"]) == (alpha, use_rslora)
    first = [read_all(path) for path in (folder / "peft", tmp_path / "step-2")]
    assert all(torch.equal(first[0][key], first[1][key]) for key in first[0])


def test_a_base_that_is_not_bfloat16_is_not_rounded_before_the_sum(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of a run, as out of PEFT's folder."""
    for source in ("run", "peft"):
        arguments = ["--checkpoint", folder / source, "--output", tmp_path / source, "--merge", "--dtype=float32"]
        run_export(capsys, *arguments)
    found, expected = read_all(tmp_path / "run"), read_all(tmp_path / "peft")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    base = read_all(folder / "model")
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("options", [["--merge"], ["--format=peft"], ["--format=peft", "--no-verify"]], ids=str)
def test_a_base_that_moved_is_named(
    options: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the run's model.name is "auto", so that even what model it is stands there."""
    shutil.copytree(folder, tmp_path / "job")
    config = tmp_path / "job/run/config.toml"
    config.write_text(config.read_text().replace(f"{folder}/model", f"{tmp_path}/gone"))
    arguments = ["--checkpoint", tmp_path / "job/run", "--output", tmp_path / "x", *options]
    told = run_export(capsys, *arguments, code=2)
    assert f"is no folder: {tmp_path}/gone" in told and "--base DIR names another one" in told
    run_export(capsys, *arguments, "--base", tmp_path / "job/model")


def test_what_an_export_may_replace(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier one of either kind; never what it is made from."""
    shutil.copytree(folder / "model", tmp_path / "base")
    arguments = ["--checkpoint", folder / "peft", "--base", tmp_path / "base", "--overwrite"]
    assert "is the model that the adapters are for itself" in run_export(
        capsys, *arguments, "--output", tmp_path / "base", "--merge", code=2
    )
    assert (tmp_path / "base/model.safetensors").read_bytes() == (folder / "model/model.safetensors").read_bytes()
    assert "is the checkpoint itself" in run_export(
        capsys, *arguments, "--output", folder / "peft", "--format=peft", code=2
    )
    for options in (["--format=peft"], ["--format=peft"], ["--merge"], ["--format=peft-per-expert"]):
        run_export(capsys, *arguments, "--output", tmp_path / "x", *options)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_whole_model_is_no_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "model")
    assert cli.main(["generate", "--model", model, "--adapter", model, "--prompt", "a"]) == 2
    assert "is a whole model, and a base is named for it" in capsys.readouterr().err
