"""Asking another process: its answer, its silence and its death, kept in a file that may be missing or torn."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from titanmoe.ops import probe as module
from titanmoe.ops.probe import cache_folder, probe, verdict

KEY = ["scaled_mm", "linear", "float8", "NVIDIA H100"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Child:
    """A command that notes each of its runs, and then does as it is told."""

    def __init__(self, path: Path, code: str) -> None:
        self.log = path / "runs"
        self.command = [sys.executable, "-S", "-c", f"open({str(self.log)!r}, 'a').write('x')\n{code}"]

    @property
    def num_runs(self) -> int:
        return len(self.log.read_text()) if self.log.exists() else 0


def test_a_verdict_is_asked_for_once(tmp_path: Path) -> None:
    child = Child(tmp_path, "print('a library says hello'); print('\"\"')")
    assert verdict(child.command, KEY) == verdict(child.command, KEY) == ""
    assert child.num_runs == 1
    assert verdict(child.command, [*KEY, "another device"]) == ""
    assert child.num_runs == 2
    (path,) = [path for path in cache_folder().glob("*.json") if "another" not in path.read_text()]
    assert json.loads(path.read_text()) == {"of": KEY, "failure": ""}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('\"dw is wrong\"')", "dw is wrong"),
        ("raise SystemExit('no such kernel')", "exit code 1: no such kernel"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
        ("print('no JSON')", "exit code 0"),
        ("print('[1]')", "exit code 0"),
        ("", "exit code 0"),
        ("import time; time.sleep(60)", "no result within 0.5 s"),
    ],
)
def test_failures_are_kept_too_and_say_where(tmp_path: Path, code: str, reason: str) -> None:
    child = Child(tmp_path, code)
    timeout = 0.5 if "sleep" in code else 20.0
    first = verdict(child.command, KEY, timeout)
    (path,) = cache_folder().glob("*.json")
    assert reason in first and str(path) in first
    assert verdict(child.command, KEY, timeout) == first
    assert child.num_runs == 1
    path.unlink()
    verdict(child.command, KEY, timeout)
    assert child.num_runs == 2


@pytest.mark.parametrize(
    "content", ["", '{"of": ["sca', "[]", '{"of": ["another"], "failure": ""}', json.dumps({"of": KEY, "failure": 3})]
)
def test_a_file_that_is_torn_or_of_something_else_is_replaced(tmp_path: Path, content: str) -> None:
    child = Child(tmp_path, "print('\"wrong\"')")
    verdict(child.command, KEY)
    (path,) = cache_folder().glob("*.json")
    path.write_text(content)
    assert "wrong" in verdict(child.command, KEY)
    assert child.num_runs == 2
    assert json.loads(path.read_text()) == {"of": KEY, "failure": "wrong"}
    assert sorted(other.suffix for other in cache_folder().iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize("obstacle", ["a file in the way", "no permission"])
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, obstacle: str) -> None:
    folder = tmp_path / "cache"
    if obstacle == "no permission":
        folder.mkdir()
        folder.chmod(stat.S_IRUSR)
        if os.access(folder, os.W_OK):
            pytest.skip("nothing is forbidden to this user")
    else:
        folder.write_text("")
    child = Child(tmp_path, "print('\"\"')")
    assert verdict(child.command, KEY) == verdict(child.command, KEY) == ""
    assert child.num_runs == 2


def test_of_several_that_ask_at_once_one_runs_the_trial(tmp_path: Path) -> None:
    child = Child(tmp_path, "import time; time.sleep(0.5); print('\"wrong\"')")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        answers = pool.starmap(verdict, 3 * [(child.command, KEY)], chunksize=1)
    assert all(answer.startswith("wrong") for answer in answers), answers
    assert child.num_runs == 1


def test_a_lock_that_is_left_behind_or_held_too_long_is_no_obstacle(tmp_path: Path) -> None:
    child = Child(tmp_path, "print('\"\"')")
    verdict(child.command, KEY)
    (lock,) = cache_folder().glob("*.lock")
    (kept,) = cache_folder().glob("*.json")
    kept.unlink()  # the lock's file stays, as after a process that was killed
    assert verdict(child.command, KEY) == ""
    kept.unlink()
    with module._alone(lock, 1.0):
        start = time.monotonic()
        assert verdict(child.command, KEY, timeout=1.0) == ""
    assert 1.0 < time.monotonic() - start < 10
    assert child.num_runs == 3


def test_a_probe_is_of_one_device_and_of_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(module, "verdict", lambda command, key: asked.append((command, key)) or "")
    assert probe("scaled_mm", "linear", "float8", torch.device("cuda")) == ""
    assert probe("scaled_mm", "linear", "float8", torch.device("cuda", 1)) == ""
    (first, key), (second, other_key) = asked
    assert first == [sys.executable, "-m", "titanmoe.ops.trial", "scaled_mm", "linear", "float8", "cuda:3"]
    assert second[-1] == "cuda:1" and key == other_key  # the same kind of device
    assert {"scaled_mm", "linear", "float8", "NVIDIA H100", "9.0", torch.__version__} < set(key)
    properties.minor = 3
    probe("scaled_mm", "linear", "float8", torch.device("cuda", 1))
    assert asked[-1][1] != key


def test_where_there_is_no_gpu_the_trial_says_so() -> None:
    """The command that a probe runs, from its start to its last line."""
    command = [sys.executable, "-m", "titanmoe.ops.trial", "scaled_mm", "linear", "float8", "cuda:0"]
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "trial ended with exit code 1" in verdict(command, KEY)
