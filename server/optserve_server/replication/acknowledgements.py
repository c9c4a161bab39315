"""Acknowledgements: what must be so before a server says that something happened."""

import threading
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from optserve._errors import ServerUnavailable
from optserve._specification import Journal
from optserve_server.engine.history import Event, Log
from optserve_server.storage.keeper import Keeper


class Confirmations:
    """What the standby has confirmed of each set, and whether one is there to confirm anything."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._connected = False
        self._events: WeakKeyDictionary[Keeper, int] = WeakKeyDictionary()

    def connect(self) -> None:
        """A standby is there."""
        with self._changed:
            self._connected = True

    def disconnect(self) -> None:
        """None is there any more: who waits is told."""
        with self._changed:
            self._connected = False
            self._changed.notify_all()

    def confirm(self, keeper: Keeper, event: int) -> None:
        """The standby has a set's events up to one."""
        with self._changed:
            self._events[keeper] = max(event, self._events.get(keeper, 0))
            self._changed.notify_all()

    def of(self, keeper: Keeper) -> int:
        """The last event of a set that the standby has; 0 if none."""
        return self._events.get(keeper, 0)

    def wait(self, keeper: Keeper, event: int) -> None:
        """Return when the standby has an event; raises ServerUnavailable if none is connected, or it goes away."""
        with self._changed:
            while self._events.get(keeper, 0) < event:
                if not self._connected:
                    raise ServerUnavailable(
                        "no standby is connected, and this server was started with --wait-for-standby: it acknowledges nothing "
                        "that only it has. Start a standby with --follow, or this server without --wait-for-standby"
                    )
                self._changed.wait()


class Acknowledged:
    """A log whose events may be acknowledged once a standby has them, if `confirmations` are waited for, and `check` raises
    nothing."""

    def __init__(
        self, keeper: Keeper, log: Log, check: Callable[[], None], confirmations: Confirmations | None
    ) -> None:
        self._keeper = keeper
        self._log = log
        self._check = check
        self._confirmations = confirmations
        self._journaled = keeper.parameter_set.spec.journal is not Journal.OFF

    def append(self, events: Iterable[Event]) -> None:
        self._log.append(events)

    def wait(self, number: int) -> None:
        self._log.wait(number)
        if self._confirmations is not None and self._journaled:
            self._keeper.sync(number)  # which "everysec" would do later; a standby gets what is on stable storage
            self._confirmations.wait(self._keeper, number)
        self._check()
