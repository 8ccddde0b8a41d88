"""Lines of a log that tell how far a long reading or writing is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger("titanmoe.checkpoint")

Progress = Callable[[str, int, int], None]
"""Called with what is done to the bytes ("read", "written", "verified"), how many are done, and how many there are."""

_SECONDS_BETWEEN_LINES = 10.0


def log_progress(clock: Callable[[], float] = time.monotonic) -> Progress:
    """A callback that logs a line every ten seconds, and none for what is done sooner."""
    line_due = clock() + _SECONDS_BETWEEN_LINES

    def log(verb: str, done: int, total: int) -> None:
        nonlocal line_due
        if clock() >= line_due:
            line_due = clock() + _SECONDS_BETWEEN_LINES
            logger.info("%.1f of %.1f GB %s", done / 1e9, total / 1e9, verb)

    return log
