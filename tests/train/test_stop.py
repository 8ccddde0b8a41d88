"""Being told to stop: all ranks save the same step and end with 75, and the next run goes on as if nothing was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.jobs import (
    assert_same_tensors,
    curve,
    launch,
    run,
    saved_steps,
    signal_at,
    steps,
    validations,
    wait_until,
    write_job,
)

TWO = ("--checkpoint.enable", "--training.local_batch_size=2")
VALIDATION = ("--validation.enable", "--validation.dataset=text", "--validation.seq_len=32", "--validation.freq=4")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job, and where two ranks ran it."""
    folder = tmp_path_factory.mktemp("stop")
    job = write_job(folder)
    run(job, folder / "whole", *TWO, ranks=2)
    return job, folder / "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_any_rank_stops_all(
    uninterrupted: tuple[Path, Path], tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    job, whole = uninterrupted
    outcome = run(job, tmp_path, *TWO, ranks=2, before=signal_at(5, rank, number), code=75)
    assert "stopped at step 5" in outcome.out[0]
    assert outcome.err == ["", ""]
    assert saved_steps(tmp_path) == [5]
    run(job, tmp_path, *TWO, ranks=2)
    assert curve(tmp_path) == curve(whole)
    assert_same_tensors(tmp_path, whole, 10)


def test_without_checkpoints_stopping_is_a_failure(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = run(uninterrupted[0], tmp_path, before=signal_at(3), code=1)
    assert outcome.err[0].startswith(
        "error: told to stop after step 3, and nothing was saved: checkpoint.enable is off"
    )
    assert outcome.err[0].count("\n") == 1


def test_a_second_ctrl_c_a_while_later_interrupts(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    def arrange(rank: int) -> None:
        from titanmoe.training.step import PlainStep

        accumulate, calls = PlainStep.accumulate, []

        def slowly(*args: object) -> object:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(2.1)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            return accumulate(*args)

        PlainStep.accumulate = slowly  # type: ignore[method-assign]

    outcome = run(uninterrupted[0], tmp_path, "--checkpoint.enable", before=arrange, code=1)
    assert outcome.err[0].startswith("error: interrupted") and "Traceback" not in outcome.err[0]


def signal_in(module: str, name: str) -> Callable[[int], None]:
    """For `before`: a rank gets SIGTERM when it calls this function."""

    def arrange(rank: int) -> None:
        import importlib

        place = importlib.import_module(module)
        function = getattr(place, name)

        def signalled(*args: object, **kwargs: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **kwargs)

        setattr(place, name, signalled)

    return arrange


def test_stop_while_starting_up(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    """No step is taken, as none was asked for; the next run begins."""
    job, whole = uninterrupted
    run(job, tmp_path, *TWO, ranks=2, before=signal_in("titanmoe.trainer.build", "build_model"), code=75)
    assert steps(tmp_path) == {} and saved_steps(tmp_path) == []
    run(job, tmp_path, *TWO, ranks=2)
    assert curve(tmp_path) == curve(whole)


def test_stop_while_resuming_saves_nothing_anew(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    job, whole = uninterrupted
    run(job, tmp_path, *TWO, ranks=2, before=signal_at(5), code=75)
    manifest = tmp_path / "checkpoint" / "step-5" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    run(job, tmp_path, *TWO, ranks=2, before=signal_in("titanmoe.trainer.build", "build_model"), code=75)
    assert manifest.stat().st_mtime_ns == written
    run(job, tmp_path, *TWO, ranks=2)
    assert curve(tmp_path) == curve(whole)


def test_stop_during_validation(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    """The validation is given up at once; after the first step that was taken, the step is saved."""
    job, whole = uninterrupted
    options = (*TWO, *VALIDATION, f"--validation.dataset_path={job.parent}/data")

    def arrange(rank: int) -> None:
        import titanmoe.trainer.run as place

        evaluate = place.evaluate

        def signalled(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == 2 and rank == 1:  # the first is the one before step 1
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        calls: list[int] = []
        place.evaluate = signalled

    run(job, tmp_path, *options, ranks=2, before=arrange, code=75)
    assert list(validations(tmp_path)) == [0]
    assert saved_steps(tmp_path) == [4]
    run(job, tmp_path, *options, ranks=2)
    assert curve(tmp_path) == curve(whole)


def test_stop_while_a_save_is_in_flight(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    job, whole = uninterrupted

    def arrange(rank: int) -> None:
        from titanmoe.checkpoint.checkpointer import Checkpointer

        write = Checkpointer._write_once

        def slowly(self: Checkpointer, *args: object) -> int:
            time.sleep(0.3)
            return write(self, *args)  # type: ignore[arg-type]

        Checkpointer._write_once = slowly  # type: ignore[method-assign]
        signal_at(5, rank=1)(rank)

    options = (*TWO, "--checkpoint.async_mode=async", "--checkpoint.interval=4")
    run(job, tmp_path, *options, ranks=2, before=arrange, code=75)
    assert saved_steps(tmp_path) == [4, 5]
    run(job, tmp_path, *options, ranks=2)
    assert curve(tmp_path) == curve(whole)


# Through the real launcher

LONG = ("--checkpoint.enable", "--training.steps=120", "--lr_scheduler.total_steps=120")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("long")
    job = write_job(folder)
    run(job, folder / "whole", *LONG, "--training.local_batch_size=2", ranks=2)
    return job, folder / "whole"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def has_steps(dump: Path, number: int) -> Callable[[], bool]:
    path = dump / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= number


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(job: Path, dump: Path) -> subprocess.Popen[str]:
    options = (f"--job.config_file={job}", f"--job.dump_folder={dump}", "--training.local_batch_size=2")
    return launch(*options, *LONG, ranks=2)


@pytest.mark.parametrize("target", ["launcher", "one rank"])
def test_stop_through_the_launcher(long_run: tuple[Path, Path], tmp_path: Path, target: str) -> None:
    job, whole = long_run
    process = start(job, tmp_path)
    wait_until(has_steps(tmp_path, 10))
    os.kill(process.pid if target == "launcher" else children(process.pid)[1], signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (75, ""), out + err
    (saved,) = saved_steps(tmp_path)
    assert max(steps(tmp_path)) == saved < 120
    code, out, err = finish(start(job, tmp_path))
    assert code == 0, out + err
    assert curve(tmp_path) == curve(whole)


def test_ctrl_c_on_the_process_group_of_a_single_rank(tmp_path: Path) -> None:
    """The terminal may deliver one keystroke twice."""
    job = write_job(tmp_path)
    dump = tmp_path / "run"
    process = launch(f"--job.config_file={job}", f"--job.dump_folder={dump}", *LONG)
    wait_until(has_steps(dump, 5))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (75, ""), out + err
    assert saved_steps(dump) == [max(steps(dump))]


def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    process = start(job, tmp_path / "run")
    wait_until(has_steps(tmp_path / "run", 5))
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    code, _, err = finish(process)
    assert code == 1
    assert "rank 1 failed first: it was killed by SIGKILL" in err
    assert time.monotonic() - started < 20
    assert not any(map(is_alive, ranks))
