from __future__ import annotations

import io

import pytest

from tests.metrics.streams import terminal
from titanmoe.metrics.console import RunInfo
from titanmoe.metrics.logger import build_metrics
from titanmoe.metrics.records import read_records

RUN = RunInfo("qwen3 tiny", 1000, 500, "CPU", 1, "none", 2, 8, 4, "text", "out")


def run(folder, rank=0, **options):
    stream = io.StringIO()
    metrics = build_metrics(folder, rank=rank, log_freq=2, terminal=terminal(stream), **options)
    metrics.start(RUN)
    for step in range(1, 5):
        metrics.progress(step)
        if metrics.due(step, 4):
            metrics.log(step, {"loss": 5.0 - step})
    metrics.log_validation(4, {"validation_loss": 1.5})
    metrics.finish(4, {"checkpoint": "none"})
    metrics.close()
    metrics.close()  # closing twice is allowed: an error path may
    return stream.getvalue()


def test_rank_0_writes_everything(tmp_path):
    text = run(tmp_path, tensorboard=True)
    records, damaged = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 4, 4] and not damaged
    assert records[-1] == {"step": 4, "validation_loss": 1.5}
    assert len(list((tmp_path / "tb").glob("events.*"))) == 1
    assert "2.1174" not in text and "1.5000  validation" in text
    assert f"report      {tmp_path / 'report.html'}" in text and (tmp_path / "report.html").is_file()


def test_other_ranks_write_nothing(tmp_path):
    assert run(tmp_path, rank=1, tensorboard=True, wandb=True) == ""
    assert not list(tmp_path.iterdir())


def test_every_rank_has_its_own_tensorboard_on_request(tmp_path):
    for rank in (0, 1):
        run(tmp_path, rank=rank, tensorboard=True, tensorboard_folder="curves", all_ranks=True)
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == ["rank_0", "rank_1"]


@pytest.mark.parametrize(("log_freq", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (10, [1, 7])])
def test_which_steps_are_logged(tmp_path, log_freq, expected):
    metrics = build_metrics(tmp_path, rank=1, log_freq=log_freq)
    assert [step for step in range(1, 8) if metrics.due(step, 7)] == expected


def test_resume_continues_the_same_file(tmp_path):
    run(tmp_path)
    metrics = build_metrics(tmp_path, rank=0, log_freq=1, resumed_step=2, terminal=terminal(io.StringIO()))
    metrics.log(3, {"loss": 9.0})
    metrics.close()
    records, _ = read_records(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 4.0), (2, 3.0), (3, 9.0)]
