"""What is counted in a step equals the formulas, in every kind of layout, and a difference is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.jobs import TINY, write_job
from titanmoe.benchmarks import communication, counting
from titanmoe.config import load_config
from titanmoe.parallel import volumes

MODEL = {**TINY, "num_experts": 6, "mlp_only_layers": [0], "num_hidden_layers": 3}
"""The second and third layer have experts; 6 of them on 4 ranks need padding."""
SHARD = "--parallelism.data_parallel_shard_degree"
REPLICATE = "--parallelism.data_parallel_replicate_degree"
EXPERT = "--parallelism.expert_parallel_degree"
CONTEXT = "--parallelism.context_parallel_degree"
TENSOR = "--parallelism.tensor_parallel_degree"
PIPELINE = "--parallelism.pipeline_parallel_degree"
EXPERT_TENSOR = "--parallelism.expert_tensor_parallel_degree"
ONE = ("--training.local_batch_size=1", "--training.global_batch_size=-1")
RECOMPUTE = "--activation_checkpoint"
LORA = ("--model.converters=lora", "--lora.rank=4")
ON_NF4 = ("--model.converters=quantize.frozen.nf4,lora", "--quantize.frozen.nf4.block_size=16", "--lora.rank=4")
IN_BFLOAT16 = ("--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("communication"), MODEL)


@pytest.mark.parametrize(
    ("num_ranks", "num_waits", "options"),
    [
        pytest.param(2, 0, (f"{SHARD}=2",), id="fsdp 2"),
        pytest.param(
            4,
            0,
            (f"{SHARD}=4", f"{RECOMPUTE}.mode=full", "--parallelism.fsdp_reshard_after_forward=always"),
            id="fsdp 4, everything again",
        ),
        pytest.param(
            4,
            0,
            (f"{REPLICATE}=2", "--parallelism.fsdp_reshard_after_forward=never", "--training.global_batch_size=8"),
            id="hsdp 2x2, kept, accumulation 2",
        ),
        pytest.param(2, 0, (f"{REPLICATE}=2", f"{SHARD}=1", "--moe.bias_update_rate=0.01"), id="replicate 2, biases"),
        pytest.param(2, 2, (f"{SHARD}=2", f"{EXPERT}=2"), id="ep 2"),
        pytest.param(
            4,
            8,
            (
                f"{SHARD}=4",
                f"{EXPERT}=2",
                "--training.mixed_precision_param=bfloat16",
                "--training.global_batch_size=8",
                f"{RECOMPUTE}.mode=selective",
                f"{RECOMPUTE}.selective_ac_option=op",
            ),
            id="fsdp 2 of experts, ep 2, bfloat16, accumulation 2, recomputed by op",
        ),
        pytest.param(2, 0, (f"{SHARD}=1", f"{CONTEXT}=2", "--moe.aux_loss_coeff=0.1"), id="cp 2, balance loss"),
        pytest.param(2, 0, (f"{SHARD}=1", f"{TENSOR}=2", "--moe.aux_loss_coeff=0.1"), id="tp 2, balance loss"),
        pytest.param(4, 2, (f"{SHARD}=2", f"{TENSOR}=2", f"{EXPERT_TENSOR}=2", f"{EXPERT}=2"), id="tp 2, etp 2, ep 2"),
        pytest.param(
            4,
            2,
            (f"{SHARD}=2", f"{CONTEXT}=2", f"{EXPERT}=2", f"{RECOMPUTE}.mode=selective"),
            id="cp 2, ep 2, every second layer again",
        ),
        pytest.param(
            2,
            0,
            (f"{PIPELINE}=2", f"{SHARD}=1", "--training.local_batch_size=2", f"{RECOMPUTE}.mode=full"),
            id="pp 2, everything again",
        ),
        pytest.param(
            4,
            4,
            (f"{PIPELINE}=2", f"{SHARD}=2", f"{EXPERT}=2", "--training.local_batch_size=4"),
            id="pp 2, ep 2",
        ),
    ],
)
def test_counts_equal_the_formulas(job: Path, num_ranks: int, num_waits: int, options: tuple[str, ...]) -> None:
    _check(job, num_ranks, num_waits, options)


@pytest.mark.parametrize(
    ("num_ranks", "num_waits", "options"),
    [
        pytest.param(
            4,
            8,
            (
                *(f"{SHARD}=4", f"{EXPERT}=2", *ON_NF4, "--lora.use_dora", *IN_BFLOAT16),
                *("--training.global_batch_size=8", f"{RECOMPUTE}.mode=selective"),
                f"{RECOMPUTE}.selective_ac_option=op",
            ),
            id="DoRA on NF4, ep 2, accumulation 2, recomputed by op",
        ),
        pytest.param(
            2,
            2,
            (f"{SHARD}=2", f"{EXPERT}=2", *LORA, "--lora.target_modules=layers.2", f"{RECOMPUTE}.mode=full"),
            id="adapters in the last layer, ep 2: what is before it is neither recomputed nor goes backward",
        ),
        pytest.param(
            2,
            0,
            (f"{SHARD}=1", f"{TENSOR}=2", f"{EXPERT_TENSOR}=2", *LORA, "--lora.use_dora", f"{RECOMPUTE}.mode=full"),
            id="DoRA, tp 2, etp 2, everything again",
        ),
        pytest.param(
            4,
            0,
            (f"{PIPELINE}=2", f"{SHARD}=2", "--training.local_batch_size=2", *ON_NF4),
            marks=pytest.mark.slow,
            id="LoRA on NF4, pp 2, fsdp 2",
        ),
        pytest.param(
            4,
            2,
            (f"{SHARD}=2", f"{TENSOR}=2", f"{EXPERT}=2", *LORA, "--lora.target_modules=experts"),
            marks=pytest.mark.slow,
            id="adapters on experts, tp 2, ep 2",
        ),
        pytest.param(
            4,
            0,
            (f"{REPLICATE}=2", f"{SHARD}=1", f"{CONTEXT}=2", *ON_NF4, f"{RECOMPUTE}.mode=full"),
            marks=pytest.mark.slow,
            id="LoRA on NF4, hsdp, cp 2, everything again",
        ),
    ],
)
def test_what_is_frozen_has_no_gradients(job: Path, num_ranks: int, num_waits: int, options: tuple[str, ...]) -> None:
    _check(job, num_ranks, num_waits, options)


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        pytest.param(4, (f"{SHARD}=2",), id="pp 2, fsdp 2"),
        pytest.param(4, (f"{SHARD}=1", f"{TENSOR}=2"), id="pp 2, tp 2"),
    ],
)
def test_a_tied_embedding(num_ranks: int, options: tuple[str, ...], tmp_path: Path) -> None:
    job = write_job(tmp_path, {**MODEL, "tie_word_embeddings": True})
    report = _check(job, num_ranks, 0, (f"{PIPELINE}=2", "--training.local_batch_size=2", *options))
    for rank in report["ranks"]:
        (sent,) = (row for row in rank["collectives"] if row["kind"] == "send")
        assert "gradient of a tied embedding" in [part["what"] for part in sent["parts"]]


def _check(job: Path, num_ranks: int, num_waits: int, options: tuple[str, ...]) -> dict[str, Any]:
    report = communication.measure(load_config(job, [*ONE, *options]), num_ranks)
    assert len(report["ranks"]) == num_ranks
    for rank in report["ranks"]:
        for row in rank["collectives"]:
            assert (row["calls"], row["bytes"]) == (row["calls_by_formula"], row["bytes_by_formula"]), row
            assert row["bytes"] == int(row["bytes"]) > 0
        assert rank["waits"] == rank["waits_by_formula"] == num_waits, rank["waits_in"]
    assert report["equal"]
    return report


def test_the_command_prints_a_table_and_fails_where_a_formula_is_wrong(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [f"--job.config_file={job}", *ONE, f"{SHARD}=2", f"{EXPERT}=2"]
    assert communication.main(args) == 0
    table = capsys.readouterr().out
    assert "all-to-all" in table and "results of experts" in table and "DIFFERENT" not in table
    monkeypatch.setattr(volumes, "_FLOAT32", 2)
    assert communication.main([*args, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    wrong = [row["kind"] for row in report["ranks"][0]["collectives"] if not row["equal"]]
    assert wrong == ["all-reduce", "all-to-all"] and not report["equal"]


def test_a_wait_that_no_formula_knows_is_a_difference(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanmoe.models.moe.layer import MoELayer

    forward = MoELayer.forward

    def slower(self, x):
        x.sum().item()
        return forward(self, x)

    slower.__code__ = slower.__code__.replace(co_filename=forward.__code__.co_filename)
    monkeypatch.setattr(MoELayer, "forward", slower)
    report = communication.measure(load_config(job, [f"{SHARD}=1"]), 1)
    assert report["ranks"][0]["waits_in"] == {"models.moe.layer.slower": 2} and not report["equal"]


def test_mistakes_are_told(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert communication.main([f"--job.config_file={job}", "--ranks", "2", f"{EXPERT}=4"]) == 2
    assert "expert_parallel_degree" in capsys.readouterr().err
    assert communication.main([f"--job.config_file={job}", f"{RECOMPUTE}.mode=memory_budget"]) == 2
    assert "the compiler chooses" in capsys.readouterr().err
    # What only the ranks themselves find out.
    assert communication.main([f"--job.config_file={job}", f"{SHARD}=4", f"{EXPERT}=4", *ONE]) == 2
    assert "6 experts cannot be dealt evenly to 4 ranks" in capsys.readouterr().err
    assert communication.main(["--ranks", "2", "--model.nonsense=1"]) == 2
    assert communication.main(["--help"]) == 0
    assert "--ranks" in capsys.readouterr().out


def test_a_rank_that_dies_is_told_with_its_messages(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(config: object) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(communication, "_count", die)
    with pytest.raises(RuntimeError, match=r"rank 0 ended with exit code 1:(.|\n)*no such luck"):
        communication.measure(load_config(job, [f"{SHARD}=1"]), 1)


def test_reading_values_is_seen_and_keeping_them_on_the_device_is_not() -> None:
    import torch

    x = torch.arange(4.0)
    with counting.counting() as counts:
        x[x > 1]  # one
        x[torch.tensor([0, 1])]
        x.tolist()  # two
        bool(x.sum() > 0)  # three
        x.nonzero()  # four
        torch.repeat_interleave(torch.tensor([1, 2]), output_size=3)
        torch.repeat_interleave(torch.tensor([1, 2]))  # five
        x[0] = 3.0
    assert sum(counts.waits.values()) == 5
    assert "tolist" not in vars(torch.Tensor)
