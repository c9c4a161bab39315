"""A commit: a finished push on its way to an outcome."""

from dataclasses import dataclass

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

    def fail(self, error: Exception) -> None:
        """Let an error be the outcome: without its traceback, which would keep this and its gradients alive, if it has come
        about as it should."""
        self.error = error.with_traceback(None) if isinstance(error, OptserveError) else error

    @property
    def done(self) -> bool:
        """Whether there is an outcome."""
        return self.receipt is not None or self.error is not None
