"""A step over TCP: int8 with error feedback there, bfloat16 back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.ours.server import server
from benchmarks.ours.worker import TENSOR, parameter_set
from benchmarks.peers.gradient import gradient
from optserve.formats import BFloat16, Int8


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Float32 arrays at both ends, a quarter of their bytes on the way there and half on the way back."""
    with server() as address, parameter_set(address, size, push_format=Int8(), pull_format=BFloat16()) as weights:
        yield partial(weights.step, {TENSOR: gradient(size)})
