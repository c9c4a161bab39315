"""A parameter server on `torch.distributed.rpc`: one call pushes the gradient and returns the parameters after fused Adam.

TensorPipe chooses how to travel: on one host that is shared memory, and large tensors are read out of the other process.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed import rpc

from benchmarks.peers.gradient import gradient
from benchmarks.peers.local_adam import Adam
from benchmarks.peers.process import spawned


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """A worker, and a server beside it."""
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "store").as_uri()
        with spawned(serve, meeting_point):
            join("worker", 1, meeting_point)
            pushed = torch.from_numpy(gradient(size))
            try:
                yield lambda: rpc.rpc_sync("server", step, (pushed,))
            finally:
                rpc.shutdown(graceful=False)


def serve(parent: Connection, meeting_point: str) -> None:
    """Answer calls until the parent is gone."""
    join("server", 0, meeting_point)
    parent.poll(None)


def step(gradient: torch.Tensor) -> torch.Tensor:
    """Update, on the server."""
    return adam(gradient.numel()).step(gradient)


@cache  # a reference to a remote object would do, for 0.2 ms more each call
def adam(size: int) -> Adam:
    """The server's only parameters, made when they are first needed."""
    return Adam(size)


def join(name: str, rank: int, meeting_point: str) -> None:
    """Become one of the two."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=meeting_point)
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)
