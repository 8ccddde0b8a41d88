"""Asking another process whether kernels are right on this device, once.

A kernel that is not made for a device may give wrong numbers, hang, or leave a process unable to use its GPU, and what
a library says of itself does not tell. So a process of its own tries them (`trial`), and its verdict is kept: under
`$XDG_CACHE_HOME/titanmoe/probes`, one small file for each device and set of versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from titanmoe import __version__

TIMEOUT = 300.0
"""Seconds that a trial may take. Most of them go to importing and compiling."""

_WAIT_FACTOR = 1.1  # of the timeout: as long as another process' trial may take


def probe(name: str, kind: str, number_format: str, device: torch.device) -> str:
    """Why a backend does not work on a GPU, or "". See `trial` for what is asked of it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # The child sees the devices that this process sees: it inherits CUDA_VISIBLE_DEVICES and the like.
    command = [sys.executable, "-m", "titanmoe.ops.trial", name, kind, number_format, f"{device.type}:{index}"]
    return verdict(command, [name, kind, number_format, *_describe(torch.device(device.type, index))])


def _describe(device: torch.device) -> list[str]:
    """All that a verdict depends on."""
    properties = torch.cuda.get_device_properties(device)
    return [
        properties.name,
        f"{properties.major}.{properties.minor}",
        getattr(properties, "gcnArchName", ""),
        str(torch.__version__),
        str(torch.version.cuda),
        str(torch.version.hip),
        importlib.metadata.version("torchao"),
        __version__,
        _sources(),
    ]


def _sources() -> str:
    """What is tried may change without a new version."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def verdict(command: Sequence[str], key: Sequence[str], timeout: float = TIMEOUT) -> str:
    """What is known of `key`; where nothing is, what `command` says.

    The command prints "" or a reason as the JSON string that is its last line. One that does not has failed, too.
    Of several processes that ask at once one runs the command, and the others wait for it.
    """
    path = cache_folder() / f"{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:16]}.json"
    known = _read(path, key)
    if known is None:
        with _alone(path.with_suffix(".lock"), timeout * _WAIT_FACTOR):
            known = _read(path, key)
            if known is None:
                known = _run(command, timeout)
                _write(path, key, known)
    return known and f"{known} (as {path} says; remove it to try again)"


def cache_folder() -> Path:
    """Where verdicts are. May not exist, or not be writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titanmoe" / "probes"


def _run(command: Sequence[str], timeout: float) -> str:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"},  # no processes of its own
        )
    except subprocess.TimeoutExpired:
        return f"no result within {timeout:g} s"
    lines = done.stdout.strip().splitlines()
    with suppress(ValueError):
        said = json.loads(lines[-1]) if done.returncode == 0 and lines else None
        if isinstance(said, str):
            return said
    how = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"exit code {done.returncode}"
    return ": ".join([f"its trial ended with {how}", *done.stderr.strip().splitlines()[-1:]])


def _read(path: Path, key: Sequence[str]) -> str | None:
    """The verdict in a file; none if it is missing, torn, or about something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("of") != list(key) or not isinstance(content.get("failure"), str):
        return None
    return content["failure"]


def _write(path: Path, key: Sequence[str], failure: str) -> None:
    """Keep a verdict, all of it or nothing; where that cannot be, do without."""
    with suppress(OSError), tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({"of": list(key), "failure": failure}, file)
        file.flush()
        os.replace(file.name, path)


@contextmanager
def _alone(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock, which the system takes back when a process ends; go without where there can be none.

    Args:
        patience: seconds to wait for another process that has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        yield
