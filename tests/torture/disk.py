"""A disk that loses power: a record of what is done to files, and what any moment of it may have left.

A `Recorder` stands between this process and the files below a directory. What is written there is durable up to the last sync
of the file, a name up to the last sync of the directory that it is in; of everything else a crash leaves what it likes.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

SECTOR = 512  # bytes that a disk writes whole or not at all
GARBAGE = 0.02  # of the sectors that were being written have anything where they were to change

Files = dict[str, bytes | None]  # by path; None for a directory


@dataclass(eq=False)
class Inode:
    """A file with the bytes that it had when the record began, or a directory with the names that it has, and had then."""

    began: bytes = b""
    names: dict[str, "Inode"] | None = None
    first: dict[str, "Inode"] = field(default_factory=dict)


class Write(NamedTuple):
    """Bytes at a place of a file."""

    inode: Inode
    place: int
    data: bytes


class Grow(NamedTuple):
    """Room for so many bytes in a file, which read as zeros."""

    inode: Inode
    size: int


class Cut(NamedTuple):
    """A file ends there."""

    inode: Inode
    size: int


class Rename(NamedTuple):
    """Names of a directory that change at once: to what, None if they are gone, and from what."""

    inode: Inode
    changes: Sequence[tuple[str, Inode | None, Inode | None]]


class Sync(NamedTuple):
    """All that had been done to a file or directory is durable."""

    inode: Inode


class Mark(NamedTuple):
    """What somebody was told at that moment."""

    says: Any


Entry = Write | Grow | Cut | Rename | Sync | Mark


class Recorder:
    """The record of what happens below a directory; syncs are recorded, and not done."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.top = _inode(self.root)
        self.record: list[Entry] = []
        self._open: dict[int, Inode] = {}
        self._lock = threading.RLock()

    def mark(self, says: Any) -> None:
        """Note what somebody was told."""
        with self._lock:
            self.record.append(Mark(says))

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Record what this process does there."""
        handlers = {
            "open": self._opened,
            "close": self._closed,
            "pwritev": self._written,
            "posix_fallocate": self._grown,
            "ftruncate": self._cut,
            "fsync": self._synced,
            "fdatasync": self._synced,
            "rename": self._renamed,
            "link": self._linked,
            "mkdir": self._made,
            "unlink": self._removed,
            "rmdir": self._removed,
        }
        with mock.patch.multiple(os, **{name: self._wrapped(name, handler) for name, handler in handlers.items()}):
            yield self

    def die(self) -> None:
        """Close what is open, as for a process that was killed."""
        for descriptor in [*self._open]:
            os.close(descriptor)

    def check(self) -> None:
        """Raises AssertionError if anything was done to the files that is not in the record."""
        recorded = left(self.top, self.record, len(self.record), None)
        there = {path: data for path, data in below(self.root).items() if not path.endswith("LOCK")}  # opened by `open`
        assert recorded == there, sorted(
            path for path in recorded.keys() | there.keys() if recorded.get(path, 0) != there.get(path, 0)
        )

    def _wrapped(self, name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                return handler(original, *arguments, **options)

        return call

    def _opened(self, original: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor: int = original(path, flags, mode, dir_fd=dir_fd)
        place = self._place(path, dir_fd)
        if place is not None:
            directory, name = place
            inode = self.top if name == "" else _names(directory).get(name)
            if inode is None:
                inode = Inode()
                self._change(directory, (name, inode))
            self._open[descriptor] = inode
        return descriptor

    def _closed(self, original: Any, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        original(descriptor)

    def _written(self, original: Any, descriptor: int, buffers: Sequence[Any], place: int, *more: Any) -> int:
        written: int = original(descriptor, buffers, place, *more)
        if inode := self._open.get(descriptor):
            self.record.append(Write(inode, place, b"".join(buffers)[:written]))
        return written

    def _grown(self, original: Any, descriptor: int, offset: int, size: int) -> None:
        original(descriptor, offset, size)
        if inode := self._open.get(descriptor):
            self.record.append(Grow(inode, offset + size))

    def _cut(self, original: Any, descriptor: int, size: int) -> None:
        original(descriptor, size)
        if inode := self._open.get(descriptor):
            self.record.append(Cut(inode, size))

    def _synced(self, original: Any, descriptor: int) -> None:
        if inode := self._open.get(descriptor):
            self.record.append(Sync(inode))
        else:
            original(descriptor)

    def _renamed(self, original: Any, source: Any, target: Any) -> None:
        original(source, target)
        if (before := self._place(source)) and (after := self._place(target)):
            assert before[0] is after[0], "expected a rename in one directory"
            self._change(before[0], (before[1], None), (after[1], _names(before[0])[before[1]]))

    def _linked(self, original: Any, source: Any, target: Any, **options: Any) -> None:
        original(source, target, **options)
        if (before := self._place(source)) and (after := self._place(target)):
            self._change(after[0], (after[1], _names(before[0])[before[1]]))

    def _made(self, original: Any, path: Any, mode: int = 0o777) -> None:
        original(path, mode)
        if place := self._place(path):
            self._change(place[0], (place[1], Inode(names={})))

    def _removed(self, original: Any, path: Any, *, dir_fd: int | None = None) -> None:
        original(path, dir_fd=dir_fd)
        if place := self._place(path, dir_fd):
            self._change(place[0], (place[1], None))

    def _change(self, directory: Inode, *changes: tuple[str, Inode | None]) -> None:
        names = _names(directory)
        self.record.append(Rename(directory, [(name, now, names.get(name)) for name, now in changes]))
        _apply(names, self.record[-1])

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[Inode, str] | None:
        """The directory that a path is in and its name there, which is empty for the root; None if it is elsewhere."""
        base = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        path = base / path
        if path == self.root:
            return self.top, ""
        if not path.is_relative_to(self.root):
            return None
        *parents, name = path.relative_to(self.root).parts
        directory = self.top
        for parent in parents:
            directory = _names(directory)[parent]
        return directory, name


class Chance:
    """Chooses what a crash leaves of what was not synced. A mood decides for a whole crash, so that extremes occur, too."""

    def __init__(self, random: random.Random) -> None:
        self._random = random
        self._mood = random.choices(["nothing", "everything", "anything"], [1, 1, 6])[0]

    def names(self, pending: Sequence[Rename]) -> Sequence[Rename]:
        """Those changes of a directory that have reached the disk: the first ones, or any."""
        match self._chosen("first", "any"):
            case "nothing":
                return ()
            case "everything":
                return pending
            case "first":
                return pending[: self._random.randint(0, len(pending))]
        return [change for change in pending if self._random.random() < 0.5]

    def data(self, began: bytes, pending: Sequence[Write | Grow | Cut]) -> bytes:
        """What a file has: all up to some byte, or any sectors, each as it was at any time."""
        match self._chosen("first", "any"):
            case "nothing":
                return began
            case "everything":
                return _written(began, pending)
            case "first":
                some = list(pending[: self._random.randint(1, len(pending))])
                last = some[-1]
                if isinstance(last, Write):
                    some[-1] = last._replace(data=last.data[: self._random.randint(0, len(last.data))])
                return _written(began, some)
        return self._sectors([_written(began, pending[:count]) for count in range(len(pending) + 1)])

    def _sectors(self, versions: Sequence[bytes]) -> bytes:
        smallest, largest = min(map(len, versions)), max(map(len, versions))
        size = self._random.choice([smallest, largest, self._random.randint(smallest, largest)])
        data = bytearray(size)
        for begin in range(0, size, SECTOR):
            end = min(begin + SECTOR, size)
            different = sorted({version[begin:end].ljust(end - begin, b"\0") for version in versions})
            data[begin:end] = self._random.choice(different)
            if len(different) > 1 and self._random.random() < GARBAGE:
                for place, choices in enumerate(zip(*different, strict=True)):
                    if len(set(choices)) > 1:
                        data[begin + place] = self._random.randrange(256)
        return bytes(data)

    def _chosen(self, *kinds: str) -> str:
        if self._mood != "anything":
            return self._mood
        return self._random.choice(["nothing", "everything", *kinds])


def left(top: Inode, record: Sequence[Entry], point: int, chance: Chance | None) -> Files:
    """The files that a crash after so many entries of the record leaves; without a chance, all is there that was done."""
    synced = {entry.inode: place for place, entry in enumerate(record[:point]) if isinstance(entry, Sync)}
    durable: dict[Inode, list[Any]] = {}
    pending: dict[Inode, list[Any]] = {}
    for place, entry in enumerate(record[:point]):
        if isinstance(entry, Write | Grow | Cut | Rename):
            which = pending if chance is not None and place > synced.get(entry.inode, -1) else durable
            which.setdefault(entry.inode, []).append(entry)
    files: Files = {}

    def visit(path: str, inode: Inode) -> None:
        done, open_ = durable.get(inode, []), pending.get(inode, [])
        if inode.names is None:
            data = _written(inode.began, done)
            files[path] = chance.data(data, open_) if chance is not None and open_ else data
            return
        names = inode.first.copy()
        for change in [*done, *(chance.names(open_) if chance is not None and open_ else ())]:
            _apply(names, change)
        files[path] = None
        for name, each in names.items():
            visit(f"{path}/{name}" if path else name, each)

    visit("", top)
    del files[""]
    return files


def below(root: Path) -> Files:
    """The files that there are."""
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def put(files: Files, root: Path) -> None:
    """Make a directory with these files."""
    root.mkdir()
    for path, data in files.items():
        (root / path).mkdir() if data is None else (root / path).write_bytes(data)


def _inode(path: Path) -> Inode:
    if not path.is_dir():
        return Inode(path.read_bytes())
    names = {each.name: _inode(each) for each in path.iterdir()}
    return Inode(names=names, first=names.copy())


def _names(directory: Inode) -> dict[str, Inode]:
    assert directory.names is not None
    return directory.names


def _apply(names: dict[str, Inode], change: Rename) -> None:
    for name, now, was in change.changes:
        if now is not None:
            names[name] = now
        elif names.get(name) is was:  # else it is another's by now
            names.pop(name, None)


def _written(began: bytes, writes: Sequence[Write | Grow | Cut]) -> bytes:
    data = bytearray(began)
    for each in writes:
        if isinstance(each, Cut):
            del data[each.size :]
            continue
        end = each.size if isinstance(each, Grow) else each.place + len(each.data)
        data.extend(bytes(max(0, end - len(data))))
        if isinstance(each, Write):
            data[each.place : end] = each.data
    return bytes(data)
