"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.jobs import (
    assert_close,
    assert_same_tensors,
    curve,
    run,
    saved_steps,
    signal_at,
    steps,
    tensors,
    validations,
    write_job,
)

SAVE = ("--checkpoint.enable", "--training.steps=20")
REPLICATE = "--parallelism.data_parallel_replicate_degree=2"
CONTEXT = "--parallelism.context_parallel_degree=2"
EXPERT = "--parallelism.expert_parallel_degree=2"
EXPERT_4 = "--parallelism.expert_parallel_degree=4"
TENSOR = "--parallelism.tensor_parallel_degree=2"
EXPERT_TENSOR = "--parallelism.expert_tensor_parallel_degree=2"
PIPELINE = "--parallelism.pipeline_parallel_degree=2"
BF16 = "--training.mixed_precision_param=bfloat16"

CASES = {
    "one rank": (1, ()),
    "fsdp 2": (2, ("--training.local_batch_size=2",)),
    "hsdp 2x2": (4, ("--training.local_batch_size=1", REPLICATE)),
    "fsdp 2, async": (
        2,
        ("--training.local_batch_size=1", "--checkpoint.async_mode=async", "--checkpoint.interval=3"),
    ),
    "AdamW8bit": (1, ("--optimizer.name=AdamW8bit",)),
    "fsdp 2, AdamW8bit": (2, ("--optimizer.name=AdamW8bit", "--training.local_batch_size=2")),
    "bfloat16": (1, ("--training.dtype=bfloat16", BF16, "--training.local_batch_size=2")),
    "float32 masters": (1, (BF16,)),
    "prefetching": (
        1,
        ("--training.dataloader.num_workers=2", "--training.dataloader.prefetch_factor=3", "--data.document_mask"),
    ),
    "activation checkpoint": (1, ("--activation_checkpoint.mode=selective", "--activation_checkpoint.early_stop")),
    "ep 2 of 4, bias update": (4, ("--training.local_batch_size=1", EXPERT, "--moe.bias_update_rate=0.01")),
    "hsdp 2x2, ep 2, async, AdamW8bit": (
        4,
        (
            "--training.local_batch_size=1",
            REPLICATE,
            EXPERT,
            "--checkpoint.async_mode=async",
            "--optimizer.name=AdamW8bit",
        ),
    ),
    "cp 2, bias update": (2, (CONTEXT, "--moe.bias_update_rate=0.01", "--data.document_mask")),
    "fsdp 2, cp 2, ep 2": (4, ("--training.local_batch_size=2", CONTEXT, EXPERT)),
    "ep 2, bfloat16 compute": (2, ("--training.local_batch_size=2", EXPERT, BF16)),
    "tp 2, ep 2": (2, (TENSOR, EXPERT, "--moe.bias_update_rate=0.01")),
    "fsdp 2, tp 2, etp 2, async, AdamW8bit": (
        4,
        (
            "--training.local_batch_size=2",
            TENSOR,
            EXPERT_TENSOR,
            "--checkpoint.async_mode=async",
            "--optimizer.name=AdamW8bit",
        ),
    ),
    "pp 2, fsdp 2, ep 2": (4, ("--training.local_batch_size=2", PIPELINE, EXPERT, "--moe.bias_update_rate=0.01")),
    "pp 2, tp 2, bfloat16 compute": (4, (PIPELINE, TENSOR, BF16)),
    "bias update": (1, ("--moe.bias_update_rate=0.01", "--moe.aux_loss_coeff=0.01")),
    "compiled": (1, ("--compile.enable", "--compile.backend=aot_eager")),
}


def assert_resumed_exactly(job: Path, folder: Path, ranks: int, options: tuple[str, ...], last: int) -> None:
    whole, parts = folder / "whole", folder / "parts"
    run(job, whole, *options, ranks=ranks)
    run(job, parts, *options, ranks=ranks, before=signal_at(10, rank=ranks - 1), code=75)
    assert list(steps(parts)) == list(range(1, 11))
    assert 10 in saved_steps(parts)
    outcome = run(job, parts, *options, ranks=ranks)
    assert f"resumed from {parts}/checkpoint/step-10" in outcome.out[0]
    assert "the config differs" not in outcome.out[0]
    assert len(curve(whole)) == last and curve(parts) == curve(whole)
    assert_same_tensors(parts, whole, last)
    states = [json.loads((dump / "checkpoint" / f"step-{last}" / "state.json").read_text()) for dump in (whole, parts)]
    assert states[0] == states[1]  # the position in the data, the counters, all random numbers


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_for_bit(case: str, tmp_path: Path) -> None:
    ranks, options = CASES[case]
    assert_resumed_exactly(write_job(tmp_path), tmp_path, ranks, (*SAVE, *options), last=20)


def test_epochs_resume_bit_for_bit(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    options = ("--checkpoint.enable", "--training.epochs=1.5")
    run(job, tmp_path / "count", *options)
    last = max(steps(tmp_path / "count"))
    assert last > 12, "the data must last longer than the first part of the run"
    assert_resumed_exactly(job, tmp_path, 1, options, last)


def test_the_checkpoint_holds_what_the_cases_say(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    run(job, tmp_path / "a", *SAVE, "--training.steps=2", "--training.dtype=bfloat16", BF16)
    kinds = {name: str(tensor.dtype) for name, tensor in tensors(tmp_path / "a", 2).items()}
    assert kinds["model.norm.weight"] == kinds["optimizer.norm.weight.exp_avg"] == "torch.bfloat16"
    run(job, tmp_path / "b", *SAVE, "--training.steps=2", BF16, "--moe.bias_update_rate=0.01")
    found = tensors(tmp_path / "b", 2)
    assert str(found["model.norm.weight"].dtype) == "torch.float32"
    assert found["model.layers.1.moe.router.expert_bias"].abs().max() > 0


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2,), (1,)),
        ((1,), (2,)),
        ((4,), (2,)),
        ((4, EXPERT), (1,)),
        ((2, EXPERT), (4, REPLICATE)),
        ((2,), (4, EXPERT_4)),
        ((4, CONTEXT, EXPERT), (2,)),
        ((4, EXPERT_4), (4, PIPELINE, TENSOR)),
        ((4, PIPELINE, TENSOR, EXPERT), (1,)),
        ((2, TENSOR, EXPERT_TENSOR), (2, PIPELINE)),
        ((4, PIPELINE, EXPERT), (4, TENSOR, EXPERT_4)),
    ],
)
def test_resume_on_another_layout(first: tuple, then: tuple, tmp_path: Path) -> None:
    """The number of ranks, and options, before and after."""
    job = write_job(tmp_path)
    shared = {CONTEXT, TENSOR, PIPELINE}  # of two ranks that read the same sequences
    run(job, tmp_path / "whole", *SAVE)
    before, after = (
        (f"--training.local_batch_size={4 // ranks * 2 ** len(shared.intersection(options))}", *options)
        for ranks, *options in (first, then)
    )
    run(job, tmp_path / "parts", *SAVE, *before, ranks=first[0], before=signal_at(10), code=75)
    run(job, tmp_path / "parts", *SAVE, *after, ranks=then[0])
    assert_close(tmp_path / "parts", tmp_path / "whole")


def test_validation_is_recorded_once_per_step(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    options = (*SAVE, "--validation.enable", "--validation.dataset=text", "--validation.seq_len=32")
    options += (f"--validation.dataset_path={tmp_path}/data/02.txt", "--validation.freq=5")
    run(job, tmp_path / "whole", *options)
    run(job, tmp_path / "parts", *options, before=signal_at(12), code=75)
    run(job, tmp_path / "parts", *options)
    assert list(validations(tmp_path / "whole")) == [0, 5, 10, 15, 20]
    assert validations(tmp_path / "parts") == validations(tmp_path / "whole")


def test_a_changed_setting_is_named(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    run(job, tmp_path / "run", "--checkpoint.enable", "--training.steps=3")
    same = run(job, tmp_path / "run", "--checkpoint.enable", "--training.steps=4", "--job.description=longer")
    assert "the config differs" not in same.out[0] and "changed since" not in same.out[0]
    other = run(job, tmp_path / "run", "--checkpoint.enable", "--training.steps=5", "--optimizer.lr=0.001")
    assert "the config differs from the one that step 4 was saved under" in other.out[0]
    assert "changed since the last run: optimizer.lr: 0.01 -> 0.001" in other.out[0]
    assert list(steps(tmp_path / "run")) == [1, 2, 3, 4, 5]
