"""A barrier: where all members of a set wait until all have come."""

import time

from optserve._errors import RoundIncomplete
from optserve_server.engine.members import Members


class Barrier:
    """One set's barrier, again and again. Every method is called under the set's lock; who waits is woken by the caller.

    A worker is there by the stream on which it came last. `passed` counts how often all have come.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self._arrived: dict[str, tuple[object, float]] = {}  # on which stream and when, by client
        self.passed = 0

    def arrive(self, client_id: str, stream: object) -> None:
        """Be there."""
        self._arrived[client_id] = stream, time.monotonic()

    def opened(self) -> bool:
        """Open if all are there; whether they were."""
        if not all(member in self._arrived for member in self._members):
            return False
        self._arrived.clear()
        self.passed += 1
        return True

    def remaining(self, client_id: str, deadline: float) -> float:
        """Seconds until something is due for one who is there, although nobody comes. Raises RoundIncomplete."""
        left = self._arrived[client_id][1] + deadline - time.monotonic()
        if left <= 0:
            missing = [member for member in self._members if member not in self._arrived]
            raise RoundIncomplete(
                f"expected all {len(self._members)} members at a barrier within {deadline:g} s; {len(missing)} did not come, "
                f"of {', '.join(map(repr, missing[:10]))}"
            )
        return min(left, self._members.remaining)

    def depart(self, client_id: str, stream: object) -> None:
        """Be there no more, unless another stream came."""
        if client_id in self._arrived and self._arrived[client_id][0] is stream:
            del self._arrived[client_id]
