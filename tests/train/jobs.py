"""Whole jobs, from a TOML file to what they leave behind.

`train` forks the ranks and calls the program's `main` in each, which saves the seconds that Python and torch take to
start; `launch` starts the real launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # it is what AdamW imports; before the ranks are forked, as titanmoe.trainer below
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import titanmoe.trainer  # noqa: F401
from titanmoe.train import main

CHECKOUT = Path(__file__).parents[2]

TINY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 2048,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
"""Small enough for a checkpoint in milliseconds: 0.16 million parameters."""

_TOML = """
[model]
name = "auto"
hf_assets_path = "{folder}/model"
tokenizer_path = "builtin"
[training]
dataset = "text"
dataset_path = "{folder}/data"
local_batch_size = 4
global_batch_size = 4
seq_len = 32
steps = 10
mixed_precision_param = "float32"
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 3
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
"""


def write_job(folder: Path, model: dict[str, Any] = TINY, more: str = "") -> Path:
    """`folder`/job.toml, with a tiny model and twelve text files; returns its path."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(model))
    (folder / "data").mkdir()
    for number in range(12):
        (folder / "data" / f"{number:02}.txt").write_text(
            f"def f{number}(x):\n    return x + {number}\n" * (3 + number)
        )
    path = folder / "job.toml"
    path.write_text(_TOML.format(folder=folder) + more)
    return path


@dataclass
class Outcome:
    """How the ranks ended and what each wrote."""

    codes: list[int]
    out: list[str]
    err: list[str]

    @property
    def told(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.out[rank]}{self.err[rank]}" for rank in range(len(self.codes)))


class Ranks:
    """Running ranks of `python -m titanmoe.train`, forked from this process."""

    def __init__(self, args: Sequence[str], num_ranks: int = 1, before: Callable[[int], None] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
        self.pids = [self._fork(list(args), rank, env if num_ranks > 1 else {}, before) for rank in range(num_ranks)]

    def _fork(self, args: list[str], rank: int, env: dict[str, str], before: Callable[[int], None] | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                file = os.open(f"{self._folder.name}/{name}-{rank}", os.O_WRONLY | os.O_CREAT)
                os.dup2(file, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # in the place of pytest's
            torch.set_num_threads(1)
            if env:
                os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
            if before is not None:
                before(rank)
            code = main(args)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number: int, rank: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 120) -> Outcome:
        deadline = time.monotonic() + seconds
        codes: dict[int, int] = {}
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(found[1])
            if time.monotonic() > deadline:
                hanging = [rank for rank in range(len(self.pids)) if rank not in codes]
                for rank in hanging:
                    self.signal(signal.SIGKILL, rank)
                    os.waitpid(self.pids[rank], 0)
                    codes[rank] = -signal.SIGKILL
                raise AssertionError(f"ranks {hanging} did not end\n{self._read(codes).told}")
            time.sleep(0.01)
        return self._read(codes)

    def _read(self, codes: dict[int, int]) -> Outcome:
        def texts(name: str) -> list[str]:
            return [Path(self._folder.name, f"{name}-{rank}").read_text() for rank in range(len(self.pids))]

        return Outcome([codes[rank] for rank in range(len(self.pids))], texts("out"), texts("err"))


def train(*args: object, ranks: int = 1, before: Callable[[int], None] | None = None, seconds: float = 120) -> Outcome:
    """Run a job to its end, whatever that is; longer than `seconds` is a failure."""
    return Ranks([str(arg) for arg in args], ranks, before).wait(seconds)


def run(
    job: Path,
    dump: Path,
    *args: object,
    ranks: int = 1,
    code: int = 0,
    before: Callable[[int], None] | None = None,
    seconds: float = 120,
) -> Outcome:
    """Run a job that must end with `code` on every rank."""
    outcome = train(
        f"--job.config_file={job}", f"--job.dump_folder={dump}", *args, ranks=ranks, before=before, seconds=seconds
    )
    assert outcome.codes == [code] * ranks, outcome.told
    return outcome


def launch(*args: object, ranks: int = 1, **env: str) -> subprocess.Popen[str]:
    """The real launcher, with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "titanmoe.launch", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "NGPU": str(ranks), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def steps(dump: Path) -> dict[int, dict[str, Any]]:
    """The training records of metrics.jsonl by step; each step must be there once, in order."""
    found = [record for record in _records(dump) if "loss" in record]
    numbers = [record["step"] for record in found]
    assert numbers == sorted(set(numbers)), numbers
    return {record["step"]: record for record in found}


def validations(dump: Path) -> dict[int, float]:
    found = [record for record in _records(dump) if "validation_loss" in record]
    assert len({record["step"] for record in found}) == len(found), found
    return {record["step"]: record["validation_loss"] for record in found}


def _records(dump: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dump / "metrics.jsonl").read_text().splitlines()]


def curve(dump: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(step, record["loss"], record["grad_norm"]) for step, record in steps(dump).items()]


def assert_close(found: Path, expected: Path, rel: float = 1e-5) -> None:
    """Losses and gradient norms of two runs agree."""
    a, b = curve(found), curve(expected)
    assert [step for step, *_ in a] == [step for step, *_ in b]
    for (step, *values), (_, *wanted) in zip(a, b, strict=True):
        for value, want in zip(values, wanted, strict=True):
            assert abs(value - want) <= rel * abs(want), f"step {step}: {values} instead of {wanted}"


def saved_steps(dump: Path) -> list[int]:
    """Steps whose folder is in place."""
    names = [path.name for path in (dump / "checkpoint").glob("step-*")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def tensors(dump: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by torch's own tool."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(dump / "checkpoint" / f"step-{step}", f"{folder}/all.pt")
        return dict(_flat(torch.load(f"{folder}/all.pt", weights_only=True)))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def assert_same_tensors(found: Path, expected: Path, step: int) -> None:
    a, b = tensors(found, step), tensors(expected, step)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def signal_at(step: int, rank: int = 0, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """For `before`: one rank gets a signal at the beginning of a step."""

    def arrange(this_rank: int) -> None:
        from titanmoe.trainer import Trainer

        take_step = Trainer._train_step

        def take_step_and_signal(self: Trainer) -> bool:
            if self.step + 1 == step:
                os.kill(os.getpid(), number)
            return take_step(self)

        if this_rank == rank:
            Trainer._train_step = take_step_and_signal  # type: ignore[method-assign]

    return arrange


def assert_one_line(text: str, names: str) -> None:
    """The message of a failure: one `error: ...`, no traceback."""
    assert text.startswith("error: ") and text.count("error: ") == 1 and "Traceback" not in text, text
    assert names in text, text
