"""The gate: lets work in while there is room for it, and lets the server drain."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from optserve._errors import ServerBusy, ServerDraining


class Gate:
    """Counts what is inside, in streams or bytes. Once closed nothing enters, and `drain` waits for the rest to leave."""

    def __init__(self, what: str, limit: int) -> None:
        self.what = what
        self.limit = limit
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def room(self, size: int = 1) -> Iterator[None]:
        """Be inside; raises ServerBusy if that would be too much, ServerDraining if the gate is closed.

        What is larger than the limit may enter alone.
        """
        with self._changed:
            if self._closed:
                raise ServerDraining("the server is draining; try again once it is back")
            if self._inside and self._inside + size > self.limit:
                raise ServerBusy(
                    f"expected at most {self.limit:,} {self.what} at a time; there are {self._inside:,}, and {size:,} more "
                    "came. Try again later"
                )
            self._inside += size
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= size
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
