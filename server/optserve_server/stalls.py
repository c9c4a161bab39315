"""Stalls: calls that have stopped in the middle of an upload or a download are ended, so that they hold nothing for ever."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Call(Protocol):
    """What can be ended."""

    def cancel(self) -> object: ...


class Watch:
    """Over one call: `progress` whenever more is waited for, `rest` while nothing is."""

    def __init__(self) -> None:
        self.since: float | None = None

    def progress(self) -> None:
        """Expect more within the limit from now on."""
        self.since = time.monotonic()

    def over(self, messages: Iterable[T]) -> Iterator[T]:
        """Messages that come one after the other until they end."""
        self.progress()
        for message in messages:
            self.rest()
            yield message
            self.progress()
        self.rest()

    def taken(self, messages: Iterable[T]) -> Iterator[T]:
        """Messages that the caller takes one after the other until they end."""
        for message in messages:
            self.progress()
            yield message
            self.rest()

    def rest(self) -> None:
        """Expect nothing."""
        self.since = None


class Stalls:
    """Cancels watched calls that have made no progress for `limit` seconds."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._watched: dict[Watch, Call] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="optserve-stalls", daemon=True).start()

    @contextmanager
    def watch(self, call: Call) -> Iterator[Watch]:
        """Watch a call as long as this lasts."""
        watch = Watch()
        self._watched[watch] = call
        try:
            yield watch
        finally:
            del self._watched[watch]

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._limit / 10):
            now = time.monotonic()
            for watch, call in list(self._watched.items()):
                since = watch.since
                if since is not None and now - since > self._limit:
                    watch.rest()
                    call.cancel()
