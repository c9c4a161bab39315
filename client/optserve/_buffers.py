"""Memory for pulled tensors, used again once nobody holds an array in it.

A fresh 100 MB array costs more in page faults than in copying. A training loop lets go of one step's parameters when it
has the next, so two buffers in turn serve it for ever.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._specification import TensorSpec

ALIGNMENT = 64  # bytes, for each tensor
KEPT = 2
WORTHWHILE = 1 << 20  # bytes: below this, fresh memory is as fast
_UNUSED = 2  # references to a buffer that only the list holds: that one, and the argument of getrefcount


class Buffers:
    """Hands out arrays for tensors; one worker's, not for threads."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint8]] = []

    def arrays(self, specs: Sequence[TensorSpec]) -> list[NDArray[Any]]:
        """An array for each tensor, uninitialized, all of them in one buffer that no earlier array lives in."""
        starts, size = [], 0
        for spec in specs:
            starts.append(size)
            size += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = self._take(size)
        return [
            buffer[start : start + spec.nbytes].view(spec.dtype.array_dtype).reshape(spec.shape)
            for spec, start in zip(specs, starts, strict=True)
        ]

    def _take(self, size: int) -> NDArray[np.uint8]:
        if size < WORTHWHILE:
            return np.empty(size, np.uint8)
        for index in range(len(self._kept)):  # every array that was handed out refers to its buffer as its base
            if self._kept[index].size == size and sys.getrefcount(self._kept[index]) == _UNUSED:
                return self._kept[index]
        buffer = np.empty(size, np.uint8)
        self._kept = [*self._kept[1 - KEPT :], buffer]
        return buffer
