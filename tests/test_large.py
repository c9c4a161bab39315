"""Large tensors travel in a bounded stream of chunks, and sizes past 2 GiB work."""

from typing import Any

import numpy as np
import pytest

import optserve
from optserve import optim
from optserve._wire import CHUNK_BYTES, Frame
from optserve_server import Config, Server


def test_100_mb_each_way_travel_as_messages_of_at_most_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    serialize = Frame.to_bytes

    def recorded(frame: Frame[Any]) -> bytes:
        data = serialize(frame)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Frame, "to_bytes", recorded)
    size = 25_000_000
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address, transport="stream") as client:
        weights = client.create_parameter_set("a", {"x": np.zeros(size, np.float32)}, optim.SGD(lr=1.0))
        params = weights.step({"x": np.ones(size, np.float32)})
    assert (params["x"] == -1).all()
    assert sum(sizes) > 3 * 4 * size
    assert max(sizes) <= CHUNK_BYTES + 1024


def test_a_tensor_of_more_than_2_gib_steps() -> None:
    size = 2**29 + 12_345
    rng = np.random.default_rng(0)
    marked = np.unique(np.concatenate([[0, 2**29 - 1, 2**29, size - 1], rng.integers(0, size, 1000)]))
    gradient = np.zeros(size, np.float32)
    gradient[marked] = 1 + np.arange(marked.size)
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address, transport="stream") as client:
        weights = client.create_parameter_set("a", {"x": np.zeros(size, np.float32)}, optim.SGD(lr=1.0, maximize=True))
        receipt = weights.push({"x": gradient})
        assert receipt.gradient_norm == pytest.approx(
            float(np.linalg.norm(gradient[marked].astype(np.float64))), rel=1e-12
        )
        params = weights.pull()
    np.testing.assert_array_equal(params["x"], gradient)
