"""A step through shared memory without a copy, of a set without a guard: what local optimizers do, too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.ours.server import server
from benchmarks.ours.worker import in_place, parameter_set


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """As `shared_memory`, but gradients are applied unread."""
    with server() as address, parameter_set(address, size, transport="shared_memory", guard=False) as weights:
        yield in_place(weights, size)
