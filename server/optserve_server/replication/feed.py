"""The feed: what a standby is sent, read from the data directory.

Nothing is kept in memory for a standby: a slow one is sent what the files have, and a newer checkpoint if they don't go back
far enough.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import structlog

from optserve._specification import Journal
from optserve.v1.standby_pb2 import (
    CheckpointFile,
    CheckpointHeader,
    Deletion,
    EventHeader,
    FollowResponse,
)
from optserve_server.storage import checkpoint
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.keeper import Keeper
from optserve_server.storage.tail import Record, Tail
from optserve_server.storage.tensors import Damaged

log = structlog.get_logger()

PART = 2 << 20  # bytes of data in one message


class Reached(NamedTuple):
    """What a standby has of a set: events up to one, of an incarnation on this server."""

    incarnation: int
    event: int


NOTHING = Reached(0, -1)


class Source:
    """Everything of one set that is on stable storage, as messages."""

    def __init__(self, keeper: Keeper, reached: Reached) -> None:
        self.keeper = keeper
        self._id = keeper.parameter_set.spec.id
        self._journaled = keeper.parameter_set.spec.journal is not Journal.OFF
        self._reached = reached
        self._tail = Tail(keeper.home)
        self.messages = self._messages()

    def close(self) -> None:
        """Close its files."""
        self.messages.close()
        self._tail.close()

    def _messages(self) -> Generator[FollowResponse | None]:
        """Messages without end; None while there is nothing to send. Raises Damaged or OSError."""
        while True:
            incarnation, event = self._reached
            record: Record | None = None
            if incarnation == self.keeper.parameter_set.position.incarnation:
                if self.keeper.synced <= event:
                    yield None
                    continue
                record = self._tail.record(event + 1) if self._journaled else None
            yield from self._event(record) if record is not None else self._checkpoint()

    def _event(self, record: Record) -> Iterator[FollowResponse]:
        header = record.header
        announced: EventHeader | None = EventHeader(number=header.event, message_size=header.encoded, size=header.size)
        for part in record.parts(PART):
            yield FollowResponse(parameter_set_id=self._id, event=announced, data=part)
            announced = None
        self._reached = self._reached._replace(event=header.event)

    def _checkpoint(self) -> Iterator[FollowResponse | None]:
        """The newest, if that is news."""
        incarnation = self.keeper.parameter_set.position.incarnation
        with ExitStack() as opened:
            newest = _newest(self.keeper.home, opened)
            if newest is None or (incarnation == self._reached.incarnation and newest[0] <= self._reached.event):
                yield None
                return
            event, files = newest
            header = CheckpointHeader(
                incarnation=incarnation,
                event=event,
                last_event=max(event, self.keeper.synced),
                files=[CheckpointFile(name=name, size=size) for name, size, _ in files],
            )
            yield FollowResponse(parameter_set_id=self._id, checkpoint=header)
            for name, size, file in files:
                left = size
                while left:
                    part = file.read(min(left, PART))
                    if not part:
                        raise Damaged(f"expected {size} bytes of {name}; {left} are missing")
                    left -= len(part)
                    yield FollowResponse(parameter_set_id=self._id, data=part)
        self._reached = Reached(incarnation, event)


class Feed:
    """All sets of a data directory, from what a standby has reached of each on: `next` is the next message to it."""

    def __init__(self, directory: DataDirectory, reached: Mapping[str, Reached]) -> None:
        self._directory = directory
        self._reached = dict(reached)
        self._sources: dict[str, Source] = {}
        self._deleted: deque[str] = deque(reached.keys() - {each.parameter_set.spec.id for each in directory.keepers})
        self._turn: deque[Source] = deque()

    @property
    def events(self) -> int:
        """Events of all sets on stable storage."""
        return sum(max(0, keeper.synced) for keeper in self._directory.keepers)

    def next(self) -> FollowResponse | None:
        """The next message; None if all that there is was sent. Sets take turns. Raises Damaged or OSError."""
        if self._deleted:
            return FollowResponse(parameter_set_id=self._deleted.popleft(), deletion=Deletion())
        if (message := self._next_of_turn()) is not None:
            return message
        self._look_around()
        return self._next_of_turn() if not self._deleted else self.next()

    def close(self) -> None:
        """Close all files."""
        for source in self._sources.values():
            source.close()

    def _next_of_turn(self) -> FollowResponse | None:
        while self._turn:
            message = next(self._turn.popleft().messages)
            if message is not None:
                return message
        return None

    def _look_around(self) -> None:
        """Begin another turn, of the sets that there are now."""
        keepers = {keeper.parameter_set.spec.id: keeper for keeper in self._directory.keepers}
        for set_id in self._sources.keys() - keepers.keys():
            self._sources.pop(set_id).close()
            self._deleted.append(set_id)
        for set_id, keeper in keepers.items():
            present = self._sources.get(set_id)
            if present is None or present.keeper is not keeper:
                if present is not None:
                    present.close()
                self._sources[set_id] = Source(keeper, self._reached.pop(set_id, NOTHING))
        self._turn.extend(self._sources.values())


def _newest(home: Path, opened: ExitStack) -> tuple[int, list[tuple[str, int, FileIO]]] | None:
    """The event of the newest checkpoint that can be opened, and its files with names and sizes, the manifest first; they stay
    open though they may be removed."""
    for path in checkpoint.present(home):
        try:
            with ExitStack() as attempt:
                paths = sorted(path.iterdir(), key=lambda each: (each.name != checkpoint.MANIFEST, each.name))
                files = [attempt.enter_context(each.open("rb", buffering=0)) for each in paths]
                if not paths or paths[0].name != checkpoint.MANIFEST:
                    continue
                opened.enter_context(attempt.pop_all())
        except FileNotFoundError:  # removed just now
            continue
        described = [
            (each.name, os.fstat(file.fileno()).st_size, file) for each, file in zip(paths, files, strict=True)
        ]
        return checkpoint.event_of(path), described
    return None
