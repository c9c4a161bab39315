"""The replay window: copies of the pushes that are not on stable storage yet, to send them again if the server loses them."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._copy import copy_array
from optserve._exchange import Arrays, OutgoingPush
from optserve._results import Position

ALIGNMENT = 64  # bytes, for each array

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class KeptPush:
    """A push that nobody changes any more, `base` being where its worker's parameters came from."""

    sequence: int
    push: OutgoingPush
    base: Position | None
    nbytes: int
    memory: Bytes


class Window:
    """The last pushes of a session in order, without a gap, of at most `limit` bytes; with a limit of 0, none.

    What does not fit drops the oldest. Memory of pushes that were dropped is used again, within the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: deque[KeptPush] = deque()
        self._spares: deque[Bytes] = deque()
        self._durable = 0
        self.nbytes = 0  # of what is kept
        self._spare_nbytes = 0

    def keep(self, sequence: int, push: OutgoingPush, base: Position | None) -> None:
        """Copy a push, unless it is on stable storage; later ones are forgotten, since its sequence is given anew."""
        self.drop_after(sequence - 1)
        if self.limit == 0 or sequence <= self._durable:
            return
        if self._kept and self._kept[-1].sequence != sequence - 1:
            self._drop(len(self._kept))
        room = sum(map(_aligned, _arrays(push)))
        nbytes = room + (push.compressed.nbytes if push.compressed is not None else 0)
        if nbytes > self.limit:
            self._drop(len(self._kept))
            return
        while self.nbytes + nbytes > self.limit:
            self._drop(1)
        memory = self._memory(room)
        self._kept.append(KeptPush(sequence, _copied(push, memory), base, nbytes, memory))
        self.nbytes += nbytes
        while self.nbytes + self._spare_nbytes > self.limit:
            self._spare_nbytes -= self._spares.popleft().size

    def trim(self, durable: int) -> None:
        """Forget pushes up to a sequence: they are on stable storage."""
        self._durable = durable
        while self._kept and self._kept[0].sequence <= durable:
            self._drop(1)

    def drop_after(self, sequence: int) -> None:
        """Forget pushes that were not consumed."""
        while self._kept and self._kept[-1].sequence > sequence:
            self._let_go(self._kept.pop())

    def clear(self) -> None:
        """Forget all: another session begins, or another history."""
        self._drop(len(self._kept))
        self._durable = 0

    def covering(self, after: int, through: int) -> list[KeptPush] | None:
        """The pushes with sequences above one and up to another; None if one is missing, or nothing is ever kept."""
        if self.limit == 0:
            return None
        found = [each for each in self._kept if after < each.sequence <= through]
        return found if len(found) == max(0, through - after) else None

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._let_go(self._kept.popleft())

    def _let_go(self, kept: KeptPush) -> None:
        self.nbytes -= kept.nbytes
        self._spares.append(kept.memory)
        self._spare_nbytes += kept.memory.size

    def _memory(self, size: int) -> Bytes:
        for place, spare in enumerate(self._spares):
            if spare.size == size:
                del self._spares[place]
                self._spare_nbytes -= size
                return spare
        return np.empty(size, np.uint8)


def _arrays(push: OutgoingPush) -> Iterator[np.ndarray[Any, Any]]:
    """What is to be copied of a push; a compressed one keeps its payloads itself."""
    if push.compressed is None:
        yield from push.gradients.values()
    yield from push.parameters.values()
    yield from push.rows.values()


def _aligned(array: np.ndarray[Any, Any]) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT


def _copied(push: OutgoingPush, memory: Bytes) -> OutgoingPush:
    """The push with its arrays in this memory."""
    used = 0

    def copied(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal used
        copy: np.ndarray[Any, Any] = memory[used : used + array.nbytes].view(array.dtype).reshape(array.shape)
        copy_array(copy, array)
        used += _aligned(array)
        return copy

    gradients = push.gradients
    if push.compressed is None:
        gradients = _each(copied, gradients)
    else:  # only their shapes are needed
        gradients = _each(lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape), gradients)
    return replace(
        push,
        gradients=gradients,
        parameters=_each(copied, push.parameters),
        rows=_each(copied, dict(push.rows)),
        changes={group: dict(values) for group, values in push.changes.items()},
    )


def _each(function: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], arrays: Arrays) -> Arrays:
    return {name: function(array) for name, array in arrays.items()}
