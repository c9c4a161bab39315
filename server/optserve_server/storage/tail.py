"""The tail of a journal: its records one by one, read as bytes while the journal is being written."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from optserve_server.storage import journal
from optserve_server.storage.journal import RECORD_SIZE, SEGMENT_SIZE, Header, Segment
from optserve_server.storage.tensors import Damaged


@dataclass(slots=True)
class Record:
    """An event as the journal has it; the file stays open while it is the tail's."""

    header: Header
    path: Path
    file: BinaryIO
    place: int
    before: int  # checksum

    def parts(self, size: int) -> Iterator[bytes]:
        """Its payload, so many bytes at a time; raises Damaged before the last if they are not what was written, or OSError."""
        checksum, end = self.before, self.place + self.header.size
        for begin in range(self.place, end, size):
            part = os.pread(self.file.fileno(), min(size, end - begin), begin)
            checksum = zlib.crc32(part, checksum)
            if begin + size >= end and checksum != self.header.checksum:
                raise Damaged(f"{self.path}: event {self.header.event} is damaged")
            yield part


class Tail:
    """Finds the records of a journal, any of them, and the next one at once."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home
        self._file: BinaryIO | None = None
        self._salt = 0
        self._place = 0  # where the record of the next event begins, if it is in this file
        self._checksum = 0
        self._next = 0

    def record(self, event: int) -> Record | None:
        """The record of an event that is known to be stored, or None if no segment has it; raises Damaged or OSError."""
        # What is in the segment before, with that number, does not count.
        begun_there = journal.path_of(self._home, event)
        begun = begun_there != self._path and begun_there.exists()
        if self._file is not None and not begun and self._next <= event and (found := self._found(event)) is not None:
            return found
        for first, path in reversed(journal.segments(self._home)):
            if first <= event and self._opened(first, path) and (found := self._found(event)) is not None:
                return found
        return None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, first: int, path: Path) -> bool:
        self.close()
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:  # removed just now
            return False
        self._path = path
        self._salt, _, self._checksum = Segment(path, first, journal.say_unfinished).opened(self._file)
        self._place, self._next = SEGMENT_SIZE, first
        return True

    def _found(self, event: int) -> Record | None:
        """Go on to the record of an event, past those before."""
        assert self._file is not None
        while self._next <= event and (there := journal.record_at(self._file, self._place, self._salt, self._next)):
            place, header = there
            record = Record(header, self._path, self._file, place + RECORD_SIZE, self._checksum)
            self._place = place + RECORD_SIZE + header.size
            self._checksum = header.checksum
            self._next += 1
            if header.event == event:
                return record
        return None
