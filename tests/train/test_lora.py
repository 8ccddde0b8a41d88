"""Jobs that train adapters only, through the whole program."""

from __future__ import annotations

from pathlib import Path

import pytest

import titanmoe.converters.apply  # noqa: F401 - before the ranks are forked
from tests.train.jobs import assert_close, assert_one_line, curve, run, tensors, train, write_job

LORA = ("--model.converters=lora", "--lora.rank=8")


def losses(dump: Path) -> list[float]:
    return [loss for _, loss, _ in curve(dump)]


def test_only_adapters_learn(tmp_path: Path) -> None:
    """Every adapter has moved, every expert's; nothing else has moved, nor has it state in the optimizer."""
    job = write_job(tmp_path)
    save = ("--checkpoint.enable", "--checkpoint.interval=1000", "--checkpoint.keep_latest_k=0")
    dump, fresh = tmp_path / "lora", tmp_path / "fresh"
    outcome = run(job, dump, *LORA, *save, "--training.steps=30", "--optimizer.lr=5e-2")
    told = "10 of 10 linear layers and groups of experts get LoRA of rank 8 (scale 4) and rank 4 (scale 4) in experts"
    assert told in outcome.told
    found = losses(dump)
    assert sum(found[-5:]) / 5 < found[0] - 0.2
    run(job, fresh, *LORA, *save, "--training.steps=1", "--optimizer.lr=1e-30")
    after, before = tensors(dump, 30), tensors(fresh, 1)
    with_state = {name.split(".", 1)[1].rpartition(".")[0] for name in after if name.startswith("optimizer.")}
    names = {name.removeprefix("model.") for name in after if name.startswith("model.")}
    assert {name for name in names if "lora_" in name} == with_state
    assert len(with_state) == 2 * (4 + 2) * 2
    for name in names:
        moved = after[f"model.{name}"] != before[f"model.{name}"]
        if "_lora_" in name:
            assert moved.flatten(1).any(1).all(), name
        else:
            assert moved.any() == ("lora_" in name), name


@pytest.mark.parametrize(
    "flags",
    [
        ("--parallelism.expert_parallel_degree=2",),
        ("--parallelism.pipeline_parallel_degree=2",),
        ("--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=1"),
    ],
    ids=("ep", "pp", "tp"),
)
def test_two_ranks_learn_what_one_does(flags: tuple[str, ...], tmp_path: Path) -> None:
    job = write_job(tmp_path)
    settings = (*LORA, "--lora.use_dora", "--training.steps=5", "--training.local_batch_size=2")
    run(job, tmp_path / "one", *settings)
    run(job, tmp_path / "two", *settings, *flags, ranks=2)
    assert_close(tmp_path / "two", tmp_path / "one")


def test_a_stage_without_adapters_is_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    flags = (*LORA, "--lora.target_modules=layers.0", "--parallelism.pipeline_parallel_degree=2")
    dump = f"--job.dump_folder={tmp_path / 'out'}"
    outcome = train("--job.config_file", job, dump, *flags, "--training.local_batch_size=2", ranks=2)
    assert outcome.codes == [2, 2], outcome.told
    assert "no parameter" in outcome.told


def test_adapters_go_on_top_of_what_is_quantised(tmp_path: Path) -> None:
    outcome = train("--job.config_file", write_job(tmp_path), "--model.converters=lora,quantize.linear.mx")
    assert outcome.codes == [2]
    assert_one_line(outcome.err[0], '"quantize.linear.mx" comes after "lora"')
