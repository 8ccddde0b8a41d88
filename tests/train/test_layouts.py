"""Every layout gives the losses and gradient norms of one process, through the whole program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.jobs import CHECKOUT, assert_close, curve, run, validations, write_job

SETTINGS = {
    "aux": ("--moe.aux_loss_coeff=0.02",),
    "bias": ("--moe.bias_update_rate=0.01",),
    "mask": ("--data.document_mask",),
}
VALIDATION = (
    "--validation.enable",
    "--validation.dataset=text",
    "--validation.seq_len=32",
    "--validation.local_batch_size=2",
    "--validation.freq=4",
)
EXPERT = "--parallelism.expert_parallel_degree"
CONTEXT = "--parallelism.context_parallel_degree"
TENSOR = "--parallelism.tensor_parallel_degree=2"
EXPERT_TENSOR = "--parallelism.expert_tensor_parallel_degree=2"
PIPELINE = "--parallelism.pipeline_parallel_degree=2"
REPLICATE = "--parallelism.data_parallel_replicate_degree=2"


@pytest.fixture(scope="module", params=SETTINGS)
def one_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple, Path]:
    """A job, its options, and where one process ran it."""
    folder = tmp_path_factory.mktemp(request.param)
    job = write_job(folder)
    options = (*SETTINGS[request.param], *VALIDATION, f"--validation.dataset_path={folder}/data/03.txt")
    run(job, folder / "one", *options)
    return job, options, folder / "one"


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, ("--training.local_batch_size=1",), id="accumulation 4"),
        pytest.param(2, ("--training.local_batch_size=2",), id="fsdp 2"),
        pytest.param(2, ("--training.local_batch_size=1",), id="fsdp 2, accumulation 2"),
        pytest.param(2, ("--training.local_batch_size=2", REPLICATE), id="replicate 2"),
        pytest.param(4, ("--training.local_batch_size=1",), id="fsdp 4"),
        pytest.param(4, ("--training.local_batch_size=1", REPLICATE), id="hsdp 2x2"),
        pytest.param(2, ("--training.local_batch_size=1", f"{EXPERT}=2"), id="ep 2, accumulation 2"),
        pytest.param(4, ("--training.local_batch_size=1", f"{EXPERT}=2"), id="fsdp 2 of experts, ep 2"),
        pytest.param(4, ("--training.local_batch_size=1", REPLICATE, f"{EXPERT}=2"), id="hsdp 2x2, ep 2"),
        pytest.param(2, ("--training.local_batch_size=2", f"{CONTEXT}=2"), id="cp 2, accumulation 2"),
        pytest.param(4, ("--training.local_batch_size=2", f"{CONTEXT}=2", f"{EXPERT}=4"), id="fsdp 2, cp 2, ep 4"),
        pytest.param(
            4, ("--training.local_batch_size=2", REPLICATE, f"{CONTEXT}=2", f"{EXPERT}=2"), id="replicate 2, cp 2, ep 2"
        ),
        pytest.param(2, ("--training.local_batch_size=2", TENSOR), id="tp 2, accumulation 2"),
        pytest.param(4, ("--training.local_batch_size=1", TENSOR, f"{EXPERT}=4"), id="fsdp 2, tp 2, ep 4"),
        pytest.param(
            4,
            ("--training.local_batch_size=2", REPLICATE, TENSOR, EXPERT_TENSOR),
            id="replicate 2, tp 2, etp 2",
        ),
        pytest.param(4, (PIPELINE, TENSOR, f"{EXPERT}=2"), id="pp 2, tp 2, ep 2"),
    ],
)
def test_a_layout_equals_one_process(
    one_process: tuple[Path, tuple, Path], ranks: int, layout: tuple[str, ...], tmp_path: Path
) -> None:
    job, options, expected = one_process
    run(job, tmp_path, *options, *layout, ranks=ranks)
    assert len(curve(tmp_path)) == 10
    assert_close(tmp_path, expected)
    found, wanted = validations(tmp_path), validations(expected)
    assert list(found) == list(wanted) == [0, 4, 8, 10]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_settings_matter(tmp_path: Path) -> None:
    """Or else the comparisons above would say nothing about them."""
    job = write_job(tmp_path)
    curves = {}
    for name, options in {"plain": (), **SETTINGS}.items():
        run(job, tmp_path / name, *options)
        curves[name] = [loss for _, loss, _ in curve(tmp_path / name)]
    for name in SETTINGS:
        assert abs(curves[name][-1] - curves["plain"][-1]) > 1e-5 * curves["plain"][-1], name


def test_the_loss_falls(one_process: tuple[Path, tuple, Path]) -> None:
    losses = [loss for _, loss, _ in curve(one_process[2])]
    assert losses[0] > 7.5 and losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_the_default_job_on_two_ranks_equals_one_process_over_a_hundred_steps(tmp_path: Path) -> None:
    """Any difference in the last bit of a gradient would be a percent of the loss by then."""
    job = CHECKOUT / "train_configs" / "debug_qwen3_moe.toml"
    options = ("--metrics.log_freq=1", "--validation.no_enable", "--training.steps=100")
    run(job, tmp_path / "one", *options, seconds=600)
    run(job, tmp_path / "two", *options, ranks=2, seconds=600)
    assert_close(tmp_path / "two", tmp_path / "one")
