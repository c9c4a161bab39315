"""A step through shared memory with ordinary arrays: copied in, copied out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.ours.server import server
from benchmarks.ours.worker import TENSOR, parameter_set
from benchmarks.peers.gradient import gradient


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """What a worker gets that changes nothing in its code."""
    with server() as address, parameter_set(address, size, transport="shared_memory") as weights:
        yield partial(weights.step, {TENSOR: gradient(size)})
