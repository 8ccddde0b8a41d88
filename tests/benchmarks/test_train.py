"""Training beside transformers: both sides compute the same, and what is made of their times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from titanmoe.benchmarks import train, train_worker

SMALL = ["--flavor", "debug_moe", "--batch", "1", "--seq-len", "32", "--layers", "2", "--threads", "1"]


class Pretended:
    """In the place of a `Worker`: as fast as its system is said to be, and nothing is built."""

    seconds: ClassVar = {"titanmoe": 0.5, "titanmoe full": 1.0, "transformers": 2.0}
    jobs: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, module: str, arguments: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.jobs.append(dict(arguments))
        self.info = {"matmul_gflops": 100.0}
        is_full = arguments["system"] == "titanmoe" and arguments["lora"] and not arguments["adapter"]
        self.name = "titanmoe full" if is_full else arguments["system"]

    def run(self) -> dict[str, Any]:
        return {"seconds": [9.0, self.seconds[self.name]], "losses": [3.0, 2.0]}

    def close(self) -> None:
        pass


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(train, "Worker", Pretended)
    monkeypatch.setattr(Pretended, "jobs", [])
    return Pretended.jobs


def test_adapters_are_compared_with_peft_and_with_all_weights(
    jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--rounds", "2", "--dtype", "float32", "--json", "--lora", "rank=4", "expert_rank=2"]
    assert train.main([*SMALL, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["lora"], report["layers"]) == (["rank=4", "expert_rank=2"], 2)
    found = {result["system"]: result for result in report["results"]}
    assert list(found) == ["titanmoe", "titanmoe full", "transformers"]
    assert [found[name]["times_titanmoe_is_faster"]["median"] for name in found] == [1.0, 2.0, 4.0]
    assert found["titanmoe"]["tokens_per_second"] == 32 / 0.5
    assert found["titanmoe full"]["losses"] == [3.0, 2.0] * 2
    # A third of the FLOPs of products is of gradients of weights; adapters have some, and attention has none.
    share = found["titanmoe"]["flops_per_token"] / found["titanmoe full"]["flops_per_token"]
    assert 0.6 < share < 0.7
    assert [bool(job["adapter"]) for job in jobs] == [True, False, True]
    settings = ["--model.converters=lora", "--lora.dtype=float32", "--lora.rank=4", "--lora.expert_rank=2"]
    assert all(job["lora"] == settings for job in jobs)


def test_without_adapters_all_weights_are_compared(
    jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SMALL, "--rounds", "1", "--dtype", "bfloat16"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[-2:]] == [["bfloat16", "titanmoe"], ["bfloat16", "transformers"]]
    assert not any(job["adapter"] for job in jobs)


def test_what_adapters_save_is_said(jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, "--rounds", "2", "--lora", "rank=4"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.partition(", for ")[0] for line in lines] == [
        "",
        "bfloat16: adapters take 0.50 of the time of a full step",
        "float32: adapters take 0.50 of the time of a full step",
    ]
    assert all(0.6 < float(line.partition(", for ")[2].split()[0]) < 0.75 for line in lines[1:])


@pytest.mark.parametrize("lora", [[], ["--lora", "rank=16"]], ids=["all weights", "adapters"])
def test_the_size_need_not_be_named(
    jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], lora: list[str]
) -> None:
    assert train.main(["--layers", "1", "--rounds", "1", "--dtype", "float32", "--json", *lora]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [report[key] for key in ("model", "batch", "seq_len")] == ["qwen3 bench_60M", 2, 1024]


def test_a_mistake_in_the_settings_of_adapters_is_told(
    jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SMALL, "--lora", "rang=4"]) == 2
    assert capsys.readouterr().err.startswith("error: command line, --lora.rang: unknown key")


def test_both_sides_train_the_same_adapters(tmp_path: Path) -> None:
    """The losses of steps, of which each follows from the updates before it. B is zero only in the first."""
    options = train._parse([*SMALL, "--lora", "rank=4", "alpha=64", "--steps", "2", "--rounds", "1"])
    train._prepare(str(tmp_path), options)
    batches = load_file(tmp_path / "batches.safetensors")["tokens"]
    settings = train._lora_options(options, "float32")
    losses = []
    for build in (train_worker._titanmoe, train_worker._transformers):
        step = build(str(tmp_path / "model"), torch.float32, torch.device("cpu"), str(tmp_path / "adapter"), settings)
        losses.append(torch.stack([step(batches[0]) for _ in range(4)]))
    assert losses[0][0] - losses[0][-1] > 0.05  # they learn
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=2e-4)
