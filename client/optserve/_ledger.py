"""A ledger: what a worker knows of its pushes into a set, and what follows when the server knows something else."""

import logging
from dataclasses import dataclass, replace

from optserve._errors import OutcomeUnknown, RolledBack
from optserve._exchange import Attempt
from optserve._identity import Identity
from optserve._messages import decode_position, decode_receipt
from optserve._results import Position, Receipt
from optserve._window import KeptPush, Window
from optserve.v1 import step_pb2

log = logging.getLogger("optserve")


@dataclass(frozen=True, slots=True)
class _Change:
    """How what the server says, when a stream opens, differs from what the ledger had."""

    resumed: bool
    rewound: bool
    replaced: bool  # the incarnation: this is not the process that the ledger knew, or not the history
    lost: int  # consumed pushes that are gone, or forgotten with their session
    older: bool  # the version, if replaced

    @property
    def rolled_back(self) -> bool:
        return self.rewound or self.older or (self.lost > 0 and (self.resumed or self.replaced))


class Ledger:
    """One session's. `sequence` is that of the last push that this worker knows to be consumed; the next has one more.

    `consumed` is how far the server is, which is further where a worker that started again repeats its pushes; `receipt` that
    of the last consumed push, `position` what the server last spoke of, None before it did. `unsettled` is a push that was
    given up without a receipt.
    """

    def __init__(self, set_id: str, position: Position | None, identity: Identity | None, window: Window) -> None:
        self._set_id = set_id
        self.epoch = identity.epoch if identity is not None else 0
        self.sequence = identity.sequence if identity is not None else 0
        self.consumed = 0
        self.receipt: Receipt | None = None
        self.position = position
        self.unsettled: Attempt | None = None
        self.window = window
        self._rewinds: int | None = None

    def attempt(self) -> Attempt:
        """The identity of the next push."""
        sequence = self.sequence + 1
        return Attempt(self.epoch, sequence, repeated=sequence <= self.consumed)

    def received(self, receipt: Receipt) -> None:
        """The server has said what became of a push."""
        self.sequence = max(self.sequence, receipt.sequence)  # more where earlier pushes are being sent again
        self.consumed = max(self.consumed, receipt.sequence)
        self.receipt = receipt
        if not receipt.duplicate:  # else of the past
            self.position = receipt.position
        self.window.trim(receipt.durable_sequence)

    def rewound(self, position: Position, rewinds: int) -> None:
        """This worker itself has rewound the set: what it pushed is not missed."""
        self.position, self._rewinds = position, rewinds
        self.window.clear()

    def outcome(self, attempt: Attempt | None) -> Receipt | None:
        """The receipt of an attempt, if the server is known to have consumed that push last.

        None for a repeated one: what was consumed under its sequence may have been another push.
        """
        if attempt is None or attempt.repeated or attempt.epoch != self.epoch:
            return None
        return self.receipt if self.receipt is not None and self.receipt.sequence == attempt.sequence else None

    def adopt(self, opened: step_pb2.Opened, attempt: Attempt | None) -> list[KeptPush]:
        """Take over what the server says, an attempt being under way; returns the pushes that it lost, to be sent again.

        Raises RolledBack if they are not all there, OutcomeUnknown if the session was forgotten and that matters.
        """
        before, epoch, mine = self.position, self.epoch, self.sequence
        self.epoch, self.consumed, self.position = opened.epoch, opened.last_sequence, decode_position(opened.position)
        self.receipt = None
        if opened.HasField("last_receipt"):
            self.receipt = replace(decode_receipt(opened.last_receipt), duplicate=True)
        if self.outcome(attempt or self.unsettled) is not None:
            mine = max(mine, self.consumed)
        change = self._change(before, epoch, mine, opened.rewinds)
        missing = self.window.covering(self.consumed, mine) if change.resumed and not change.rewound else None
        self.sequence = mine if change.resumed and missing is not None else min(mine, self.consumed)
        if change.rewound or not change.resumed:
            self.window.clear()
        self.window.trim(opened.durable_sequence)
        if change.rolled_back and missing is None:
            raise RolledBack(self._lost(change, before, mine, attempt), self.position.version)
        if epoch and not change.resumed and (attempt is not None or before is None):
            raise OutcomeUnknown(self._forgotten(attempt, mine))
        if epoch and not change.resumed:
            log.warning("the server has forgotten this worker's session with set %r; another begins", self._set_id)
        if change.rolled_back:
            log.warning(
                "set %r came back at version %d, from an older state; %d of this worker's pushes are sent again",
                self._set_id,
                self.position.version,
                len(missing or ()),
            )
        return missing or []

    def _change(self, before: Position | None, epoch: int, mine: int, rewinds: int) -> _Change:
        assert self.position is not None
        rewound = self._rewinds is not None and rewinds != self._rewinds
        replaced = before is not None and before.incarnation != self.position.incarnation
        older = replaced and before is not None and self.position.version < before.version
        self._rewinds = rewinds
        return _Change(epoch == self.epoch, rewound, replaced, max(0, mine - self.consumed), older)

    def _lost(self, change: _Change, before: Position | None, mine: int, attempt: Attempt | None) -> str:
        assert self.position is not None
        why = "somebody rewound it" if change.rewound else "from an older state"
        knew = f"this handle knew version {before.version}, and " if before is not None else ""
        left = f"of its {mine} pushes {min(mine, self.consumed)} are left"
        if change.rewound:
            left = f"those of its {mine} pushes that came after version {self.position.version} are undone"
        under_way = ""
        if attempt is not None and change.resumed:
            done = "applied" if self.outcome(attempt) is not None else "not applied"
            under_way = f"; push {attempt.sequence}, which was under way, was {done}" if not attempt.repeated else ""
        return f"set {self._set_id!r} came back at version {self.position.version}, {why}: {knew}{left}{under_way}"

    def _forgotten(self, attempt: Attempt | None, mine: int) -> str:
        if attempt is None:
            return (
                f"the server has forgotten the session that set {self._set_id!r} was to go on with; what became of pushes "
                f"after {mine} can't be found out"
            )
        return (
            f"push {attempt.sequence} to {self._set_id!r} was sent, but the server has forgotten this session since; "
            "whether the push was applied can't be found out"
        )
