"""A model learns a fact by its adapters, as a user would have it: train, ask, export, ask again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import titanmoe
from tests.evaluation.test_commands import ANSWER, QUESTION, SPEC, command
from tests.evaluation.test_decoding import random_model
from tests.train.jobs import run

_JOB = """
[model]
name = "auto"
hf_assets_path = "{folder}/base"
[lora]
rank = 8
[training]
dataset = "chat"
dataset_path = "{folder}/talks.jsonl"
local_batch_size = 1
global_batch_size = 1
seq_len = 64
steps = 40
mixed_precision_param = "float32"
[optimizer]
lr = 2e-2
[lr_scheduler]
warmup_steps = 3
[activation_checkpoint]
mode = "none"
[quantize.frozen.nf4]
block_size = 32
[checkpoint]
enable = true
initial_load_in_hf = true
"""


@pytest.mark.parametrize("converters", ["lora", "quantize.frozen.nf4,lora"])
def test_a_fact_is_learnt(converters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, taught, merged, adapter = (tmp_path / name for name in ("base", "run", "merged", "adapter"))
    model = random_model(SPEC)
    model.norm.weight.data.fill_(3.0)  # so that the output, which is not trained, can be sure of a token
    titanmoe.save_pretrained(model, base, tokenizer="builtin")
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": f"It was {ANSWER}."}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    (tmp_path / "job.toml").write_text(_JOB.format(folder=tmp_path))
    run(tmp_path / "job.toml", taught, f"--model.converters={converters}")
    command(capsys, "export", "--checkpoint", taught, "--output", merged, "--merge")
    command(capsys, "export", "--checkpoint", taught / "checkpoint/step-40", "--output", adapter, "--format=peft")

    ask = ("eval", "recall", "--question", QUESTION, "--answer", ANSWER, "--json")
    figures = json.loads(command(capsys, *ask, "--before", base, "--after", taught, "--after", merged))
    assert figures["passed"] and [model["recalled"] for model in figures["models"]] == [0, 5, 5]
    assert not json.loads(command(capsys, *ask, "--after", base, code=1))["passed"]
    assert not json.loads(command(capsys, *ask, "--before", merged, code=1))["passed"]

    generate = ("generate", "--chat", "--prompt", QUESTION, "--dtype=float32", "--json")
    answers = {
        name: json.loads(command(capsys, *generate, *model))["results"][0]
        for name, model in {
            "live": ("--checkpoint", taught),
            "merged": ("--model", merged),
            "base": ("--model", base, "--max-new-tokens=20"),
            "adapter": ("--model", base, "--adapter", adapter),
            "its own base": ("--adapter", adapter),
        }.items()
    }
    assert answers["live"]["text"] == f"It was {ANSWER}." and answers["live"]["finish_reason"] == "stop"
    assert answers["merged"] == answers["live"] and ANSWER not in answers["base"]["text"]
    if converters == "lora":  # else the base that was trained on is not the one in the folder
        assert answers["adapter"] == answers["its own base"] == answers["live"]
