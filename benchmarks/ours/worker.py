"""A worker's handle on one tensor that Adam updates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

import optserve
from benchmarks.peers.gradient import gradient
from optserve import Async, ParameterSet, Policy, optim
from optserve.formats import BFloat16, Format

NAME, TENSOR = "bench", "x"


@contextmanager
def parameter_set(
    address: str,
    size: int,
    *,
    transport: str = "stream",
    guard: bool = True,
    policy: Policy = Async(),  # noqa: B008 - a value
    push_format: Format | None = None,
    pull_format: BFloat16 | None = None,
) -> Iterator[ParameterSet]:
    """Create the set, in a process that keeps freed memory, as a worker with large tensors is told to."""
    optserve.keep_freed_memory()
    start = {TENSOR: np.zeros(size, np.float32)}
    with optserve.Client(address, transport=transport) as client:
        yield client.create_parameter_set(
            NAME, start, optim.Adam(), guard=guard, policy=policy, push_format=push_format, pull_format=pull_format
        )


def in_place(weights: ParameterSet, size: int) -> Callable[[], optserve.Parameters]:
    """A step that copies nothing: the gradient lies in the handle's buffer already, as the local optimizers' does."""
    buffers = weights.gradient_buffers()
    buffers[TENSOR][:] = gradient(size)
    return partial(weights.step, buffers, copy=False)
