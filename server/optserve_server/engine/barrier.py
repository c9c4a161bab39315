"""A barrier: where all members of a set wait until all have come."""

import time

from optserve._errors import RoundIncomplete
from optserve_server.engine.members import Members


class Barrier:
    """One set's barrier, again and again. Every method is called under the set's lock; who waits is woken by the caller.

    `passed` counts how often all have come.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self._arrived: dict[str, float] = {}  # when, by client
        self.passed = 0

    def arrive(self, client_id: str) -> None:
        """Be there."""
        self._arrived.setdefault(client_id, time.monotonic())

    def check(self, client_id: str, deadline: float) -> float:
        """Open if all are there; seconds that one may go on to wait. Raises RoundIncomplete after the deadline."""
        if all(member in self._arrived for member in self._members):
            self._arrived.clear()
            self.passed += 1
            return 0.0
        left = self._arrived.get(client_id, time.monotonic()) + deadline - time.monotonic()
        if left <= 0:
            missing = [member for member in self._members if member not in self._arrived]
            self.depart(client_id)
            raise RoundIncomplete(
                f"expected all {len(self._members)} members at a barrier within {deadline:g} s; {len(missing)} did not come, "
                f"of {', '.join(map(repr, missing[:10]))}"
            )
        return min(left, max(0.0, self._members.next_end() - time.monotonic()))

    def depart(self, client_id: str) -> None:
        """Be there no more."""
        self._arrived.pop(client_id, None)
