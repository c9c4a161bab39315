"""A synchronous round whose pushes come in one order, and in another."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tests.torture.checker import SIZE, noise

import optserve
from optserve import Sync, optim
from optserve._transport import MemoryTransport

WORKERS = 3


def check() -> None:
    """Raises AssertionError if the order changes a bit."""
    first, second = parameters_after([0, 1, 2]), parameters_after([2, 0, 1])
    assert first == second, "the order in which pushes of a round came changed the parameters"


def parameters_after(order: Sequence[int]) -> bytes:
    """The parameters after a round to which workers came in an order."""
    with optserve.Client(":memory:") as client, ThreadPoolExecutor(WORKERS) as pool:
        zeros = {"x": np.zeros(SIZE, np.float32)}
        weights = client.create_parameter_set(
            "round", zeros, optim.SGD(lr=1.0), policy=Sync(WORKERS, deterministic=True)
        )
        assert isinstance(client._transport, MemoryTransport)
        waiting = client._transport._engine.get("round")._rounds._waiting
        steps = []
        for place, k in enumerate(order):
            while len(waiting) < place:
                threading.Event().wait(0.001)
            worker = client.parameter_set("round", client_id=f"worker-{k}")
            steps.append(pool.submit(worker.push, {"x": noise(k, 0)}))
        for step in steps:
            step.result()
        return weights.pull()["x"].tobytes()  # type: ignore[no-any-return]
