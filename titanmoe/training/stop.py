"""Being told to stop: a signal sets a flag, and the ranks agree on the step after which they stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType

logger = logging.getLogger("titanmoe")

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_REPEATED_SECONDS = 2.0


class StopRequest:
    """Catches SIGTERM, SIGUSR1 and Ctrl-C until `close()`.

    The loop reads `requested` once per step and shares it with the other ranks, so that all of them save the same
    step. A second Ctrl-C, a while after the first, interrupts at once: a terminal may deliver one keystroke twice.
    Python allows handlers only in the main thread; in another one nothing is caught, and one line says so.
    """

    def __init__(self) -> None:
        self.requested = False
        self._when = 0.0
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        else:
            logger.info("not in the main thread: signals do not stop this run")

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.requested and now - self._when > _REPEATED_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._when = True, now

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
