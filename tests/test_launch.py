"""The launcher, with small stand-ins in the place of titanmoe.train."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from titanmoe.config import ConfigError
from titanmoe.launch import USAGE, Layout, _count_gpus, launch, main, read_layout

CHECKOUT = Path(__file__).parents[1]


def no_gpus() -> int:
    return 0


class StandIn:
    """A module `job` that `python -m job` runs, and the environment to run it in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": f"{folder}:{CHECKOUT}"}

    def write(self, code: str) -> None:
        (self.folder / "job.py").write_text(
            "import os, pathlib, signal, sys, time\n"
            "rank = int(os.environ.get('RANK', 0))\n"
            f"folder = pathlib.Path({str(self.folder)!r})\n" + code
        )

    def run(
        self, code: str, num_local: int = 2, *, args: tuple[str, ...] = (), log_ranks: tuple[int, ...] = (0,)
    ) -> int:
        self.write(code)
        return launch("job", args, Layout(num_local, log_ranks=log_ranks), self.env, grace_seconds=0.5)

    def start(self, code: str, num_local: int = 2) -> subprocess.Popen[str]:
        """In a launcher process of its own, that signals can be sent to."""
        self.write(code)
        starter = (
            "import os, sys; from titanmoe.launch import Layout, launch\n"
            f"sys.exit(launch('job', [], Layout({num_local}), os.environ, grace_seconds=0.5))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", starter], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: all((self.folder / name).exists() for name in names))


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def job(tmp_path: Path) -> Iterator[StandIn]:
    yield StandIn(tmp_path)


# Exit codes


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((0, 75), 75),
        ((2, 2), 2),
        ((1, 1), 1),
        ((3, 0), 1),
        ((2, 1), 2),
    ],
)
def test_exit_code_of_the_ranks(job: StandIn, codes: tuple[int, int], expected: int) -> None:
    assert job.run(f"sys.exit({codes}[rank])") == expected


def test_a_failing_rank_ends_the_others(job: StandIn) -> None:
    started = time.monotonic()
    # Rank 0 hangs and does not heed SIGTERM, as in a collective that never returns.
    code = job.run("if rank: sys.exit(1)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    assert code == 1
    assert time.monotonic() - started < 10


def test_a_rank_that_the_launcher_ended_does_not_decide_the_exit_code(job: StandIn) -> None:
    """The others save on SIGTERM and end with 75, but the job failed."""
    code = job.run(
        "(folder / f'{rank}').touch()\n"
        "if rank == 0:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)\n"
        "while not (folder / '0').exists(): time.sleep(0.01)\n"
        "sys.exit(1)"
    )
    assert code == 1


def test_a_killed_rank_is_named(job: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)") == 1
    err = capfd.readouterr().err
    assert "rank 1 failed first: it was killed by SIGKILL" in err
    assert "out of memory" in err


# What the processes get


def test_ranks_get_their_places(job: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanmoe.launch._num_cores", lambda: 6)
    job.env.pop("OMP_NUM_THREADS", None)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS"
    code = job.run(
        f"places = [os.environ[name] for name in {names!r}.split()]\n"
        "(folder / f'{rank}.txt').write_text(' '.join([*places, str(sys.argv[1:])]))\n"
        "port = int(os.environ['MASTER_PORT'])",
        2,
        args=("--training.steps=3", "a b"),
    )
    assert code == 0
    arguments = "['--training.steps=3', 'a b']"
    assert (job.folder / "0.txt").read_text() == f"0 0 2 2 127.0.0.1 3 {arguments}"
    assert (job.folder / "1.txt").read_text() == f"1 1 2 2 127.0.0.1 3 {arguments}"


def test_more_ranks_than_cores_get_one_thread_each(job: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanmoe.launch._num_cores", lambda: 1)
    job.env.pop("OMP_NUM_THREADS", None)
    assert job.run("sys.exit(0 if os.environ['OMP_NUM_THREADS'] == '1' else 1)") == 0


def test_the_second_node_counts_on(job: StandIn) -> None:
    job.write("sys.exit(0 if (rank, os.environ['MASTER_PORT'], os.environ['WORLD_SIZE']) == (1, '29511', '2') else 1)")
    layout = Layout(1, num_nodes=2, node_rank=1, endpoint=("127.0.0.1", 29511))
    assert launch("job", [], layout, job.env, grace_seconds=0.5) == 0


def test_a_single_process_replaces_the_launcher(job: StandIn) -> None:
    job.env |= {"RANK": "3", "WORLD_SIZE": "8"}  # of an outer launcher
    launcher = job.start("print(os.getpid(), 'RANK' in os.environ, 'WORLD_SIZE' in os.environ); sys.exit(7)", 1)
    out, _ = launcher.communicate(timeout=20)
    assert out.split() == [str(launcher.pid), "False", "False"]
    assert launcher.returncode == 7


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on_and_saving_is_waited_for(job: StandIn, number: signal.Signals) -> None:
    launcher = job.start(
        "stop = []\n"
        f"signal.signal({int(number)}, lambda *_: stop.append(1))\n"
        "(folder / f'ready{rank}').touch()\n"
        "while not stop: time.sleep(0.01)\n"
        "time.sleep(1.5)\n"  # three times the grace that a failure gets
        "(folder / f'saved{rank}').touch(); sys.exit(75)"
    )
    job.wait_for("ready0", "ready1")
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == 75
    assert (job.folder / "saved0").exists() and (job.folder / "saved1").exists()


def test_a_signal_before_the_ranks_can_handle_it_means_run_again(job: StandIn) -> None:
    launcher = job.start("(folder / f'ready{rank}').touch(); time.sleep(60)")
    job.wait_for("ready0", "ready1")
    launcher.terminate()
    assert launcher.wait(timeout=20) == 75


def test_ranks_do_not_outlive_a_killed_launcher(job: StandIn) -> None:
    launcher = job.start(
        "(folder / f'part{rank}').write_text(str(os.getpid()))\n"
        "os.rename(folder / f'part{rank}', folder / f'pid{rank}'); time.sleep(60)"
    )
    job.wait_for("pid0", "pid1")
    pids = [int((job.folder / name).read_text()) for name in ("pid0", "pid1")]
    assert all(is_alive(pid) for pid in pids)
    launcher.kill()
    launcher.wait(timeout=20)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)


def test_signal_handlers_are_restored(job: StandIn) -> None:
    before = signal.getsignal(signal.SIGTERM)
    job.run("pass")
    assert signal.getsignal(signal.SIGTERM) is before


# Output


def test_only_the_logged_rank_is_shown(job: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("print('hello from', rank); print('note from', rank, file=sys.stderr)") == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("hello from 0\n", "note from 0\n")


def test_another_rank_can_be_shown(job: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("print('hello from', rank)", log_ranks=(1,)) == 0
    assert capfd.readouterr().out == "hello from 1\n"


def test_several_logged_ranks_are_prefixed(job: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("print('hello'); print('a note', file=sys.stderr)", 3, log_ranks=(0, 2)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["[rank 0] a note", "[rank 0] hello", "[rank 2] a note", "[rank 2] hello"]


def test_the_last_lines_of_an_unlogged_rank_that_fails_are_shown(
    job: StandIn, capfd: pytest.CaptureFixture[str]
) -> None:
    job.run("if rank == 0: time.sleep(0.3); sys.exit(0)\nfor i in range(500): print('line', i)\n1 / 0")
    err = capfd.readouterr().err
    assert "rank 1 failed first: it ended with exit code 1. Its last lines:" in err
    assert "[rank 1] line 499\n" in err
    assert "line 0\n" not in err  # only the end is kept
    assert err.endswith("[rank 1] ZeroDivisionError: division by zero\n")


def test_a_mistake_that_every_rank_finds_is_told_once(job: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("time.sleep(0.3 if rank == 0 else 0); print('error: no data', file=sys.stderr); sys.exit(2)") == 2
    assert capfd.readouterr().err == "error: no data\n"


def test_a_mistake_that_only_another_rank_finds_is_shown(job: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("if rank == 0: time.sleep(60)\nprint('error: no data', file=sys.stderr); sys.exit(2)") == 2
    assert "[rank 1] error: no data\n" in capfd.readouterr().err


# The environment


def test_defaults() -> None:
    assert read_layout({}, no_gpus) == Layout(1, 1, 0, None, (0,))
    assert read_layout({}, lambda: 8).world_size == 8
    assert read_layout({"NGPU": "", "LOG_RANK": " "}, no_gpus) == Layout(1)


def test_where_there_is_a_gpu_driver_torch_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr("titanmoe.launch._has_gpu", lambda: True)
    num_gpus = torch.cuda.device_count()
    assert _count_gpus() == num_gpus
    assert ("using the CPU" in capsys.readouterr().err) == (num_gpus == 0)


def test_several_nodes() -> None:
    env = {"NGPU": "4", "NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "[fe80::1]:29500", "LOG_RANK": "7, 0,0"}
    assert read_layout(env, no_gpus) == Layout(4, 2, 1, ("fe80::1", 29500), (0, 7))


@pytest.mark.parametrize(
    ("env", "names"),
    [
        ({"NGPU": "0"}, "NGPU"),
        ({"NGPU": "two"}, "NGPU"),
        ({"NGPU": "-1"}, "NGPU"),
        ({"NGPU": "1.0"}, "NGPU"),
        ({"NGPU": "²"}, "NGPU"),
        ({"NNODES": "0"}, "NNODES"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "RDZV_ENDPOINT"),
        ({"NNODES": "2", "NODE_RANK": "2", "RDZV_ENDPOINT": "a:1"}, "NODE_RANK"),
        ({"NODE_RANK": "1"}, "NODE_RANK"),
        ({"RDZV_ENDPOINT": "host"}, "RDZV_ENDPOINT"),
        ({"RDZV_ENDPOINT": ":29500"}, "RDZV_ENDPOINT"),
        ({"RDZV_ENDPOINT": "host:0"}, "RDZV_ENDPOINT"),
        ({"RDZV_ENDPOINT": "host:65536"}, "RDZV_ENDPOINT"),
        ({"LOG_RANK": "1"}, "LOG_RANK"),
        ({"LOG_RANK": "0,"}, "LOG_RANK"),
        ({"LOG_RANK": "all"}, "LOG_RANK"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
    ],
)
def test_bad_environment(env: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        read_layout(env, no_gpus)


def test_a_port_in_use_is_found_before_anything_starts(job: StandIn) -> None:
    job.write("(folder / 'started').touch()")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        layout = Layout(2, endpoint=("127.0.0.1", port))
        with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
            launch("job", [], layout, job.env)
    assert not (job.folder / "started").exists()


# The command


def run_command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "titanmoe.launch", *args]
    return subprocess.run(
        command,
        env={**os.environ, "NGPU": "1", **env},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "env", "told"),
    [
        (("--training.stepz=1",), {}, "training.steps"),
        (("--job.config_file", "no_such.toml"), {}, "no_such.toml"),
        ((), {"NGPU": "many"}, "NGPU"),
        (("--training.local_batch_size=2", "--training.global_batch_size=6"), {"NGPU": "2"}, "global_batch_size"),
    ],
)
def test_mistakes_end_with_2_and_one_message(args: tuple[str, ...], env: dict[str, str], told: str) -> None:
    done = run_command(*args, **env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == USAGE
    script = subprocess.run(
        [CHECKOUT / "run_train.sh", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert script.stdout == USAGE
