"""Sessions: who has pushed what, so that a push that comes again is not applied again."""

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from optserve._errors import SequenceGap, SequenceReused, SessionSuperseded
from optserve._results import Receipt

RECEIPTS_KEPT = 16  # per session; a worker may have this many pushes without an answer
SESSIONS_KEPT = 65_536  # per set; the one idle for longest is forgotten first
CLOCK_SKEW = 86_400 * 10**9  # nanoseconds by which an epoch may lie in the future, since clocks are set back


class Kept(NamedTuple):
    """A receipt, what tells its push from others, and the event of the set's history in which it was given."""

    digest: bytes
    receipt: Receipt
    event: int


@dataclass(slots=True)
class Session:
    """One worker's pushes into one set under one server-issued epoch; up to `durable_sequence` on stable storage.

    It was last heard of when it was `seen`, in monotonic seconds; nothing is expected of it while it `waits` for others. There
    had been so many `barriers` when its worker first was a member.
    """

    client_id: str
    epoch: int
    last_sequence: int = 0
    durable_sequence: int = 0
    receipts: OrderedDict[int, Kept] = field(default_factory=OrderedDict)
    stream: object = None
    seen: float = field(default_factory=time.monotonic)
    waits: bool = False
    barriers: int | None = None

    @property
    def last_receipt(self) -> Receipt | None:
        """Receipt of the last push, or None before the first."""
        return self.receipts[self.last_sequence].receipt if self.receipts else None

    @property
    def last_event(self) -> int:
        """The event with that receipt, or 0."""
        return self.receipts[self.last_sequence].event if self.receipts else 0

    def heard(self, stream: object, *, waits: bool) -> None:
        """Take note that the worker is alive, and whether it is made to wait from now on. Older streams say nothing of it."""
        if self.stream is stream:
            self.seen, self.waits = time.monotonic(), waits

    def check_stream(self, stream: object) -> None:
        """Raises SessionSuperseded if another stream has taken the session over."""
        if self.stream is not stream:
            raise SessionSuperseded(
                f"client {self.client_id!r} opened a newer stream on this set; use one handle per worker"
            )

    def admit(self, sequence: int, digest: bytes) -> Kept | None:
        """The first receipt of a push that came before, or None for the next one; raises SequenceGap or SequenceReused.

        A refused push has no digest (empty): its content may never have come whole.
        """
        if sequence == self.last_sequence + 1:
            return None
        if sequence > self.last_sequence or sequence not in self.receipts:
            raise SequenceGap(
                f"expected sequence {self.last_sequence + 1} of client {self.client_id!r}, epoch {self.epoch:x} "
                f"(receipts are kept for the last {RECEIPTS_KEPT}); got {sequence}"
            )
        first = self.receipts[sequence]
        if first.digest and first.digest != digest:
            raise SequenceReused(
                f"sequence {sequence} came before with other content; give every push its own sequence"
            )
        return first._replace(receipt=replace(first.receipt, duplicate=True))

    def record(self, digest: bytes, receipt: Receipt, event: int) -> None:
        """Consume a sequence."""
        self.last_sequence = receipt.sequence
        self.receipts[receipt.sequence] = Kept(digest, receipt, event)
        if len(self.receipts) > RECEIPTS_KEPT:
            self.receipts.popitem(last=False)


class Sessions:
    """A set's sessions by client.

    Epochs grow with time. `forgotten` is the highest of those that are not known any more though they were: a session that is
    not known, with a later epoch, has pushed nothing that is left in this set.
    """

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, Session] = OrderedDict()
        self._last_epoch = 0
        self.forgotten = time.time_ns()  # nobody has pushed before

    def copy(self) -> list[Session]:
        """All sessions, the one idle for longest first, without their streams."""
        return [
            replace(each, receipts=each.receipts.copy(), stream=None, waits=False) for each in self._by_client.values()
        ]

    def restore(self, sessions: Iterable[Session], forgotten: int) -> None:
        """Take sessions over, from `copy`."""
        self._by_client = OrderedDict((session.client_id, session) for session in sessions)
        self.forgotten = forgotten
        self._last_epoch = max([forgotten, *(session.epoch for session in self._by_client.values())])

    def touch(self, session: Session) -> None:
        """Count a session as in use now."""
        if self._by_client.get(session.client_id) is session:
            self._by_client.move_to_end(session.client_id)

    def made_durable(self, client_id: str, epoch: int, sequence: int) -> None:
        """Say that a session's pushes up to a sequence are on stable storage."""
        session = self._by_client.get(client_id)
        if session is not None and session.epoch == epoch:
            session.durable_sequence = max(session.durable_sequence, sequence)

    def open(self, client_id: str, epoch: int, stream: object) -> Session:
        """Resume a client's session, or begin one; older streams lose it. Raises SessionSuperseded for an epoch that is over.

        An epoch that is not known, of a session that was never forgotten, is one whose pushes are all gone: it begins again.
        """
        session = self._by_client.get(client_id)
        if session is not None and 0 < epoch < session.epoch:
            raise SessionSuperseded(
                f"client {client_id!r} has begun a newer session on this set; use one handle per worker, or another client_id"
            )
        if session is None or session.epoch != epoch:
            known = self.forgotten < epoch <= time.time_ns() + CLOCK_SKEW
            session = self._begin(client_id, epoch if known else 0, session)
        session.stream = stream
        session.heard(stream, waits=False)
        self.touch(session)
        return session

    def resume(self, client_id: str, epoch: int) -> Session:
        """The session that an event of the journal belongs to."""
        session = self._by_client.get(client_id)
        if session is None or session.epoch != epoch:
            session = self._begin(client_id, epoch, session)
        self.touch(session)
        return session

    def _begin(self, client_id: str, epoch: int, before: Session | None) -> Session:
        if before is not None:
            before.stream = None
            self.forgotten = max(self.forgotten, before.epoch)
        session = Session(client_id, epoch or max(time.time_ns(), self._last_epoch + 1))
        self._last_epoch = max(self._last_epoch, session.epoch)
        self._by_client[client_id] = session
        if len(self._by_client) > SESSIONS_KEPT:
            evicted = self._by_client.popitem(last=False)[1]
            evicted.stream = None
            self.forgotten = max(self.forgotten, evicted.epoch)
        return session
