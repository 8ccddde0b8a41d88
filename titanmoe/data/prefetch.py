"""A background thread that prepares what will be asked for next."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Calls `produce` in a thread, at most `depth` calls ahead of `get`, and hands its results out in order.

    An exception in `produce` is raised by the `get` that would have returned its result; the thread has then ended.
    """

    def __init__(self, produce: Callable[[], Item], depth: int) -> None:
        assert depth > 0
        self._produce = produce
        self._free = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="titanmoe-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> Item:
        """The next result, waiting for it if need be."""
        item, error = self._ready.get()
        if error is not None:
            raise error
        self._free.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread, after the call of `produce` it is in, and drop what was prepared."""
        self._closed = True
        self._free.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._free.acquire()
            if self._closed:
                return
            try:
                item = self._produce()
            except BaseException as error:
                self._ready.put((None, error))
                return
            self._ready.put((item, None))
