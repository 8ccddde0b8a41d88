"""Importing torchao without its warnings of GPU libraries that this machine does not need."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

_NOISY = ("torchao", "torch.utils._pytree")  # torchao 0.18 with torch 2.11 to 2.13


def import_quietly(name: str) -> ModuleType:
    """Import a module of torchao; only errors are logged meanwhile."""
    loggers = [logging.getLogger(noisy) for noisy in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
