"""Changes: that something has come to be on stable storage, for who waits for it."""

import threading


class Changes:
    """Counts changes, and wakes who waits for one. Any thread may do either."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def note(self) -> None:
        """There is one."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, seen: int, seconds: float) -> None:
        """Wait until there are more than had been seen, or for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self.count != seen, seconds)
