"""Data parallel without a server: two workers average their gradients with gloo, and each updates its own parameters."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import distributed

from benchmarks.peers.gradient import gradient
from benchmarks.peers.local_adam import PROCESSORS, Adam
from benchmarks.peers.process import spawned

WORKERS = 2


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """One of the workers; its step ends when the other's has, too."""
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "store").as_uri()
        with spawned(work, size, meeting_point) as other:
            step_here = worker(0, size, meeting_point)

            def step() -> torch.Tensor:
                parameters = step_here()
                other.recv_bytes()
                return parameters

            yield step
    distributed.destroy_process_group()


def work(parent: Connection, size: int, meeting_point: str) -> None:
    """Be the other worker: it waits in all_reduce for the first."""
    step = worker(1, size, meeting_point)
    while True:
        step()
        parent.send_bytes(b"done")


def worker(rank: int, size: int, meeting_point: str) -> Callable[[], torch.Tensor]:
    """Join the group; returns a function that averages and updates, on this worker's share of the processors."""
    distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=WORKERS)
    adam, mean = Adam(size, threads=max(1, PROCESSORS // WORKERS)), torch.from_numpy(gradient(size))

    def step() -> torch.Tensor:
        distributed.all_reduce(mean)
        mean.div_(WORKERS)
        return adam.step(mean)

    return step
