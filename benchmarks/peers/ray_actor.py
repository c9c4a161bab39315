"""A parameter server as a Ray actor: the gradient goes there, and the parameters come back, through Ray's object store."""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.peers.gradient import gradient
from benchmarks.peers.local_adam import PROCESSORS, Adam

SMALLEST_STORE = 80 << 20  # bytes, Ray's minimum


class Server(Adam):
    """Adam on NumPy arrays, which Ray shares without a copy."""

    def push(self, gradient: np.ndarray) -> np.ndarray:
        """One update; returns the parameters."""
        return self.step(torch.from_numpy(gradient)).numpy()


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Ray on this host alone, with a store for eight arrays, and one actor that has all processors."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it phones home otherwise
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex()  # it leaves one in the home directory otherwise
    pushed = gradient(size)
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            num_cpus=PROCESSORS,
            object_store_memory=max(SMALLEST_STORE, 8 * pushed.nbytes),
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        try:
            server: Any = ray.remote(num_cpus=PROCESSORS)(Server).remote(size)
            yield lambda: ray.get(server.push.remote(pushed))
        finally:
            ray.shutdown()
