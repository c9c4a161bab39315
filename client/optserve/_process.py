"""Processes: a connection belongs to the one that made it, and not to those that are forked from that."""

import os

from optserve._errors import FailedPrecondition


class Owner:
    """The process that made something. Locks may be held for ever in another, threads are gone, and sockets are shared."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises FailedPrecondition in another process."""
        if not self.here:
            raise FailedPrecondition(
                "expected a client of this process; this one was made before the process was forked: make one here, with "
                "Client(address), and let its workers have names of their own"
            )
