"""Jobs that train adapters only, through the whole program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import titanmoe.converters.apply  # noqa: F401 - before the ranks are forked
from tests.train.jobs import assert_close, assert_one_line, curve, run, tensors, train, write_job
from tests.train.test_resume import assert_resumed_exactly
from titanmoe.checkpoint.pretrained import save_pretrained, spec_of_hf_folder
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model, init_weights

LORA = ("--model.converters=lora", "--lora.rank=8")
SETTINGS = (*LORA, "--lora.use_dora", "--training.steps=5", "--training.local_batch_size=2")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without files of its weights."""
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def job_with_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with them."""
    folder = tmp_path_factory.mktemp("job")
    path = write_job(folder)
    write_base(folder / "model", seed=1)
    return path


def write_base(folder: Path, seed: int) -> None:
    model = build_model(spec_of_hf_folder(folder)[1], device="cpu")
    init_weights(model, seed)
    save_pretrained(model, folder, overwrite=True)


def losses(dump: Path) -> list[float]:
    return [loss for _, loss, _ in curve(dump)]


def test_only_adapters_learn(job: Path, tmp_path: Path) -> None:
    """Every adapter has moved, every expert's; nothing else has moved, nor has it state in the optimizer."""
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
        ("--parallelism.expert_parallel_degree=2", "--training.enable_cpu_offload"),
        ("--parallelism.pipeline_parallel_degree=2",),
        ("--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=1"),
    ],
    ids=("ep", "pp", "tp"),
)
def test_two_ranks_learn_what_one_does(flags: tuple[str, ...], one_rank: Path, job: Path, tmp_path: Path) -> None:
    run(job, tmp_path / "two", *SETTINGS, *flags, ranks=2)
    assert_close(tmp_path / "two", one_rank)


@pytest.fixture(scope="module")
def one_rank(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dump = tmp_path_factory.mktemp("one") / "dump"
    run(job, dump, *SETTINGS)
    return dump


@pytest.mark.parametrize("bases", [pytest.param("", marks=pytest.mark.slow), "quantize.frozen.float8,"])
def test_compiling_changes_nothing(bases: str, job: Path, tmp_path: Path) -> None:
    """With the compiler that users get: it has rules of its own for operators."""
    # With this rank, adapters of experts see tokens instead of rows.
    settings = (f"--model.converters={bases}lora", "--lora.rank=4", "--training.steps=3")
    run(job, tmp_path / "compiled", *settings, "--compile.enable")
    run(job, tmp_path / "plain", *settings)
    assert_close(tmp_path / "compiled", tmp_path / "plain")


def test_steps_hold_adapters_alone_and_resume_on_the_same_base(job_with_base: Path, tmp_path: Path) -> None:
    """Quantised experts dealt to two ranks, with dropout: bit for bit. With other weights below it is refused."""
    options = (
        *("--model.converters=quantize.frozen.nf4,lora", "--quantize.frozen.nf4.block_size=16", "--lora.rank=8"),
        *("--lora.use_dora", "--lora.dropout=0.2", "--activation_checkpoint.mode=full"),
        *("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.interval=1000"),
        *("--training.local_batch_size=2", "--parallelism.expert_parallel_degree=2"),
    )
    assert_resumed_exactly(job_with_base, tmp_path, 2, (*options, "--training.steps=12"), last=12)
    dump = tmp_path / "whole"
    found = tensors(dump, 12)
    names = {name.removeprefix("model.") for name in found if name.startswith("model.")}
    assert names and all(is_adapter(name) for name in names)
    assert {name for name in found if name.startswith("optimizer.")} == {
        f"optimizer.{name}.{state}" for name in names for state in ("step", "exp_avg", "exp_avg_sq")
    }
    base = json.loads((dump / "checkpoint" / "step-12" / "manifest.json").read_text())["base"]
    model = job_with_base.parent / "model"
    assert base["path"] == str(model) and len(base["checksum"]) == 64

    before = {path: path.read_bytes() for path in dump.rglob("*") if path.is_file()}
    write_base(model, seed=2)
    outcome = run(job_with_base, dump, *options, "--training.steps=14", ranks=2, code=2)
    assert_one_line(outcome.err[0], "holds other weights than those that the adapters were trained on")
    assert {path: path.read_bytes() for path in dump.rglob("*") if path.is_file()} == before
    write_base(model, seed=1)


def test_a_base_of_random_weights_is_in_the_steps(job: Path, tmp_path: Path) -> None:
    options = (*LORA, "--lora.dropout=0.2", "--checkpoint.enable", "--training.steps=12")
    assert_resumed_exactly(job, tmp_path, 1, options, last=12)
    assert any(not is_adapter(name) for name in tensors(tmp_path / "parts", 12) if name.startswith("model."))


def test_a_stage_without_adapters_is_refused(job: Path, tmp_path: Path) -> None:
    flags = (*LORA, "--lora.target_modules=layers.0", "--parallelism.pipeline_parallel_degree=2")
    dump = f"--job.dump_folder={tmp_path / 'out'}"
    outcome = train("--job.config_file", job, dump, *flags, "--training.local_batch_size=2", ranks=2)
    assert outcome.codes == [2, 2], outcome.told
    assert "no parameter" in outcome.told


def test_adapters_go_on_top_of_what_is_quantised(job: Path, tmp_path: Path) -> None:
    dump = f"--job.dump_folder={tmp_path / 'out'}"
    outcome = train("--job.config_file", job, dump, "--model.converters=lora,quantize.linear.mx")
    assert outcome.codes == [2]
    assert_one_line(outcome.err[0], '"quantize.linear.mx" comes after "lora"')
