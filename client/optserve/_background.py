"""Calls in the background: a thread that makes them one after the other, until one of them fails."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Makes calls in the order in which they were given. After one that raised, the others are cancelled."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], T], Future[T]] | None] = queue.SimpleQueue()
        self._stopped = False
        # A daemon: a process that ends because of an error should not wait for an answer that nobody reads.
        threading.Thread(target=self._run, name="optserve-background", daemon=True).start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have a call made after all earlier ones."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def stop(self) -> None:
        """Cancel what has not begun, and end the thread after what has."""
        self._stopped = True
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            function, future = item
            if self._stopped or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                self._stopped = True
                future.set_exception(error)
            del item, function, future  # while it waits for the next, it keeps no arrays alive
