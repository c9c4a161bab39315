"""Sessions: who has pushed what, so that a push that comes again is not applied again."""

import secrets
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from optserve._errors import SequenceGap, SequenceReused, SessionSuperseded
from optserve._results import Receipt

RECEIPTS_KEPT = 16  # per session; a worker may have this many pushes without an answer
SESSIONS_KEPT = 65_536  # per set; the one idle for longest is forgotten first


@dataclass(slots=True)
class Session:
    """One worker's pushes into one set under one server-issued epoch."""

    client_id: str
    epoch: int
    last_sequence: int = 0
    receipts: OrderedDict[int, tuple[bytes, Receipt]] = field(default_factory=OrderedDict)
    stream: object = None

    @property
    def last_receipt(self) -> Receipt | None:
        """Receipt of the last push, or None before the first."""
        return self.receipts[self.last_sequence][1] if self.receipts else None

    def check_stream(self, stream: object) -> None:
        """Raises SessionSuperseded if another stream has taken the session over."""
        if self.stream is not stream:
            raise SessionSuperseded(
                f"client {self.client_id!r} opened a newer stream on this set; use one handle per worker"
            )

    def admit(self, sequence: int, digest: bytes) -> Receipt | None:
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
        first_digest, receipt = self.receipts[sequence]
        if first_digest and first_digest != digest:
            raise SequenceReused(
                f"sequence {sequence} came before with other content; give every push its own sequence"
            )
        return replace(receipt, duplicate=True)

    def record(self, sequence: int, digest: bytes, receipt: Receipt) -> None:
        """Consume a sequence."""
        self.last_sequence = sequence
        self.receipts[sequence] = (digest, receipt)
        if len(self.receipts) > RECEIPTS_KEPT:
            self.receipts.popitem(last=False)


class Sessions:
    """A set's sessions by client."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, Session] = OrderedDict()

    def copy(self) -> list[Session]:
        """All sessions, the one idle for longest first, without their streams."""
        return [replace(each, receipts=each.receipts.copy(), stream=None) for each in self._by_client.values()]

    def restore(self, sessions: Iterable[Session]) -> None:
        """Take sessions over, from `copy`."""
        self._by_client = OrderedDict((session.client_id, session) for session in sessions)

    def touch(self, session: Session) -> None:
        """Count a session as in use now."""
        if self._by_client.get(session.client_id) is session:
            self._by_client.move_to_end(session.client_id)

    def open(self, client_id: str, epoch: int, stream: object) -> Session:
        """Resume the client's session if the epoch is the one issued, else begin a new one; older streams lose it."""
        session = self._by_client.get(client_id)
        if session is None or session.epoch != epoch:
            if session is not None:
                session.stream = None
            session = Session(client_id, secrets.randbits(63) | 1)
        session.stream = stream
        self._by_client[client_id] = session
        self._by_client.move_to_end(client_id)
        if len(self._by_client) > SESSIONS_KEPT:
            self._by_client.popitem(last=False)[1].stream = None
        return session
