"""When to try again: full-jitter exponential backoff inside one deadline."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from optserve._errors import OptserveError, ServerBusy

FIRST_PAUSE = 0.05  # seconds
LONGEST_PAUSE = (
    2.0  # a worker that waits longer than the server was gone costs a run more than its questions cost a server
)
MOST_DOUBLINGS = 10  # 50 ms are then more than the longest pause, however many attempts follow

T = TypeVar("T")


class Retry:
    """Attempts until a deadline; see Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015."""

    def __init__(self, timeout: float) -> None:
        self.deadline = time.monotonic() + timeout
        self._attempts = 0

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.deadline - time.monotonic())

    def pause(self, error: OptserveError) -> bool:
        """Sleep before another attempt after an error; False if there is no time for one."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._attempts, MOST_DOUBLINGS))
        self._attempts += 1
        pause = random.uniform(0.0, longest) + (error.retry_after if isinstance(error, ServerBusy) else 0.0)
        if pause >= self.remaining:
            return False
        time.sleep(pause)
        return True


def retried(attempt: Callable[[float], T], timeout: float) -> T:
    """Call `attempt(seconds left)` until it succeeds, fails for good, or time is up; raises its last error."""
    retry = Retry(timeout)
    while True:
        try:
            return attempt(retry.remaining)
        except OptserveError as error:
            if not error.retryable or not retry.pause(error):
                raise
