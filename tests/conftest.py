"""Settings of the whole test suite, made before the first import of torch or of a Hugging Face library reads them."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks of one test must not fight for cores
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the training command sets it, which tests run in-process too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"  # nothing is downloaded
_caches = tempfile.TemporaryDirectory(prefix="titanmoe-tests-")
os.environ["HF_HOME"] = _caches.name  # nothing is written into the user's home


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless `-m gpu` asks for the tests that are for them: other tests fork ranks, which no GPU survives."""
    if "gpu" not in config.option.markexpr:
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


@pytest.fixture(scope="session", autouse=True)
def _start_autograd() -> None:
    """Autograd starts a thread for every GPU when it is first used, and a fork that comes after is refused.

    There is none to be seen; but a build with CUDA pretends to have one from the first fake tensor on.
    """
    import torch

    torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    """Undo what a command does to the package's logger: it takes the records for itself, and caplog sees none."""
    logger = logging.getLogger("titanmoe")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked `gpu` out where no GPU is to be seen; pytest counts them as deselected."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in on_gpu]
        config.hook.pytest_deselected(items=on_gpu)
