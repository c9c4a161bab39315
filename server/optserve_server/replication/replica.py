"""The replica: a standby's sets, made from what the primary sends."""

import itertools
import shutil
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog

from optserve._errors import OptserveError
from optserve._specification import Journal
from optserve.v1.standby_pb2 import CheckpointHeader, EventHeader, FollowedSet, FollowResponse, Welcome
from optserve_server.engine.engine import Engine
from optserve_server.engine.history import Event
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.replication.feed import Reached
from optserve_server.storage import checkpoint, events, travel
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.files import File
from optserve_server.storage.tensors import Damaged

log = structlog.get_logger()


class IncomingEvent:
    """An event whose bytes are coming."""

    def __init__(self, header: EventHeader) -> None:
        self.number = header.number
        self._encoded = header.message_size
        self._data = np.empty(header.size, np.uint8).data
        self._filled = 0

    def add(self, data: bytes) -> bool:
        """Take bytes; whether that was all of them. Raises Damaged."""
        end = self._filled + len(data)
        if end > len(self._data):
            raise Damaged(f"expected {len(self._data)} bytes of event {self.number}; got {end}")
        self._data[self._filled : end] = data
        self._filled = end
        return end == len(self._data)

    def decoded(self) -> Event:
        """The event."""
        event = events.decode(bytes(self._data[: self._encoded]), self._data[self._encoded :])
        if event.number != self.number:
            raise Damaged(f"expected event {self.number}; got {event.number}")
        return event


class IncomingCheckpoint:
    """A checkpoint whose bytes are coming, to files in a directory of its own."""

    def __init__(self, header: CheckpointHeader, spool: Path) -> None:
        self.header = header
        self._spool = spool
        self.path = spool / f"{checkpoint.PREFIX}{header.event:020d}"
        self.path.mkdir(parents=True)
        self._files = self._opened()
        self._file = next(self._files)

    def _opened(self) -> Generator[tuple[File, int]]:
        """The files one after the other, each with its size, as long as it is the one that is written."""
        for each in self.header.files:
            if Path(each.name).name != each.name:
                raise Damaged(f"expected a file's name; got {each.name!r}")
            with File(self.path / each.name) as file:
                yield file, each.size

    def add(self, data: bytes) -> bool:
        """Take bytes of one file; whether those were the last. Raises Damaged or OSError."""
        file, size = self._file
        file.write([data])
        if file.size > size:
            raise Damaged(f"expected {size} bytes of {file.path.name}; got {file.size}")
        while file.size == size:
            following = next(self._files, None)
            if following is None:
                return True
            self._file = file, size = following
        return False

    def loaded(self, engine: Engine) -> ParameterSet:
        """The set, not published; raises Damaged, OSError or OptserveErrors."""
        return travel.read(self.path, checkpoint.read(self.path), engine)

    def close(self) -> None:
        """Remove the files."""
        self._files.close()
        shutil.rmtree(self._spool, ignore_errors=True)


@dataclass(slots=True)
class Copy:
    """One set: `present` is published; what is `coming` is not until it has reached an event. Bytes are of `incoming`."""

    present: ParameterSet | None = None
    reached: Reached | None = None  # by `coming`, if there is one, else by `present`
    coming: ParameterSet | None = None
    whole_at: int = 0
    incoming: IncomingEvent | IncomingCheckpoint | None = None
    failed: bool = False
    changed: bool = field(default=False)  # since it was confirmed


class Replica:
    """Makes an engine's sets what messages say, and keeps them in a data directory if there is one. One thread at a time.

    `spool` is a directory for what is on its way.
    """

    def __init__(self, engine: Engine, directory: DataDirectory | None, spool: Path) -> None:
        self._engine = engine
        self._directory = directory
        self._spool = spool
        self._numbers = itertools.count()
        self._copies: dict[str, Copy] = {}
        self._expected: set[str] | None = None
        self._set_aside = False
        self.incarnation = 0  # of the primary
        self.taken = 0  # bytes, on this stream

    @property
    def complete(self) -> bool:
        """Whether everything is here that the primary had when this stream began."""
        if self._expected is None:
            return False
        copies = [self._copies.get(set_id) for set_id in self._expected]
        return all(copy is not None and copy.present is not None and not copy.failed for copy in copies)

    @property
    def failed(self) -> bool:
        """Whether there was something wrong with a set."""
        return any(copy.failed for copy in list(self._copies.values()))

    @property
    def events(self) -> int:
        """Events of all sets that are published."""
        return sum(copy.present.events for copy in list(self._copies.values()) if copy.present is not None)

    def begin(self) -> list[FollowedSet]:
        """Begin another stream: what is here."""
        self.taken = 0
        for copy in self._copies.values():
            self._drop_incoming(copy)
            if copy.failed:  # have it sent anew
                copy.reached = copy.coming = None
        return self._followed(self._copies)

    def take(self, message: FollowResponse) -> None:
        """Take in a message; what is wrong with a set is logged, and it is left as it was."""
        self.taken += len(message.data)
        set_id, kind = message.parameter_set_id, message.WhichOneof("kind")
        if kind == "welcome":
            self._welcome(message.welcome)
        elif set_id:
            copy = self._copies.setdefault(set_id, Copy())
            try:
                self._take(set_id, copy, message)
            except (OptserveError, OSError, ValueError, KeyError, TypeError) as error:  # as in a restoration
                log.error("a set can't be followed", parameter_set=set_id, reason=str(error))
                self._drop_incoming(copy)
                copy.failed = True

    def confirmed(self) -> list[FollowedSet]:
        """Sets that have more events than the last time, as durable as their journals say; raises StorageFailed."""
        changed = {set_id: copy for set_id, copy in self._copies.items() if copy.changed}
        for set_id, copy in changed.items():
            keeper = self._directory.keeper(set_id) if self._directory is not None else None
            if keeper is not None and keeper.parameter_set.spec.journal is Journal.ALWAYS:
                keeper.sync()
            copy.changed = False
        if self._directory is not None and self.complete and not self._set_aside:
            self._directory.set_aside()
            self._set_aside = True
        return self._followed(changed)

    def end(self) -> None:
        """Let go of all that is not whole."""
        for copy in self._copies.values():
            self._drop_incoming(copy)
            copy.coming = None

    def _welcome(self, welcome: Welcome) -> None:
        self._expected = set(welcome.parameter_set_ids)
        if welcome.incarnation == self.incarnation:
            return
        self.incarnation = welcome.incarnation
        for set_id, copy in self._copies.items():  # those that it has, it sends anew
            copy.reached = copy.coming = None
            if set_id not in self._expected:
                log.warning("a primary that was restarted does not have a set; it stays here", parameter_set=set_id)

    def _followed(self, copies: dict[str, Copy]) -> list[FollowedSet]:
        return [
            FollowedSet(id=set_id, incarnation=copy.reached.incarnation, event=copy.reached.event)
            for set_id, copy in copies.items()
            if copy.reached is not None and not copy.failed
        ]

    def _take(self, set_id: str, copy: Copy, message: FollowResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "deletion":
            self._delete(set_id, copy)
            return
        if kind == "checkpoint":
            self._drop_incoming(copy)
            copy.failed = False
            copy.incoming = IncomingCheckpoint(message.checkpoint, self._spool / str(next(self._numbers)))
        elif kind == "event" and not copy.failed:
            copy.incoming = IncomingEvent(message.event)
        if copy.incoming is None or not message.data or not copy.incoming.add(message.data):
            return
        incoming, copy.incoming = copy.incoming, None
        if isinstance(incoming, IncomingEvent):
            self._repeat(set_id, copy, incoming)
        else:
            try:
                self._load(set_id, copy, incoming)
            finally:
                incoming.close()

    def _load(self, set_id: str, copy: Copy, incoming: IncomingCheckpoint) -> None:
        header = incoming.header
        copy.coming = None  # let go of the memory before there is more
        copy.coming = incoming.loaded(self._engine)
        self._engine.compile_beside(copy.coming)
        copy.reached = Reached(header.incarnation, header.event)
        journaled = copy.coming.spec.journal is not Journal.OFF
        copy.whole_at = header.last_event if journaled else header.event
        self._publish(set_id, copy)

    def _repeat(self, set_id: str, copy: Copy, incoming: IncomingEvent) -> None:
        behind = copy.coming or copy.present
        if behind is None or copy.reached is None:
            raise Damaged(f"expected a checkpoint of {set_id!r} first; got event {incoming.number}")
        behind.repeat(incoming.decoded())
        copy.reached = copy.reached._replace(event=incoming.number)
        copy.changed = True
        self._publish(set_id, copy)

    def _publish(self, set_id: str, copy: Copy) -> None:
        """Let what is coming be here, if it is whole by now."""
        coming = copy.coming
        if coming is None or coming.events < copy.whole_at:
            return
        if self._directory is not None:
            self._directory.adopt(coming)
        former, copy.present, copy.coming, copy.changed = copy.present, coming, None, True
        self._engine.add(coming)
        if former is not None:
            former.clear()
        log.info("followed", parameter_set=set_id, version=coming.position.version, events=coming.events)

    def _delete(self, set_id: str, copy: Copy) -> None:
        self._drop_incoming(copy)
        if copy.present is not None:
            if self._directory is not None:
                self._directory.delete(set_id)
            self._engine.delete(set_id)
        del self._copies[set_id]
        if self._expected is not None:
            self._expected.discard(set_id)

    def _drop_incoming(self, copy: Copy) -> None:
        if isinstance(copy.incoming, IncomingCheckpoint):
            copy.incoming.close()
        copy.incoming = None
