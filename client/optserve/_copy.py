"""Where arrays lie; and copies of large ones by several threads: one alone can't use the memory's bandwidth."""

import os
import threading
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

THREADS = min(4, os.cpu_count() or 1)
PART = 1 << 20  # bytes that a thread takes at a time
WORTHWHILE = 8 << 20  # bytes: below, starting a thread costs more than it saves


def address(array: Array) -> int:
    """Where an array's elements begin."""
    begin: int = array.__array_interface__["data"][0]
    return begin


def copy_array(target: Array, source: Array) -> None:
    """Copy a C-contiguous array into another of the same shape and dtype."""
    if source.nbytes < WORTHWHILE:
        np.copyto(target, source)
        return
    to, origin = target.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)
    left = iter(range(0, origin.size, PART))

    def take() -> None:
        for begin in left:
            to[begin : begin + PART] = origin[begin : begin + PART]

    # Started for this copy alone: a pool would be gone in a forked process, which the host may well start.
    others = [threading.Thread(target=take, name="optserve-copy") for _ in range(THREADS - 1)]
    for other in others:
        other.start()
    take()
    for other in others:
        other.join()
