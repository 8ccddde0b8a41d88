"""A bar for long readings and writings: on a terminal it is redrawn, elsewhere a line is logged now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from titanmoe.checkpoint.progress import Progress, log_progress
from titanmoe.metrics.terminal import Terminal
from titanmoe.metrics.units import format_clock

_SECONDS_PER_BAR = 0.1


def progress_bar(terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A callback that draws how much is "read" or "written", how fast, and how long the rest will take.

    The bar goes when all is done; after an error, `terminal.clear_bar()` removes it.
    """
    if not terminal.is_interactive:
        return log_progress(clock)
    now_doing, begin, last_bar = "", 0.0, 0.0

    def draw(verb: str, done: int, total: int) -> None:
        nonlocal now_doing, begin, last_bar
        now = clock()
        if verb != now_doing:
            now_doing, begin, last_bar = verb, now, float("-inf")
        if done >= total:
            terminal.clear_bar()
        elif now - last_bar >= _SECONDS_PER_BAR:
            last_bar = now
            count = f"{done / 1e9:.1f}/{total / 1e9:.1f} GB {verb}"
            rate = done / (now - begin) if now > begin else 0.0
            speed, left = (
                (f"{rate / 1e9:.2f} GB/s", f"{format_clock((total - done) / rate)} left") if rate else ("", "")
            )
            terminal.progress_bar(done / total, count, speed, left)

    return draw
