"""A step of the same engine inside this process: no server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.ours.worker import TENSOR, parameter_set
from benchmarks.peers.gradient import gradient


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Everything but the transport."""
    with parameter_set(":memory:", size) as weights:
        yield partial(weights.step, {TENSOR: gradient(size)})
