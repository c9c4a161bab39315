"""Two workers in sync through shared memory, without a copy: one update of the mean of their gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import optserve
from benchmarks.ours.server import server
from benchmarks.ours.worker import NAME, in_place, parameter_set
from benchmarks.peers.process import spawned

WORKERS = 2


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """One of the workers; its step ends when the other's has, too."""
    policy = optserve.Sync(WORKERS)
    with server() as address, parameter_set(address, size, transport="shared_memory", policy=policy) as weights:
        step_here = in_place(weights, size)
        with spawned(work, address, size) as other:

            def step() -> optserve.Parameters:
                parameters = step_here()
                other.recv_bytes()
                return parameters

            yield step


def work(parent: Connection, address: str, size: int) -> None:
    """Be the other worker: it waits in step for the first."""
    with optserve.Client(address, transport="shared_memory") as client:
        step = in_place(client.parameter_set(NAME), size)
        while True:
            step()
            parent.send_bytes(b"done")
