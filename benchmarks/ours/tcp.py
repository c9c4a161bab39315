"""A step over TCP: float32 there, float32 back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.ours.server import server
from benchmarks.ours.worker import TENSOR, parameter_set
from benchmarks.peers.gradient import gradient


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Arrays of the caller's go there, arrays of the caller's come back."""
    with server() as address, parameter_set(address, size) as weights:
        yield partial(weights.step, {TENSOR: gradient(size)})
