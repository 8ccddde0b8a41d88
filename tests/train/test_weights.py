"""The weights a run begins with, and those it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.train.jobs import (
    TINY,
    assert_close,
    assert_one_line,
    curve,
    run,
    saved_steps,
    signal_at,
    steps,
    tensors,
    write_job,
)
from titanmoe.data.loader import DataLoader
from titanmoe.data.packing import Batch
from titanmoe.data.sources import open_source
from titanmoe.data.tokenizer import load_tokenizer

SAVE = "--checkpoint.enable"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job, and where a run of 20 steps saved every fifth."""
    folder = tmp_path_factory.mktemp("finished")
    job = write_job(folder)
    run(job, folder / "dump", SAVE, "--training.steps=20", "--checkpoint.interval=5", "--checkpoint.keep_latest_k=0")
    return job, folder / "dump"


def model_of(dump: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors(dump, step).items() if name.startswith("model.")}


# Hugging Face


def batches(folder: Path) -> DataLoader:
    """What the job reads, one global batch after the other."""
    source, tokenizer = open_source("text", f"{folder}/data", "train"), load_tokenizer("builtin")
    return DataLoader(
        source, tokenizer, seq_len=32, lanes=range(4), num_lanes=4, local_batch_size=4, seed=0, shuffle=True
    )


def loss_of(folder: Path, batch: Batch) -> float:
    """The reference: transformers' logits and torch's cross-entropy."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_BSV = model(batch.tokens_BS).logits
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten()).item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_transformers_and_back(tmp_path: Path, ranks: int) -> None:
    job = write_job(tmp_path)
    torch.manual_seed(3)
    sizes = {key: value for key, value in TINY.items() if key != "architectures"}
    config = transformers.Qwen3MoeConfig(**sizes, initializer_range=0.2, rms_norm_eps=1e-6)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "hf")
    options = (
        SAVE,
        f"--model.hf_assets_path={tmp_path}/hf",
        "--checkpoint.initial_load_in_hf",
        f"--training.local_batch_size={4 // ranks}",
        "--lr_scheduler.total_steps=2",
    )
    run(job, tmp_path / "one", *options, "--training.steps=1", "--checkpoint.last_save_in_hf", ranks=ranks)
    run(job, tmp_path / "two", *options, "--training.steps=2", ranks=ranks)
    loader = batches(tmp_path)
    losses = [loss for _, loss, _ in curve(tmp_path / "two")]
    assert losses[0] == pytest.approx(loss_of(tmp_path / "hf", next(loader)), rel=1e-5)
    exported = tmp_path / "one" / "checkpoint" / "step-1-hf"
    assert losses[1] == pytest.approx(loss_of(exported, next(loader)), rel=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(exported).vocab_size > 0
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_last_save_can_be_the_weights_alone(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, dump = finished
    options = (SAVE, "--training.steps=20", "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16")
    run(job, tmp_path / "a", *options)
    found, expected = tensors(tmp_path / "a", 20), model_of(dump, 20)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.bfloat16()), name
    outcome = run(job, tmp_path / "b", *options, "--checkpoint.last_save_in_hf")
    assert [path.name for path in (tmp_path / "b" / "checkpoint").iterdir()] == ["step-20-hf"]
    assert "step-20-hf" in outcome.out[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "checkpoint" / "step-20-hf")
    assert model.dtype == torch.bfloat16


def test_an_export_that_finds_no_room(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """After training: exit code 1, and the checkpoint is there."""

    def arrange(rank: int) -> None:
        import shutil

        usage = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda path: usage._replace(free=10)

    options = (SAVE, "--training.steps=2", "--checkpoint.last_save_in_hf")
    outcome = run(finished[0], tmp_path / "dump", *options, before=arrange, code=1)
    assert_one_line(outcome.err[0], "too little space")
    assert saved_steps(tmp_path / "dump") == [2]
    assert [path.name for path in (tmp_path / "dump" / "checkpoint").iterdir()] == ["step-2"]


# Checkpoints


def test_begin_with_the_model_of_another_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, dump = finished
    options = (SAVE, "--training.steps=1", "--optimizer.lr=0", f"--checkpoint.initial_load_path={dump}/checkpoint")
    run(job, tmp_path / "newest", *options)
    run(job, tmp_path / "tenth", *options[:-1], f"{options[-1]}/step-10")
    for name, step in (("newest", 20), ("tenth", 10)):
        found, expected = model_of(tmp_path / name, 1), model_of(dump, step)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert list(steps(tmp_path / "tenth")) == [1]


def test_begin_with_the_whole_state_of_another_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, dump = finished
    options = (SAVE, "--training.steps=20", f"--checkpoint.initial_load_path={dump}/checkpoint/step-10")
    run(job, tmp_path / "dump", *options, "--checkpoint.no_initial_load_model_only")
    assert curve(tmp_path / "dump") == curve(dump)[10:]


def test_begin_with_a_seed_checkpoint(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    run(job, tmp_path / "plain", "--debug.seed=5")
    for ranks in (1, 2):
        dump = tmp_path / f"seeded-{ranks}"
        run(job, dump, SAVE, "--checkpoint.create_seed_checkpoint", "--debug.seed=5")
        assert saved_steps(dump) == [0] and not (dump / "metrics.jsonl").exists()
        outcome = run(job, dump, SAVE, "--debug.seed=5", f"--training.local_batch_size={4 // ranks}", ranks=ranks)
        assert "loaded the model from" in outcome.out[0] and "skipped" not in outcome.out[0]
        assert_close(dump, tmp_path / "plain")
    other = tmp_path / "other"
    run(job, other, SAVE, "--checkpoint.create_seed_checkpoint", "--debug.seed=6")
    run(job, other, SAVE, "--debug.seed=5")
    assert abs(curve(other)[0][1] - curve(tmp_path / "plain")[0][1]) > 1e-4
    outcome = run(job, other, SAVE, "--checkpoint.create_seed_checkpoint", "--debug.seed=5", code=2)
    assert "checkpoint of step 10 already" in outcome.err[0]


def test_parts_that_are_not_loaded(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, whole = finished
    for excluded, first in (("dataloader", 11), ("optimizer", 11), ("train_state", 1)):
        dump = tmp_path / excluded
        run(job, dump, SAVE, "--training.steps=20", before=signal_at(10), code=75)
        run(job, dump, SAVE, "--training.steps=20", f"--checkpoint.exclude_from_loading={excluded}")
        assert max(steps(dump)) == 20
        assert (steps(dump)[11]["loss"] == steps(whole)[11]["loss"]) == (excluded == "optimizer"), excluded
        assert steps(dump)[12]["loss"] != steps(whole)[12]["loss"]
        assert saved_steps(dump) == [10, 20] if first == 11 else [20]


def test_which_steps_are_kept(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, dump = finished
    assert saved_steps(dump) == [5, 10, 15, 20]
    options = (SAVE, "--checkpoint.interval=3", "--checkpoint.enable_first_step_checkpoint")
    run(job, tmp_path / "all", *options, "--checkpoint.keep_latest_k=0")
    assert saved_steps(tmp_path / "all") == [1, 3, 6, 9, 10]
    run(job, tmp_path / "two", *options, "--checkpoint.keep_latest_k=2")
    assert saved_steps(tmp_path / "two") == [9, 10]


def test_an_earlier_step_and_nothing_saved(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, dump = finished
    import shutil

    shutil.copytree(dump, tmp_path / "dump")
    outcome = run(
        job, tmp_path / "dump", SAVE, "--checkpoint.load_only", "--checkpoint.load_step=10", "--training.steps=20"
    )
    assert "newer ones exist" in outcome.out[0]
    assert saved_steps(tmp_path / "dump") == [5, 10, 15, 20]
    assert curve(tmp_path / "dump") == curve(dump)
