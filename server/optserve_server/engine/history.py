"""History: what happened to a set, event by event. The same events on the same state make the same bits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optserve._policies import Policy
from optserve._results import Durability, Receipt
from optserve_server.engine.push import Declared
from optserve_server.engine.staging import Received


@dataclass(frozen=True, slots=True)
class Pushed:
    """Who pushed, what tells the content from others, the first receipt, and of how many samples the gradients were."""

    client_id: str
    epoch: int
    digest: bytes
    receipt: Receipt
    samples: float = 1.0


@dataclass(frozen=True, slots=True)
class Content:
    """What was applied: tensors and the chunks that have their elements.

    If it was `gathered`, they are the mean of all pushes so far that will make an update together, else what one push brought,
    multiplied by a loss scale.
    """

    declared: Sequence[Declared]
    received: Sequence[Received]
    loss_scale: float = 1.0
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """What a set decided on at one time: pushes, without content if nothing of them was applied, and hyperparameters that
    changed, by group and name, or the policy. Numbers count events, `version` the updates until after it."""

    number: int
    version: int
    pushes: Sequence[Pushed] = ()
    content: Content | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: Policy | None = None


class Log(Protocol):
    """Where events go before they happen. `append` is called under the set's lock, `wait` without it."""

    def append(self, events: Iterable[Event]) -> None:
        """Take events; raises StorageFailed, and then none of them was taken."""

    def wait(self, number: int) -> None:
        """Return when an event may be acknowledged; raises StorageFailed if it never may."""


class Unlogged:
    """No log: events may be acknowledged at once, and are only in memory."""

    def append(self, events: Iterable[Event]) -> None:
        """Let them be, without even making them."""

    def wait(self, number: int) -> None:
        """Return."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What has come to be on stable storage: all events up to a number, and the version and sequences that they led to.

    `sequences` has (client id, epoch, sequence) of every session that they changed.
    """

    number: int
    version: int
    sequences: Iterable[tuple[str, int, int]]
    durability: Durability


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a set's history is on stable storage: events in a journal or in a checkpoint, and the version after them."""

    journal: int = 0
    checkpoint: int = 0
    version: int = 0

    def reached(self, number: int) -> Durability:
        """How far an event has come."""
        if number <= self.checkpoint:
            return Durability.CHECKPOINT
        return Durability.JOURNAL if number <= self.journal else Durability.MEMORY

    def raised(self, stored: Stored) -> "Watermark":
        """The same after more has come to be there."""
        journal, checkpoint = self.journal, self.checkpoint
        if stored.durability is Durability.CHECKPOINT:
            checkpoint = max(checkpoint, stored.number)
        else:
            journal = max(journal, stored.number)
        return Watermark(journal, checkpoint, max(self.version, stored.version))


NOTHING_STORED = Watermark()
