"""run_train.sh and the environment it makes, with a stand-in for Python: a script that notes what it is asked to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
TOOLS = (
    "bash",
    "cat",
    "chmod",
    "cksum",
    "dirname",
    "flock",
    "mkdir",
    "readlink",
    "rm",
    "sed",
    "sleep",
    "tail",
    "tee",
    "tr",
)

# Answers as a real interpreter would. It has titanmoe if the file $0.has-titanmoe exists, and so on.
PYTHON = """#!/bin/bash
case "$*" in
  *importlib.metadata*) [ -e "$0.has-titanmoe" ] ;;
  *version_info*) echo 3.11; [ ! -e "$0.old" ] ;;
  *ensurepip*) [ ! -e "$0.no-ensurepip" ] ;;
  --version) echo Python 3.11.9 ;;
  "-m venv"*) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python"; echo venv >>"$LOG" ;;
  "-m pip"*)
    echo "pip ${*: -3}" >>"$LOG"
    echo "  Downloading torch-2.13.0-cp311-linux.whl (915.3 MB)"
    sleep "${PIP_SECONDS:-0}"
    exit "${PIP_CODE:-0}" ;;
  -c*) ;;
  *) printf '%s\\n' "$@" ;;
esac
"""


class Machine:
    """A copy of the checkout's scripts, and a PATH with a few tools and one Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"  # a space, as users have
        self.bin = folder / "bin"
        self.log = folder / "log"
        for path in ("scripts", "train_configs", "titanmoe"):
            (self.root / path).mkdir(parents=True)
        for path in ("run_train.sh", "scripts/python_env.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(CHECKOUT / path, self.root / path)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        self.python = self.bin / "python3"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self.env = {"PATH": str(self.bin), "LOG": str(self.log)}

    @property
    def default_config(self) -> str:
        return str(self.root / "train_configs/debug_qwen3_moe.toml")

    def start(self, *args: str, script: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [script or self.root / "run_train.sh", *args],
            cwd=self.root.parent,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, script: Path | None = None, **env: str) -> tuple[int, list[str], str]:
        """Exit code, the arguments that the launcher's Python got, and what was said."""
        process = self.start(*args, script=script, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.splitlines(), err

    def done(self) -> list[str]:
        """What was made and installed since the last time this was asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if "pip>=" not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def installed(machine: Machine) -> Machine:
    """A machine whose own Python has titanmoe."""
    Path(f"{machine.python}.has-titanmoe").touch()
    return machine


def install_line(machine: Machine) -> str:
    return f"pip {machine.root} --constraint {machine.root}/constraints.txt"


# Which config


def test_the_default_config(installed: Machine) -> None:
    code, args, err = installed.run("--training.steps=3")
    assert (code, err) == (0, "")
    assert args == ["-m", "titanmoe.launch", "--job.config_file", installed.default_config, "--training.steps=3"]


@pytest.mark.parametrize(
    "given", [["--job.config_file", "my file.toml"], ["--job.config_file=x.toml"], ["--job.config-file=x.toml"]]
)
def test_the_users_config_replaces_the_default(installed: Machine, given: list[str]) -> None:
    _, args, _ = installed.run("--training.steps=3", *given, CONFIG_FILE="other.toml")
    assert args == ["-m", "titanmoe.launch", "--training.steps=3", *given]


def test_config_file_variable(installed: Machine) -> None:
    _, args, _ = installed.run(CONFIG_FILE="other.toml")
    assert args == ["-m", "titanmoe.launch", "--job.config_file", "other.toml"]


def test_started_through_a_link(installed: Machine, tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("a checkout/run_train.sh")
    (tmp_path / "bin" / "second").symlink_to("../first")
    _, args, _ = installed.run(script=tmp_path / "bin" / "second")
    assert args[3] == installed.default_config


# Which Python


def test_an_environment_with_titanmoe_is_used_as_it_is(installed: Machine) -> None:
    installed.run()
    assert installed.done() == []
    assert not (installed.root / ".venv").exists()


def test_a_fresh_machine_installs_once(machine: Machine) -> None:
    code, args, err = machine.run()
    assert code == 0
    assert args[:2] == ["-m", "titanmoe.launch"]
    assert machine.done() == ["venv", install_line(machine)]
    assert "downloading torch 2.13.0 (915.3 MB)" in err and "installed in" in err
    assert machine.run()[2] == ""
    assert machine.done() == []


def test_an_interrupted_installation_is_begun_anew(machine: Machine) -> None:
    process = machine.start(PIP_SECONDS="60")
    deadline = time.monotonic() + 20
    while not (machine.root / ".venv/install.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    machine.done()
    half_made = machine.root / ".venv" / "half-made"
    half_made.touch()
    code, _, err = machine.run()
    assert code == 0 and "interrupted" in err
    assert machine.done() == ["venv", install_line(machine)]
    assert not half_made.exists()


def test_a_failed_installation_says_so_and_is_tried_again(machine: Machine) -> None:
    code, args, err = machine.run(PIP_CODE="1")
    assert (code, args) == (1, [])
    assert "the installation failed" in err and "install.log" in err
    assert machine.run()[0] == 0


def test_changed_dependencies_are_installed_into_the_same_environment(machine: Machine) -> None:
    machine.run()
    machine.done()
    with (machine.root / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    _, _, err = machine.run()
    assert "has changed" in err
    assert machine.done() == [install_line(machine)]


def test_a_moved_checkout_installs_again(machine: Machine, tmp_path: Path) -> None:
    machine.run()
    machine.done()
    machine.root = machine.root.rename(tmp_path / "moved")
    machine.run()
    assert machine.done() == [install_line(machine)]


def test_two_starts_at_once_install_once(machine: Machine) -> None:
    starts = [machine.start(PIP_SECONDS="0.5") for _ in range(2)]
    results = [start.communicate(timeout=60) for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert machine.done() == ["venv", install_line(machine)]
    assert sum("waiting" in err for _, err in results) == 1


def test_an_environment_of_the_users_is_left_alone(machine: Machine) -> None:
    mine = machine.root / ".venv" / "mine"
    mine.mkdir(parents=True)
    code, _, err = machine.run()
    assert code == 2 and "not made by this script" in err
    assert mine.exists() and machine.done() == []


@pytest.mark.parametrize("how", ["none", "old", "fails"])
def test_no_python(machine: Machine, how: str) -> None:
    if how == "none":
        machine.python.unlink()
    elif how == "old":
        Path(f"{machine.python}.old").touch()
    else:
        machine.python.write_text("#!/bin/bash\nexit 127\n")
    code, _, err = machine.run()
    assert code == 2
    assert "Python 3.10 or newer" in err and "apt install" in err
    assert not (machine.root / ".venv").exists()


def test_no_ensurepip_names_the_debian_package(machine: Machine) -> None:
    Path(f"{machine.python}.no-ensurepip").touch()
    code, _, err = machine.run()
    assert code == 2
    assert "python3.11-venv" in err
    assert not (machine.root / ".venv").exists()
