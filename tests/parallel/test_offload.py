"""Parameters, gradients and optimizer state in host memory: another place, and the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.kinds import KINDS
from tests.parallel.layouts import Layout, compare
from tests.train.jobs import assert_close, curve, run, write_job
from titanmoe.models.build import build_model, materialize
from titanmoe.parallel.host_memory import move_buffers

OFFLOAD = "--training.enable_cpu_offload"


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("grouped-query", Layout(offload=True)),
        ("latent", Layout(offload=True, dp_shard=2, recompute="moe")),
        ("sinks and windows", Layout(offload=True, dp_shard=2, ep=2, recompute="full")),
        ("chunks and temperature", Layout(offload=True, dp_replicate=2, recompute="selective")),
        ("grouped-query", Layout(offload=True, tp=2, reshard="always")),
    ],
    ids=str,
)
def test_a_layout_equals_one_process(kind: str, layout: Layout) -> None:
    errors = compare(KINDS[kind], layout)
    assert errors.largest < 1e-5, errors


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job that clips its gradients, and where one process ran it without offloading."""
    folder = tmp_path_factory.mktemp("plain")
    job = write_job(folder)
    run(job, folder / "dump", "--training.max_norm=0.1")
    return job, folder / "dump"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((1, ("--training.local_batch_size=2",)), id="one process, accumulation 2"),
        pytest.param((2, ("--training.local_batch_size=1", "--parallelism.expert_parallel_degree=2")), id="ep 2"),
    ],
)
def test_a_job_and_its_resumption(
    plain: tuple[Path, Path], options: tuple[int, tuple[str, ...]], tmp_path: Path
) -> None:
    ranks, layout = options
    saving = ("--checkpoint.enable", "--checkpoint.interval=5", "--training.max_norm=0.1", OFFLOAD, *layout)
    run(plain[0], tmp_path / "whole", *saving, ranks=ranks)
    assert_close(tmp_path / "whole", plain[1])
    run(plain[0], tmp_path / "resumed", *saving, "--training.steps=5", "--lr_scheduler.total_steps=10", ranks=ranks)
    run(plain[0], tmp_path / "resumed", *saving, "--lr_scheduler.total_steps=10", ranks=ranks)
    assert curve(tmp_path / "resumed")[5:] == curve(tmp_path / "whole")[5:]


def test_only_buffers_move() -> None:
    model = build_model(KINDS["latent"])
    materialize(model, "cpu")
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
