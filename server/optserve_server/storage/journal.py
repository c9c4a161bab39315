"""Journals: every event of a set, on stable storage before it is acknowledged, or a second later.

A journal is a row of segments, files whose first event is in their name. Each is made of records: a header, with a checksum of
its own that nobody can guess (a salt is in it), and an event, whose checksum goes on from that of the event before. Segments
and records also say which event was known to be on stable storage when they were written. So a reader tells what a crash left
unfinished (nothing that came later knew it to be stored: it is passed over) from damage (refused).
"""

import contextlib
import itertools
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from optserve._errors import StorageFailed
from optserve._results import Durability
from optserve._specification import Journal as Setting
from optserve_server.engine.arena import padded
from optserve_server.engine.history import Event, Stored
from optserve_server.storage import events as encoding
from optserve_server.storage import files
from optserve_server.storage.files import File, Pages
from optserve_server.storage.tensors import Damaged

log = structlog.get_logger()

WINDOW = 1.0  # seconds for which an acknowledged event may not be on stable storage, with "everysec"
GRAIN = 1 << 20  # bytes; segments grow by multiples of it
PREFIX = "journal-"

Unfinished = Callable[[Path, int], None]  # a segment, and the first event that it does not have whole

_SEGMENT = struct.Struct("<8sQQQ")  # magic, salt, first event, event known to be stored
_RECORD = struct.Struct(
    "<4sQIQQI"
)  # magic, size of the payload, of its message, event, event known to be stored, checksum
_CHECKSUM = struct.Struct("<I")  # of a header
_SEGMENT_MAGIC = b"optjrnl1"
_RECORD_MAGIC = b"optR"
SEGMENT_SIZE = _SEGMENT.size + _CHECKSUM.size
RECORD_SIZE = _RECORD.size + _CHECKSUM.size


class Journal:
    """The journal of one set, to which events go; a `Log`.

    `stored` is called with what has come to be on stable storage, `fence` before, which raises OSError if another server may
    have read the journal without that. With "everysec", `sync_if_due` must be called often. After an error of a sync nothing
    is acknowledged any more. Raises OSError or StorageFailed.
    """

    def __init__(
        self,
        home: Path,
        last_event: int,
        version: int,
        setting: Setting,
        stored: Callable[[Stored], None],
        fence: Callable[[], None],
        pages: Pages,
    ) -> None:
        self._home = home
        self._pages = pages
        self._fence = fence
        self._always = setting is Setting.ALWAYS
        self._stored = stored
        self._changed = threading.Condition()
        self._last = last_event
        self._checksum = 0
        self._version = version
        self._synced = last_event
        self._waiting_since: float | None = None  # when the oldest event came that is not synced
        self._newer_since: float | None = None  # when the oldest came that is not being synced either
        self._sequences: dict[tuple[str, int], int] = {}
        self._syncing = False
        self._failure: str | None = None
        self._torn = False  # whether a write has failed in the present segment
        self._unsynced: list[File] = []  # segments that came to their end; the last one is the present one
        for first, path in segments(home):
            if first > last_event:  # begun before a crash, and what came before it is gone
                files.remove(path)
            else:  # a crash of the server alone may have left what could be read, and was never synced
                files.sync(path)
        files.sync_directory(home)
        self._begin()

    def append(self, events: Iterable[Event]) -> None:
        new = list(events)
        with self._changed:
            self._check()
        if self._torn:  # what was written there might be read for what would be next
            self._begin()
        file, size, checksum = self._file, self._file.size, self._checksum
        try:
            buffers = [buffer for event in new for buffer in self._record(event)]
            nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
            end = file.size + nbytes + 2 * files.PAGE
            if end > file.reserved:
                file.reserve(padded(end, GRAIN))
            self._torn = True
            if nbytes < GRAIN:
                file.write(buffers)
            else:
                self._pages.write(file, buffers)
            self._torn = False
        except BaseException as error:
            file.rewind(size)
            self._checksum = checksum
            if isinstance(error, OSError):
                raise StorageFailed(f"the journal can't be written, and nothing was applied: {error}") from error
            raise
        with self._changed:
            self._last, self._version = new[-1].number, new[-1].version
            now = time.monotonic()
            if self._waiting_since is None:
                self._waiting_since = now
            elif self._syncing and self._newer_since is None:
                self._newer_since = now
            for event in new:
                for each in event.pushes:
                    self._sequences[each.client_id, each.epoch] = each.receipt.sequence

    def wait(self, number: int) -> None:
        with self._changed:
            while self._synced < number:
                self._check()
                if not self._always:
                    if self._waiting_since is None or time.monotonic() - self._waiting_since < WINDOW:
                        return
                    self._changed.wait()
                elif self._syncing:
                    self._changed.wait()
                else:
                    self._sync()

    def sync_if_due(self) -> None:
        """Sync what has waited for half the window; raises StorageFailed."""
        with self._changed:
            since = self._waiting_since
            if since is not None and time.monotonic() - since >= WINDOW / 2 and not self._syncing:
                self._check()
                self._sync()

    def sync(self, number: int | None = None) -> None:
        """Put all events, or those up to a number, on stable storage; raises StorageFailed."""
        with self._changed:
            while self._synced < (self._last if number is None else number):
                self._check()
                if self._syncing:
                    self._changed.wait()
                else:
                    self._sync()

    def rotate(self) -> None:
        """Let later events go to a new segment, so that the older can be removed; raises StorageFailed."""
        if self._file.size > SEGMENT_SIZE:
            self._begin()

    @property
    def failure(self) -> str | None:
        """Why nothing is acknowledged any more, if so."""
        return self._failure

    def skip(self, last_event: int, version: int) -> None:
        """Let the next event be another, for a checkpoint leads there; raises StorageFailed, and then it is the one that it
        was, or nothing is acknowledged any more."""
        with self._changed:
            while self._syncing:
                self._changed.wait()
            before = self._last, self._version
            if before == (last_event, version):
                return
            self._last, self._version = last_event, version
            self._synced = min(self._synced, last_event)
        try:
            for first, path in segments(self._home):
                if first > last_event + 1:  # of a history that was not to be
                    files.remove(path)
        except OSError as error:
            self.fail(str(error))
            raise
        try:
            self._begin()
        except StorageFailed as error:
            if last_event < before[0]:  # what there is leads elsewhere
                self.fail(str(error))
                raise
            with self._changed:
                while self._syncing:  # as far as it was to go
                    self._changed.wait()
                self._last, self._version = before
                self._synced = min(self._synced, before[0])
            raise

    def move(self, home: Path) -> None:
        """Go on in another directory, which this one has become."""
        with self._changed:
            while self._syncing:
                self._changed.wait()
            self._home = home

    def fail(self, reason: str) -> None:
        """Acknowledge nothing any more."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    def close(self) -> None:
        """Close the segments; what is not synced may be lost."""
        self.fail("the journal was closed")
        with self._changed:
            while self._syncing:
                self._changed.wait()
        for file in self._unsynced:
            file.close()
        self._unsynced = []

    def _begin(self) -> None:
        path = path_of(self._home, self._last + 1)
        temporary = path.with_name(path.name + files.TEMPORARY)
        salt = secrets.randbits(64)
        header = _sealed(_SEGMENT.pack(_SEGMENT_MAGIC, salt, self._last + 1, self._synced), 0)
        try:
            files.remove(temporary)
            file = File(temporary)
            try:
                file.reserve(GRAIN)
                file.write([header])
                file.sync()
                files.rename(temporary, path)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            with contextlib.suppress(OSError):
                files.remove(temporary)
            raise StorageFailed(f"no segment of the journal can be begun: {error}") from error
        self._file, self._salt, self._torn = file, salt, False
        self._checksum = zlib.crc32(header)
        with self._changed:
            self._unsynced.append(self._file)
            self._new = True  # its name is not synced yet

    def _record(self, event: Event) -> list[Any]:
        encoded, data = encoding.encode(event)
        checksum = zlib.crc32(encoded, self._checksum)
        size = len(encoded)
        for buffer in data:
            checksum = zlib.crc32(buffer, checksum)
            size += memoryview(buffer).nbytes
        self._checksum = checksum
        header = _RECORD.pack(_RECORD_MAGIC, size, len(encoded), event.number, self._synced, checksum)
        return [_sealed(header, self._salt), encoded, *data]

    def _sync(self) -> None:
        """Sync what there is; called under the lock, which is let go of meanwhile."""
        self._syncing = True
        segments, last, version = list(self._unsynced), self._last, self._version
        sequences, self._sequences = self._sequences, {}
        new = self._new
        self._changed.release()
        try:
            for segment in segments:
                segment.sync()
            if new:
                files.sync_directory(self._home)
            self._fence()  # who took over before this has not read it all
        except OSError as error:
            failure: str | None = f"the journal can't be synced, and acknowledges nothing more until a restart: {error}"
        else:
            failure = None
        finally:
            self._changed.acquire()
            self._syncing = False
            self._changed.notify_all()
        if failure is not None:
            self._failure = failure
            log.error("journal failed", home=str(self._home), reason=failure)
            self._check()
        self._synced = last
        self._waiting_since, self._newer_since = self._newer_since, None
        self._new = self._new and self._file is not segments[-1]
        for segment in segments[:-1]:
            segment.close()
        self._unsynced = self._unsynced[len(segments) - 1 :]
        pushed = [(*session, sequence) for session, sequence in sequences.items()]
        self._stored(Stored(last, version, pushed, Durability.JOURNAL))

    def _check(self) -> None:
        if self._failure is not None:
            raise StorageFailed(self._failure)


def path_of(home: Path, first_event: int) -> Path:
    """Where the segment that begins with an event is."""
    return home / f"{PREFIX}{first_event:020d}"


def segments(home: Path) -> list[tuple[int, Path]]:
    """The segments in a set's directory with their first events, in order."""
    names = [path for path in home.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted((int(path.name.removeprefix(PREFIX)), path) for path in names)


def remove_before(home: Path, event: int) -> None:
    """Remove the segments that have no event after a number; raises OSError."""
    present = segments(home)
    for (_, path), (next_first, _) in itertools.pairwise(present):
        if next_first <= event + 1:
            files.remove(path)


def say_unfinished(path: Path, number: int) -> None:
    """Say that the end of a segment, from an event on, was passed over."""
    log.warning("passed over the unfinished end of a journal", path=str(path), first_event=number)


def read(home: Path, after: int, unfinished: Unfinished = say_unfinished) -> Iterator[Event]:
    """All events after a number, in order; raises Damaged if one is missing that may have been acknowledged, or OSError.

    `unfinished` is called for what a crash left.
    """
    present = segments(home)
    number = after
    for place, (first, path) in enumerate(present):
        if place + 1 < len(present) and present[place + 1][0] <= after + 1:
            continue
        segment = Segment(path, first, unfinished)
        if first > number + 1:
            if segment.known_stored() > number:
                raise Damaged(f"{path}: expected event {number + 1} before; a later one knew it to be stored")
            unfinished(path, number + 1)
            return
        end = present[place + 1][0] if place + 1 < len(present) else None
        for event in segment:
            if event.number == end:  # written after all, though the server was told otherwise; and then once more
                break
            if event.number > number:
                number = event.number
                yield event


class Header(NamedTuple):
    """What a record says of itself."""

    size: int
    encoded: int
    event: int
    synced: int
    checksum: int


class Segment:
    """The events of one segment, read one by one until what a crash left unfinished; raises Damaged or OSError."""

    def __init__(self, path: Path, first: int, unfinished: Unfinished) -> None:
        self._path = path
        self._first = first
        self._unfinished = unfinished

    def __iter__(self) -> Iterator[Event]:
        with self._path.open("rb", buffering=0) as file:
            salt, _, checksum = self.opened(file)
            place, number = SEGMENT_SIZE, self._first
            while found := record_at(file, place, salt, number):
                place, header = found
                payload = memoryview(_read(file, place + RECORD_SIZE, header.size))
                checksum = zlib.crc32(payload, checksum)
                if len(payload) < header.size or checksum != header.checksum:
                    break
                yield encoding.decode(bytes(payload[: header.encoded]), payload[header.encoded :])
                place += RECORD_SIZE + header.size
                number += 1
            if self._known_stored(file, place, salt) >= number:
                raise Damaged(f"{self._path}: event {number} is damaged, or missing; a later one knew it to be stored")
            if any(_read(file, place, RECORD_SIZE)):
                self._unfinished(self._path, number)

    def known_stored(self) -> int:
        """The last event that anything in the segment knew to be on stable storage."""
        with self._path.open("rb", buffering=0) as file:
            salt, synced, _ = self.opened(file)
            return max(synced, self._known_stored(file, SEGMENT_SIZE, salt))

    def opened(self, file: Any) -> tuple[int, int, int]:
        """Salt, event known to be stored, and checksum of the segment's header."""
        size = file.seek(0, 2)
        if size < GRAIN:
            raise Damaged(f"{self._path}: expected at least {GRAIN} bytes; got {size}: it was cut")
        if size % GRAIN:  # as a crash may leave one that was to grow
            log.warning("a segment of a journal ends early", path=str(self._path), size=size)
        header = _read(file, 0, SEGMENT_SIZE)
        magic, salt, first, synced = _SEGMENT.unpack_from(header)
        if (magic, first, header) != (_SEGMENT_MAGIC, self._first, _sealed(header[: _SEGMENT.size], 0)):
            raise Damaged(f"{self._path}: the header of the segment is damaged")
        return salt, synced, zlib.crc32(header)

    def _known_stored(self, file: Any, place: int, salt: int) -> int:
        """What records from there on knew to be on stable storage, wherever they begin."""
        known = 0
        while data := _read(file, place, GRAIN + RECORD_SIZE):
            begin = -1
            while (begin := data.find(_RECORD_MAGIC, begin + 1)) >= 0:
                header = _header(data[begin : begin + RECORD_SIZE], salt)
                known = max(known, header.synced if header is not None else 0)
            place += GRAIN
        return known


def _sealed(header: bytes, salt: int) -> bytes:
    return header + _CHECKSUM.pack(zlib.crc32(header, salt & 0xFFFFFFFF))


def _header(data: bytes, salt: int) -> Header | None:
    if len(data) < RECORD_SIZE or data != _sealed(data[: _RECORD.size], salt) or data[:4] != _RECORD_MAGIC:
        return None
    return Header(*_RECORD.unpack_from(data)[1:])


def record_at(file: Any, place: int, salt: int, number: int) -> tuple[int, Header] | None:
    """Where a record is and what it says of itself: there, or, since large ones do, where the next page begins."""
    for begin in (place, padded(place, files.PAGE)):
        header = _header(_read(file, begin, RECORD_SIZE), salt)
        if header is not None and header.event == number:
            return begin, header
    return None


def _read(file: Any, place: int, size: int) -> bytes:
    """So many bytes of a file, or as many as there are."""
    file.seek(place)
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
