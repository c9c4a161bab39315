"""The gate: lets pushes and streams in while there is room, and lets the server drain."""

import threading
from types import TracebackType

from optserve._errors import ServerBusy, ServerDraining


class Gate:
    """Counts what is inside. Once closed nothing enters, and `drain` waits for the rest to leave."""

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self._limit = limit
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        """Enter; raises ServerBusy if it is full, ServerDraining if it is closed."""
        with self._changed:
            if self._closed:
                raise ServerDraining("the server is draining; try again once it is back")
            if self._inside >= self._limit:
                raise ServerBusy(f"expected at most {self._limit} {self._what} at a time; try again later")
            self._inside += 1
            self._changed.notify_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nothing in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait, in seconds, until nothing is inside; whether that came to be."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, timeout)
