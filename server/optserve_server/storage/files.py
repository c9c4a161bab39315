"""Files that survive a crash: everything that storage writes goes through here, and nothing is durable before it is synced.

A file's bytes are durable after `File.sync`, its name after `sync_directory` of the directory that it is in. An error of a
sync is never tried again: the kernel may have dropped the pages that it could not write (https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from optserve._copy import copy_array
from optserve_server.engine.arena import padded

MODE = 0o600
LARGEST_WRITE = 16 << 20  # bytes in one call, so that others get their turn in between
PAGE = 4096  # bytes
MOST_BUFFERS = 512  # in one call; POSIX promises 16, Linux 1024

TEMPORARY = ".new"  # suffix of what is not there yet, if it is found after a crash
CONDEMNED = ".deleted"  # suffix of what is not there any more


class File:
    """A new file, written in order; raises OSError, after which what was written is not to be used."""

    def __init__(self, path: Path) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        self.path = path
        self._descriptor = os.open(path, flags, MODE)
        self.size = 0  # bytes written
        self.reserved = 0

    def write(self, buffers: Sequence[Any]) -> None:
        """Append bytes-like objects, all of them."""
        left = [part for buffer in buffers for part in _parts(memoryview(buffer).cast("B"))]
        left.reverse()
        while left:
            batch: list[memoryview] = []
            nbytes = 0
            while left and len(batch) < MOST_BUFFERS and nbytes + len(left[-1]) <= LARGEST_WRITE:
                nbytes += len(left[-1])
                batch.append(left.pop())
            written = _write(self._descriptor, batch, self.size)
            self.size += written
            for part in reversed(batch):  # a short write leaves the rest
                nbytes -= len(part)
                if written < nbytes + len(part):
                    left.append(part[max(0, written - nbytes) :])

    def write_pages(self, memory: memoryview) -> None:
        """Append whole pages that begin at a page, at the file's own page, without a copy in the kernel if that can be."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # not on every file system
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            self.write([memory])
        finally:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)

    def align(self) -> None:
        """Go on at the beginning of a page."""
        self.size = padded(self.size, PAGE)

    def cut(self, size: int) -> None:
        """Let the file end there."""
        os.ftruncate(self._descriptor, size)
        self.size = size

    def reserve(self, size: int) -> None:
        """Have room for so many bytes in all; those that are not written read as zeros."""
        os.posix_fallocate(self._descriptor, 0, size)
        self.reserved = size

    def rewind(self, size: int) -> None:
        """Write from there on again, over what came after."""
        self.size = size

    def sync(self) -> None:
        """Put all that was written on stable storage."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close it; what was not synced may be lost."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Pages:
    """Memory through which large amounts get to files page by page, and so past the page cache; threads take turns."""

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] | None = None
        self._turn = threading.Lock()

    def write(self, file: File, buffers: Sequence[Any]) -> None:
        """Append bytes-like objects in pages of their own, the last one filled up with zeros; raises OSError."""
        with self._turn:
            if self._memory is None:
                memory = np.zeros(LARGEST_WRITE + PAGE, np.uint8)
                self._memory = memory[-memory.ctypes.data % PAGE :][:LARGEST_WRITE]
            file.align()
            filled = 0
            for part in (part for buffer in buffers for part in _parts(memoryview(buffer).cast("B"))):
                begin = 0
                while begin < len(part):
                    size = min(len(part) - begin, LARGEST_WRITE - filled)
                    copy_array(
                        self._memory[filled : filled + size], np.frombuffer(part[begin : begin + size], np.uint8)
                    )
                    begin, filled = begin + size, filled + size
                    if filled == LARGEST_WRITE:
                        file.write_pages(self._memory.data)
                        filled = 0
            end = padded(filled, PAGE)
            self._memory[filled:end] = 0
            file.write_pages(self._memory[:end].data)


def write_file(path: Path, data: bytes) -> None:
    """Let a path have new content, durably and at once; raises OSError, and then it has what it had."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    with File(temporary) as file:
        file.write([data])
        file.sync()
    rename(temporary, path)
    sync_directory(path.parent)


def rename(source: Path, target: Path) -> None:
    """Let what is at one path be at another, instead of what is there; durable once the directory is synced."""
    source.rename(target)


def link(source: Path, target: Path) -> None:
    """Let a file have another name as well; durable once the directory is synced."""
    target.hardlink_to(source)


def make_directory(path: Path) -> None:
    """Make a directory; durable once the one that it is in is synced."""
    path.mkdir(mode=0o700)


def make_directories(path: Path) -> None:
    """Have a directory, and those that it is in, durably, whoever made them."""
    if not path.exists():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # of somebody else's directory, which was there before
        sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Remove a directory, which from now on does not count, and then what is in it."""
    condemned = path if path.name.endswith(CONDEMNED) else path.with_name(path.name + CONDEMNED)
    if condemned is not path:
        if condemned.exists():  # since it could not be removed before
            shutil.rmtree(condemned)
        rename(path, condemned)
        sync_directory(path.parent)
    shutil.rmtree(condemned)


def sync(path: Path) -> None:
    """Put on stable storage what a file has, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on stable storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(view: memoryview) -> list[memoryview]:
    return [view[begin : begin + LARGEST_WRITE] for begin in range(0, len(view), LARGEST_WRITE)]


def _write(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Write some of the bytes at an offset; how many."""
    return os.pwritev(descriptor, buffers, offset)
