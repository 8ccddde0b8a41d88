"""Start one training process per device: `python -m titanmoe.launch [--section.key=value ...]`.

The launcher checks the environment and the config before anything is started, so that a mistake costs a fraction of a
second, and it ends with an exit code that a scheduler understands: 0 done, 2 the user's mistake, 75 told to stop and
saved (run me again), 1 anything else. It imports no torch. `torchrun -m titanmoe.train` works as well; the launcher
adds the early check, the exit codes, and output that stays readable.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from titanmoe.config import ConfigError, resolve, validate, wants_help

USAGE = """\
usage: [NAME=value ...] ./run_train.sh [--job.config_file FILE] [--section.key=value ...]
       [NAME=value ...] python -m titanmoe.launch --job.config_file FILE [--section.key=value ...]

Trains the job that FILE describes, with one process per device.

environment:
  NGPU           processes on this node (default: its number of GPUs, or 1 on the CPU)
  NNODES         number of nodes (default: 1)
  NODE_RANK      which of them this is, from 0 (needed if NNODES is more than 1)
  RDZV_ENDPOINT  HOST:PORT on node 0, where the processes meet (needed if NNODES is more than 1)
  LOG_RANK       ranks whose output is shown, comma-separated (default: 0)
  CONFIG_FILE    run_train.sh only: the config file when --job.config_file is not given

exit codes:
  0 done   2 a mistake in what was given   75 told to stop, saved: run again to go on   1 anything else

`titanmoe config --help` lists every key; `titanmoe config --job.config_file FILE` prints the whole resolved config.
"""

EXIT_MISTAKE, EXIT_STOPPED = 2, 75

_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.05
_TAIL_LINES = 100
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class Layout:
    """Which processes run where, as the environment asks for it."""

    num_local: int
    num_nodes: int = 1
    node_rank: int = 0
    endpoint: tuple[str, int] | None = None
    log_ranks: tuple[int, ...] = (0,)

    @property
    def world_size(self) -> int:
        return self.num_local * self.num_nodes


def main(argv: Sequence[str] | None = None) -> int:
    """Check the config and the environment, then train; return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if wants_help(args):
        sys.stdout.write(USAGE)
        return 0
    try:
        config = resolve(args).config  # what is notable about it is told by the job itself
        layout = read_layout(os.environ, _count_gpus)
        validate(config, layout.world_size)
        return launch("titanmoe.train", args, layout, os.environ)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_MISTAKE


def read_layout(env: Mapping[str, str], count_gpus: Callable[[], int]) -> Layout:
    """Read NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT and LOG_RANK.

    Args:
        env: the environment.
        count_gpus: how to count this node's GPUs, asked only if NGPU is not set.

    Raises:
        ConfigError: a value is not what it must be, or one that several nodes need is missing.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        raise ConfigError(
            "the launcher was itself started by torchrun",
            mend="start `torchrun ... -m titanmoe.train`, or `python -m titanmoe.launch` without torchrun.",
        )
    num_local = _integer(env, "NGPU", least=1)
    num_nodes = _integer(env, "NNODES", least=1) or 1
    node_rank = _integer(env, "NODE_RANK", least=0)
    endpoint = _endpoint(env.get("RDZV_ENDPOINT", ""))
    if num_nodes > 1 and (node_rank is None or endpoint is None):
        missing = "NODE_RANK" if node_rank is None else "RDZV_ENDPOINT"
        raise ConfigError(
            f"NNODES={num_nodes} needs it, and it is not set",
            where=missing,
            mend="give every node its NODE_RANK (0, 1, ...), and all the same RDZV_ENDPOINT=HOST:PORT on node 0.",
        )
    if node_rank is not None and node_rank >= num_nodes:
        raise ConfigError(f"{node_rank} is not below NNODES={num_nodes}", where="NODE_RANK", mend="nodes count from 0.")
    num_local = num_local or max(1, count_gpus())
    return Layout(num_local, num_nodes, node_rank or 0, endpoint, _log_ranks(env, num_local * num_nodes))


def launch(
    module: str, args: Sequence[str], layout: Layout, env: Mapping[str, str], *, grace_seconds: float = 5.0
) -> int:
    """Run `python -m module args` once per local device; return the exit code for the whole node.

    A single process replaces the launcher, so a terminal and its signals are the process's own, and this function does
    not return. Several are supervised: SIGTERM, SIGINT and SIGUSR1 are passed on, and when one fails the others get
    `grace_seconds` to end, as many again after a SIGTERM, and then a SIGKILL.

    Raises:
        ConfigError: the port of RDZV_ENDPOINT cannot be used on node 0.
    """
    command = [sys.executable, "-m", module, *args]
    shared_env = _shared_env(layout, env)
    if layout.world_size == 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, command, shared_env)
    address, port = _meeting_point(layout)
    shared_env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(layout.world_size)}
    ranks: list[_Rank] = []
    with _recorded_signals() as received:
        try:
            for local_rank in range(layout.num_local):
                ranks.append(_start(command, layout, local_rank, shared_env))
            for rank in ranks:
                rank.start_reading()
            return _supervise(ranks, received, grace_seconds)
        finally:
            for rank in ranks:
                rank.process.kill()


# What the environment says


def _integer(env: Mapping[str, str], name: str, *, least: int) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ConfigError(f"{text!r} is not a whole number from {least} up", where=name)
    return int(text)


def _endpoint(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not host or not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{text!r} is not HOST:PORT", where="RDZV_ENDPOINT", mend="for example node0:29500.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _log_ranks(env: Mapping[str, str], world_size: int) -> tuple[int, ...]:
    text = env.get("LOG_RANK", "").strip() or "0"
    ranks = [item.strip() for item in text.split(",")]
    if not all(rank.isascii() and rank.isdigit() and int(rank) < world_size for rank in ranks):
        raise ConfigError(
            f"{text!r} is not a list of ranks", where="LOG_RANK", mend=f"ranks here go from 0 to {world_size - 1}."
        )
    return tuple(sorted({int(rank) for rank in ranks}))


def _has_nvidia() -> bool:
    return Path("/dev/nvidiactl").exists()


def _has_gpu() -> bool:
    return _has_nvidia() or Path("/dev/kfd").exists()


def _count_gpus() -> int:
    """Ask torch, in a process of its own, and only where there is a GPU driver to ask about."""
    if not _has_gpu():
        return 0
    question = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(question, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"torch could not count the GPUs; set NGPU to go on without asking it\n{answer.stderr}")
    num_gpus = int(answer.stdout.split()[-1])
    if num_gpus == 0:
        _say("there is a GPU driver here, but torch sees no GPU (a CPU build of torch, or none visible): using the CPU")
    return num_gpus


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What the processes get


def _shared_env(layout: Layout, env: Mapping[str, str]) -> dict[str, str]:
    # Variables of an outer launcher would make a single process wait for partners that do not exist.
    result = {name: value for name, value in env.items() if name not in _RANK_VARIABLES}
    if layout.num_local > 1:
        result.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // layout.num_local)))
    if _has_nvidia() and "PYTORCH_CUDA_ALLOC_CONF" not in env:
        result.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return result


def _meeting_point(layout: Layout) -> tuple[str, int]:
    """The address at which rank 0 will listen. Node 0 tries its port, so that one in use is known at once."""
    if layout.endpoint is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return "127.0.0.1", server.getsockname()[1]
    host, port = layout.endpoint
    if layout.node_rank == 0:
        dual = socket.has_dualstack_ipv6()
        try:
            socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
            ).close()
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used: {os.strerror(error.errno or 0)}",
                where="RDZV_ENDPOINT",
                mend="choose another port, the same on every node, or end the process that holds it.",
            ) from error
    return host, port


def _start(command: list[str], layout: Layout, local_rank: int, shared_env: Mapping[str, str]) -> _Rank:
    index = layout.node_rank * layout.num_local + local_rank
    logged = index in layout.log_ranks
    # A sole logged rank keeps the terminal, and with it colours and the progress bar.
    inherits = logged and len(layout.log_ranks) == 1
    own_env = {"RANK": str(index), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(layout.num_local)}
    process = subprocess.Popen(
        command,
        env={**shared_env, **own_env, **({} if inherits else {"PYTHONUNBUFFERED": "1"})},
        stdin=subprocess.DEVNULL,
        stdout=None if inherits else subprocess.PIPE,
        stderr=None if inherits else subprocess.STDOUT,
        # A session of its own: the terminal's Ctrl-C then reaches a process once, through the launcher.
        start_new_session=True,
        preexec_fn=_tie_to_parent(),
    )
    return _Rank(index, logged, process)


def _tie_to_parent() -> Callable[[], None] | None:
    """On Linux: what a new process must do so that it never outlives a launcher that was killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return partial(_ask_to_die_with, os.getpid(), prctl)


def _ask_to_die_with(parent: int, prctl: Callable[..., int]) -> None:
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before it could be asked about
        os._exit(1)


# While they run


@dataclass
class _Rank:
    """One process, how it ended, and the last lines it wrote if nobody saw them."""

    index: int
    logged: bool
    process: subprocess.Popen[bytes]
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    reader: threading.Thread | None = None
    code: int | None = None

    def start_reading(self) -> None:
        if self.process.stdout is not None:
            self.reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
            self.reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        prefix = f"[rank {self.index}] ".encode()
        for line in iter(lambda: stream.readline(65536), b""):
            self.tail.append(prefix + line.rstrip(b"\r\n") + b"\n")
            if self.logged:
                try:
                    os.write(1, self.tail[-1])
                except OSError:
                    # Nobody reads our output any more. Reading goes on, or the process would block on a full pipe.
                    self.logged = False

    def finish_reading(self) -> None:
        if self.reader is not None:
            self.reader.join(timeout=1.0)  # a data worker that outlives its rank may still hold the pipe


@contextmanager
def _recorded_signals() -> Iterator[deque[int]]:
    """Collect the signals that are passed on, instead of dying of them. One that is ignored (nohup) stays ignored."""
    received: deque[int] = deque()
    previous = {number: signal.getsignal(number) for number in _FORWARDED_SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _supervise(ranks: list[_Rank], received: deque[int], grace_seconds: float) -> int:
    """Wait for every process, pass signals on, and end the others when one has failed; return the exit code."""
    failed: list[_Rank] = []  # in the order in which they were seen to fail
    codes: list[int] = []  # of the processes that the launcher did not end
    forwarded: set[int] = set()
    next_signal = signal.SIGTERM
    deadline = float("inf")
    while running := [rank for rank in ranks if rank.code is None]:
        while received:
            forwarded.add(number := received.popleft())
            _send(running, number)
        for rank in running:
            rank.code = code = rank.process.poll()
            if code is None:
                continue
            if -code in forwarded:
                # The signal met it before it could handle it, at its very start: it too is to be run again.
                code = EXIT_STOPPED
                deadline = min(deadline, time.monotonic() + grace_seconds)
            if next_signal == signal.SIGTERM or code == EXIT_MISTAKE:
                codes.append(code)
            if code not in (0, EXIT_STOPPED):
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + grace_seconds)
        if time.monotonic() > deadline:
            _send(running, next_signal)
            next_signal = signal.SIGKILL
            deadline = time.monotonic() + grace_seconds
        time.sleep(_POLL_SECONDS)
    for rank in ranks:
        rank.finish_reading()
    if failed:
        _explain(failed[0], ranks)
    return _exit_code(codes)


def _send(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        rank.process.send_signal(number)


def _exit_code(codes: Sequence[int]) -> int:
    if EXIT_MISTAKE in codes:
        return EXIT_MISTAKE
    if any(code not in (0, EXIT_STOPPED) for code in codes):
        return 1
    return EXIT_STOPPED if EXIT_STOPPED in codes else 0


def _explain(first: _Rank, ranks: Sequence[_Rank]) -> None:
    """Say which rank failed first, and show what it wrote unless the same was on the screen already."""
    code = first.code
    assert code is not None
    if code == EXIT_MISTAKE and any(rank.logged and rank.code == EXIT_MISTAKE for rank in ranks):
        return  # every rank finds the same mistake, and a logged one has told it
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += ": the machine may be out of memory" if -code == signal.SIGKILL else ""
    else:
        how = f"ended with exit code {code}"
    unseen = b"" if first.logged else b"".join(first.tail)
    _say(f"rank {first.index} failed first: it {how}" + (". Its last lines:" if unseen else ""))
    sys.stderr.write(unseen.decode(errors="replace"))
    sys.stderr.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"titanmoe: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
