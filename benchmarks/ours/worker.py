"""A worker's handle on one tensor that Adam updates."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import optserve
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
