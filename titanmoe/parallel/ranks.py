"""Doing things together: one result, or one error, that every rank agrees on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from titanmoe.config.errors import ConfigError

logger = logging.getLogger("titanmoe")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The ranks of the job and a gloo group of their own, so that saving never meets the training's collectives.

    An action that raises on one rank raises on all of them, with the same type and errno for the errors that callers
    tell apart (ConfigError, OSError); anything else arrives as a RuntimeError.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @staticmethod
    def create(timeout: timedelta) -> Ranks:
        """All ranks of the job; every rank must call it. Without torch.distributed, one rank."""
        if not dist.is_initialized():
            return Ranks(0, 1, None)
        return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))

    def close(self) -> None:
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)

    def log(self, level: int, text: str, *values: object) -> None:
        """Log on rank 0 what is the same on every rank."""
        if self.rank == 0:
            logger.log(level, text, *values)

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_each(self, action: Callable[[], Result]) -> Result:
        """Call `action` on every rank; returns this rank's result, or raises the lowest failing rank's error on all."""
        value, error = _attempt(action)
        for rank, failure in enumerate(self.gather(_encode(error))):
            if failure is not None:
                raise _decode(failure, rank, error if rank == self.rank else None)
        return value  # type: ignore[return-value]

    def on_all(self, action: Callable[[], Result]) -> list[Result]:
        """As `on_each`, and returns every rank's result, in rank order."""
        return self.gather(self.on_each(action))

    def share_error(self, error: Exception | None) -> None:
        """Raise the error of the lowest rank that has one, on every rank. All must call it, once one has an error."""

        def fail() -> None:
            if error is not None:
                raise error

        self.on_each(fail)

    def on_first(self, action: Callable[[], Result]) -> Result:
        """Call `action` on rank 0 only and return its result, or raise its error, on every rank."""
        value, error = _attempt(action) if self.rank == 0 else (None, None)
        if self.group is not None:
            message: list[Any] = [(value, _encode(error))]
            dist.broadcast_object_list(message, src=0, group=self.group)
            value, failure = message[0]
        else:
            failure = _encode(error)
        if failure is not None:
            raise _decode(failure, 0, error)
        return value  # type: ignore[return-value]


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _encode(error: Exception | None) -> tuple[Any, ...] | None:
    """An error as plain values: exceptions themselves do not all survive the trip."""
    if error is None:
        return None
    if isinstance(error, ConfigError):
        return "config", error.what, error.where, error.mend
    if isinstance(error, OSError) and error.errno is not None:
        return "os", error.errno, error.strerror, error.filename
    return "other", f"{type(error).__name__}: {error}"


def _decode(failure: tuple[Any, ...], rank: int, own: Exception | None) -> Exception:
    if own is not None:
        return own  # with its traceback
    kind, *values = failure
    if kind == "config":
        what, where, mend = values
        return ConfigError(what, where=where, mend=mend)
    if kind == "os":
        code, text, name = values
        return OSError(code, f"{text} (on rank {rank})", name)
    return RuntimeError(f"rank {rank} failed: {values[0]}")
