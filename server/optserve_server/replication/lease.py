"""Leases: a primary acknowledges only while it is sure that its standby has not promoted itself.

The standby promotes itself when it has heard nothing for `seconds`. It echoes heartbeats, so what the primary knows of that
timer is that it was started after an echoed heartbeat was sent: it may go on until then plus 0.9 of the seconds, by its own
clock. Clocks need not agree on the time, only run at the same speed, within a tenth (Gray and Cheriton, "Leases", 1989).
"""

import threading
import time

MARGIN = 0.9  # part of the standby's time that the primary uses


def now() -> float:
    """Seconds; goes on while the machine sleeps, where there is such a clock."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class Lease:
    """The primary's side. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0  # none
        self._until = 0.0
        self._last = 0  # heartbeat, over all streams
        self._sent: dict[int, float] = {}

    @property
    def granted(self) -> bool:
        """Whether this server depends on its standby."""
        return self._seconds > 0

    @property
    def lapsed(self) -> bool:
        """Whether the standby may have promoted itself."""
        return self._seconds > 0 and now() >= self._until

    def grant(self, seconds: float, *, lapsed: bool = False) -> None:
        """Depend on a standby that has not heard of it yet; or on one that may have promoted itself by now."""
        with self._lock:
            until = now() + MARGIN * seconds if not lapsed else 0.0
            self._until = min(self._until, until) if self._seconds else until
            self._seconds = seconds

    def end(self) -> None:
        """Depend on nobody."""
        with self._lock:
            self._seconds = 0.0
            self._sent.clear()

    def sending(self) -> tuple[int, bool]:
        """A heartbeat is about to be sent: its number, and whether this server depends on the standby."""
        with self._lock:
            self._last += 1
            if self._seconds:
                self._sent[self._last] = now()
            return self._last, self._seconds > 0

    def echoed(self, heartbeat: int) -> None:
        """The standby had it, and has not promoted itself until then."""
        with self._lock:
            sent = self._sent.get(heartbeat)
            if sent is not None:
                self._until = max(self._until, sent + MARGIN * self._seconds)
                self._sent = {number: at for number, at in self._sent.items() if number > heartbeat}
