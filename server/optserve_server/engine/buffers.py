"""Buffers: memory for parameters in which an update writes where nobody reads.

While a version is read, sent over a stream or mapped by a worker, its buffer is pinned. The update of a version that nobody
reads happens in place; any other goes to another buffer, and publishing it is a switch of pointers. Readers never wait for
writers, nor writers for readers. Two buffers are read and written in turn; one more is for a reader that is slow.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._specification import MOST_BUFFERS, TensorSpec
from optserve_server.engine.arena import Arena, Layout, aligned, padded


@dataclass(frozen=True, slots=True)
class Memory:
    """Zeroed bytes, and what lets other processes map them, if anything does."""

    array: NDArray[np.uint8]
    segment: object = None


Allocate = Callable[[int], Memory]


def private(nbytes: int) -> Memory:
    """Memory of this process alone."""
    return Memory(aligned(nbytes))


class Buffer:
    """Every tensor of a set, in the wire's format, with the arena that updates compute in.

    A tensor that is computed in its own dtype has one place for both; one of half precision has a float32 master in the
    arena, and is encoded into a place behind it. `stamps`, int64 [tensors], tells which update wrote each tensor last.
    """

    def __init__(self, tensors: tuple[TensorSpec, ...], layout: Layout, memory: Memory) -> None:
        self.memory = memory
        self.arena: Arena = layout.view(memory.array)
        self.data = [
            memory.array[offset : offset + tensor.nbytes]
            for tensor, offset in zip(tensors, published_offsets(tensors, layout), strict=True)
        ]
        self.stamps = np.full(len(tensors), -1, np.int64)
        self.encoded = False
        self.pins = 0


class Buffers:
    """The buffers of one set. `pin`, `writable` and `publish` are called under the set's lock, `unpin` at any time."""

    def __init__(self, tensors: tuple[TensorSpec, ...], layout: Layout, allocate: Allocate) -> None:
        self._tensors = tensors
        self._layout = layout
        self._allocate = allocate
        self._lock = threading.Lock()
        self.current = self._new()
        self.current.stamps.fill(0)
        self._others: list[Buffer] = []

    @property
    def memories(self) -> list[Memory]:
        """The memory of all buffers."""
        with self._lock:
            return [buffer.memory for buffer in (self.current, *self._others)]

    def pin(self) -> Buffer | None:
        """Keep the current version as it is until `unpin`; None if no memory would be left for the next update."""
        with self._lock:
            if (
                not self.current.pins
                and len(self._others) == MOST_BUFFERS - 1
                and all(each.pins for each in self._others)
            ):
                return None
            self.current.pins += 1
            return self.current

    def pin_again(self, buffer: Buffer) -> None:
        """Take `unpin` back, before anything was written."""
        with self._lock:
            buffer.pins += 1

    def unpin(self, buffer: Buffer) -> None:
        """Let go of a version."""
        with self._lock:
            buffer.pins -= 1

    def writable(self) -> Buffer:
        """Where the next update writes: the current buffer if nobody reads it; raises MemoryError or OSError."""
        with self._lock:
            free = [each for each in self._others if not each.pins][:1]
            self._others = [each for each in self._others if each.pins] + free  # one spare is enough
            if not self.current.pins:
                return self.current
            if not free:
                free = [self._new()]
                self._others += free
            return free[0]

    def publish(self, buffer: Buffer, updated: Iterable[int], stamp: int) -> None:
        """Make a buffer current after an update of some tensors; the others are brought over."""
        buffer.stamps[list(updated)] = stamp
        buffer.encoded = False
        if buffer is self.current:
            return
        for index in np.flatnonzero(buffer.stamps < self.current.stamps):
            place = self._layout.places[index]
            elements = slice(place.start, place.start + place.size)
            np.copyto(buffer.arena[place.compute][elements], self.current.arena[place.compute][elements])
            buffer.stamps[index] = self.current.stamps[index]
        with self._lock:
            self._others = [each for each in self._others if each is not buffer] + [self.current]
            self.current = buffer

    def clear(self) -> None:
        """Let go of all memory that nobody reads."""
        self.current, self._others = Buffer((), Layout(()), private(0)), []

    def _new(self) -> Buffer:
        return Buffer(self._tensors, self._layout, self._allocate(published_nbytes(self._tensors, self._layout)))


def published_offsets(tensors: tuple[TensorSpec, ...], layout: Layout) -> list[int]:
    """Where each tensor's bytes in the wire's format begin in a buffer."""
    offsets, end = [], layout.nbytes
    for index, tensor in enumerate(tensors):
        if tensor.dtype.is_half:
            offsets.append(end)
            end += padded(tensor.nbytes)
        else:
            offsets.append(layout.offset(index))
    return offsets


def published_nbytes(tensors: tuple[TensorSpec, ...], layout: Layout) -> int:
    """Size of a buffer."""
    return layout.nbytes + sum(padded(tensor.nbytes) for tensor in tensors if tensor.dtype.is_half)
