"""kill -9 at any moment: the next run resumes from a whole checkpoint, and in the end nothing can be told from it."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.train.jobs import Ranks, assert_same_tensors, curve, run, saved_steps, write_job

LAST = 40
OPTIONS = (
    f"--training.steps={LAST}",
    "--checkpoint.enable",
    "--checkpoint.interval=1",
    "--checkpoint.keep_latest_k=2",
)


def newest(dump: Path) -> int:
    return max(saved_steps(dump), default=0)


def kill_and_resume(job: Path, folder: Path, ranks: int, mode: str, num_kills: int) -> None:
    options = (*OPTIONS, f"--checkpoint.async_mode={mode}", f"--training.local_batch_size={4 // ranks}")
    run(job, folder / "whole", *options, ranks=ranks)
    dump = folder / "killed"
    moments = random.Random(f"{ranks} {mode}")
    for number in range(num_kills):
        before = newest(dump)
        running = Ranks([f"--job.config_file={job}", f"--job.dump_folder={dump}", *options], ranks)
        deadline = time.monotonic() + 60
        while newest(dump) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.12))
        for rank in moments.sample(range(ranks), ranks):
            running.signal(signal.SIGKILL, rank)
        outcome = running.wait()
        assert outcome.codes == [-signal.SIGKILL] * ranks, f"kill {number}: {outcome.told}"
        assert f"resumed from {dump}/checkpoint/step-{before}" in outcome.out[0] or before == 0, outcome.told
        assert before < newest(dump) < LAST, "the run must be killed on its way"
    outcome = run(job, dump, *options, ranks=ranks)
    assert "resumed from" in outcome.out[0]
    assert curve(dump) == curve(folder / "whole")
    assert_same_tensors(dump, folder / "whole", LAST)
    leftovers = [path.name for path in (dump / "checkpoint").iterdir() if not path.name[5:].isdigit()]
    assert leftovers == []


@pytest.mark.parametrize(("ranks", "mode"), [(1, "disabled"), (2, "async")])
def test_killed_three_times(ranks: int, mode: str, tmp_path: Path) -> None:
    kill_and_resume(write_job(tmp_path), tmp_path, ranks, mode, num_kills=3)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mode"), [(1, "disabled"), (1, "async"), (2, "disabled"), (2, "async")])
def test_killed_ten_times(ranks: int, mode: str, tmp_path: Path) -> None:
    kill_and_resume(write_job(tmp_path), tmp_path, ranks, mode, num_kills=10)
