"""A commit: a finished push on its way to an outcome."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from optserve._dtypes import DType
from optserve._errors import OptserveError, Refusal
from optserve._results import Receipt
from optserve_server.engine.push import Push
from optserve_server.engine.sessions import Session
from optserve_server.engine.snapshot import Snapshot


@dataclass(eq=False, slots=True)
class Commit:
    """A finished push that waits to be applied, and in the end what became of it.

    `held` is what its worker has read until now; with `pull`, it gets a snapshot, in elements no wider than `dtype`. `event` is
    the one of the set's history that has its receipt. What it does as part of an update depends on its `staleness`; if it is
    `discarded`, nothing.
    """

    session: Session
    stream: object
    push: Push
    pull: bool
    held: Snapshot | None
    dtype: DType | None = None
    staleness: int | None = None
    discarded: Refusal | None = None
    receipt: Receipt | None = None
    event: int = 0
    snapshot: Snapshot | None = None
    error: Exception | None = None
    decided: threading.Event | None = None  # for which its thread waits
    following: "Commit | None" = None  # which its thread wakes then

    def settle(self, receipt: Receipt, event: int) -> None:
        """Let a receipt be the outcome; its thread is woken once its snapshot has been taken."""
        self.receipt, self.event = receipt, event

    def fail(self, error: Exception) -> None:
        """Let an error be the outcome: without its traceback, which would keep this and its gradients alive, if it has come
        about as it should."""
        self.error = error.with_traceback(None) if isinstance(error, OptserveError) else error
        self.wake()

    def wake(self) -> None:
        """Let its thread go on, if that waits for the outcome."""
        if self.decided is not None:
            self.decided.set()

    @property
    def done(self) -> bool:
        """Whether there is an outcome."""
        return self.receipt is not None or self.error is not None

    @property
    def waits(self) -> bool:
        """Whether its thread waits, and has not been woken."""
        return self.decided is not None and not self.decided.is_set()


def wake_in_turn(commits: Sequence[Commit]) -> None:
    """Wake the threads of commits that wait, each by the one before: all at once, they would be in each other's way."""
    for commit, following in pairwise(commits):
        commit.following = following
    for commit in commits[:1]:
        commit.wake()
