"""A step through shared memory without a copy, of a set without a guard: what local optimizers do, too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.ours.server import server
from benchmarks.ours.worker import TENSOR, parameter_set
from benchmarks.peers.gradient import gradient


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """As `shared_memory`, but gradients are applied unread."""
    with server() as address, parameter_set(address, size, transport="shared_memory", guard=False) as weights:
        buffers = weights.gradient_buffers()
        buffers[TENSOR][:] = gradient(size)
        yield partial(weights.step, buffers, copy=False)
