from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No NO_COLOR and a capable TERM, whatever the developer's shell has."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
