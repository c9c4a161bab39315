"""`torch.optim.Adam(fused=True)` in this process, on all processors: nothing remote."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.peers.gradient import gradient

PROCESSORS = os.cpu_count() or 1


class Adam:
    """Parameters, and torch's fused Adam over them."""

    def __init__(self, size: int, threads: int = PROCESSORS) -> None:
        torch.set_num_threads(threads)
        self.parameters = torch.nn.Parameter(torch.zeros(size))
        self.optimizer = torch.optim.Adam([self.parameters], fused=True)

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """One update; returns the parameters."""
        self.parameters.grad = gradient
        self.optimizer.step()
        return self.parameters.detach()


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Update with a gradient that is already there."""
    adam, pushed = Adam(size), torch.from_numpy(gradient(size))
    yield lambda: adam.step(pushed)
