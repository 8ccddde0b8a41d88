"""Pipelines through the whole program: the curve of one process, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.train.jobs import (
    TINY,
    assert_close,
    assert_one_line,
    curve,
    run,
    signal_at,
    steps,
    train,
    validations,
    write_job,
)

PIPELINE = "--parallelism.pipeline_parallel_"
DEEP = {**TINY, "num_hidden_layers": 4, "mlp_only_layers": [0, 1]}
"""With two ranks, one of them may have dense layers only."""
OPTIONS = (
    "--training.steps=3",
    "--data.document_mask",
    "--moe.aux_loss_coeff=0.02",
    "--moe.bias_update_rate=0.01",
    "--training.max_norm=1.0",
    "--validation.enable",
    "--validation.dataset=text",
    "--validation.seq_len=16",
    "--validation.local_batch_size=2",
    "--validation.freq=2",
)
SPLITS = torch.__version__ >= TorchVersion("2.13")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple, Path]:
    """A job, its options, and where one process ran it."""
    folder = tmp_path_factory.mktemp("pipeline")
    job = write_job(folder, DEEP)
    options = (*OPTIONS, f"--validation.dataset_path={folder}/data/03.txt")
    run(job, folder / "one", *options)
    return job, options, folder / "one"


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, (), id="1F1B"),
        pytest.param(
            2, (f"{PIPELINE}microbatch_size=2", "--activation_checkpoint.mode=full"), id="1F1B, 2 at once, recompute"
        ),
        pytest.param(
            2, ("--training.local_batch_size=2", f"{PIPELINE}schedule=Interleaved1F1B"), id="interleaved, accumulation"
        ),
        pytest.param(
            2,
            (f"{PIPELINE}schedule=ZBVZeroBubble",),
            id="zero bubble",
            marks=pytest.mark.skipif(not SPLITS, reason="this torch cannot run a backward pass in two parts"),
        ),
        pytest.param(4, ("--training.local_batch_size=2", "--parallelism.expert_parallel_degree=2"), id="fsdp 2, ep 2"),
    ],
)
def test_a_pipeline_equals_one_process(
    one_process: tuple[Path, tuple, Path], ranks: int, layout: tuple[str, ...], tmp_path: Path
) -> None:
    job, options, expected = one_process
    outcome = run(job, tmp_path, *options, f"{PIPELINE}degree=2", *layout, ranks=ranks)
    assert len(curve(tmp_path)) == 3
    assert_close(tmp_path, expected)
    found, wanted = validations(tmp_path), validations(expected)
    assert list(found) == list(wanted) == [0, 2, 3]
    assert found == pytest.approx(wanted, rel=1e-6)
    for step, record in steps(expected).items():
        for key in ("expert_load_cv", "expert_load_max_mean_worst", "dead_experts"):  # of the layers of all ranks
            assert steps(tmp_path)[step][key] == pytest.approx(record[key], rel=1e-6)
    assert "pipeline stage 0 on rank 0: embedding, layer" in outcome.told
    assert outcome.told.count("pipeline stage 1 on rank 1") == 1


def test_stages_of_the_users_own(one_process: tuple[Path, tuple, Path], tmp_path: Path) -> None:
    """Named modules, and an order from a file: both of one forward pass, then both of one backward pass."""
    job, options, expected = one_process
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n")
    toml = tmp_path / "job.toml"
    parts = '[["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "output"]]'
    toml.write_text(f'base = "{job}"\n[parallelism]\nmodule_fqns_per_model_part = {parts}\n')
    outcome = run(toml, tmp_path / "dump", *options, f"{PIPELINE}degree=2", f"{PIPELINE}schedule_csv={file}", ranks=2)
    assert "stage 1 on rank 1: layers 1 to 3, output" in outcome.told
    assert_close(tmp_path / "dump", expected)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ((f"{PIPELINE}schedule=1f1b",), 'Did you mean "1F1B"?'),
        ((f"{PIPELINE}schedule=Chimera",), "there are GPipe, 1F1B, LoopedBFS"),
        ((f"{PIPELINE}microbatch_size=3",), "4 is not a multiple of 3"),
        ((f"{PIPELINE}microbatch_size=4",), "1 * 4 / 4 = 1 microbatches"),
        (
            (f"{PIPELINE}schedule=DualPipeV", f"{PIPELINE}microbatch_size=2"),
            "at least 2 * pipeline_parallel_degree = 4",
        ),
        (
            ("--training.local_batch_size=5", "--training.global_batch_size=5", f"{PIPELINE}schedule=Interleaved1F1B"),
            "a multiple of pipeline_parallel_degree = 2",
        ),
        ((f"{PIPELINE}schedule=ZBVZeroBubble", "--activation_checkpoint.mode=full"), "would recompute it twice"),
        ((f"{PIPELINE}schedule=ZBVZeroBubble", "--compile.enable"), "compile.enable"),
        ((f"{PIPELINE}schedule_csv=/none.csv",), '"/none.csv" does not exist'),
        ((f"{PIPELINE}layers_per_stage=2",), "2 stages, not 3"),
        (
            (f"{PIPELINE}layers_per_stage=2", f"{PIPELINE}schedule=LoopedBFS"),
            "has a multiple of pipeline_parallel_degree",
        ),
        (
            (f"{PIPELINE}schedule=Interleaved1F1B", f"{PIPELINE}layers_per_stage=1"),
            "4 layers cannot be dealt to 6 stages",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    one_process: tuple[Path, tuple, Path], options: tuple[str, ...], names: str, tmp_path: Path
) -> None:
    job = one_process[0]
    args = (f"--job.config_file={job}", f"--job.dump_folder={tmp_path}/dump", f"{PIPELINE}degree=2")
    outcome = train(*args, *options, ranks=2)
    assert outcome.codes == [2, 2], outcome.told
    assert_one_line(outcome.err[0], names)
    assert not (tmp_path / "dump").exists()


def test_a_tied_embedding_resumes_exactly_and_as_one_process(tmp_path: Path) -> None:
    job = write_job(tmp_path, {**DEEP, "tie_word_embeddings": True})
    options = (*OPTIONS, f"--validation.dataset_path={tmp_path}/data/03.txt", "--checkpoint.enable")
    pipelined = (*options, f"{PIPELINE}degree=2")
    run(job, tmp_path / "one", *options)
    run(job, tmp_path / "whole", *pipelined, ranks=2)
    run(job, tmp_path / "resumed", *pipelined, ranks=2, before=signal_at(2), code=75)
    shutil.copytree(tmp_path / "resumed", tmp_path / "alone")
    run(job, tmp_path / "resumed", *pipelined, ranks=2)
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    run(job, tmp_path / "alone", *options)
    for name in ("whole", "alone"):
        assert_close(tmp_path / name, tmp_path / "one")


def test_a_pipeline_resumes_exactly_and_as_one_process(one_process: tuple[Path, tuple, Path], tmp_path: Path) -> None:
    job, options, expected = one_process
    options = (*options, "--checkpoint.enable", f"{PIPELINE}degree=2")
    run(job, tmp_path, *options, ranks=2, before=signal_at(2), code=75)
    shutil.copytree(tmp_path, tmp_path / "alone")
    run(job, tmp_path, *options, ranks=2)
    assert_close(tmp_path, expected)
    run(job, tmp_path / "alone", *options, f"{PIPELINE}degree=1")
    assert_close(tmp_path / "alone", expected)


def test_gradients_that_are_not_finite_are_those_of_all_stages(
    one_process: tuple[Path, tuple, Path], tmp_path: Path
) -> None:
    job, options, _ = one_process

    def poison(rank: int) -> None:
        from titanmoe.trainer import Trainer

        take_step = Trainer._train_step

        def poisoned(self: Trainer) -> bool:
            if self.step == 1 and self.model.norm is not None:
                with torch.no_grad():
                    self.model.norm.weight.fill_(float("nan"))
            return take_step(self)

        Trainer._train_step = poisoned  # type: ignore[method-assign]

    outcome = run(job, tmp_path, *options, f"{PIPELINE}degree=2", ranks=2, before=poison, code=1)
    for err in outcome.err:  # two ends, a norm, and eleven parameters of each of four layers
        assert err.startswith("error: step 2 was not taken: its loss is nan") and " 47 parameters " in err, err
