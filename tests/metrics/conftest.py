from __future__ import annotations

import logging

import pytest

from titanmoe.metrics.terminal import TerminalHandler


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No NO_COLOR and a capable TERM, whatever the developer's shell has; the package's logger is put back after."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("titanmoe")
    level, propagate = logger.level, logger.propagate
    yield
    for handler in [handler for handler in logger.handlers if isinstance(handler, TerminalHandler)]:
        logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate
