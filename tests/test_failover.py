"""A client with several addresses finds the server that serves."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

import optserve
from optserve import optim
from optserve_server import Config, Server
from restarts import Restarts

COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients
ONES = {"x": np.ones(4, np.float32)}
ZEROS = {"x": np.zeros(4, np.float32)}
NOBODY = "127.0.0.1:1"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def second() -> str:
    """An address where a server can be started."""
    with Server(Config(listen="127.0.0.1:0")) as server:
        return server.address


@pytest.mark.parametrize("transport", ["stream", "shared_memory"])
def test_workers_go_on_at_the_server_that_took_over(tmp_path: Path, second: str, transport: str) -> None:
    """Which comes up only after a while, with a state that has all but the last pushes."""
    with Restarts(tmp_path) as restarts:
        addresses = f"{restarts.address},{second}"
        with optserve.Client(addresses, transport=transport) as client, ThreadPoolExecutor(4) as pool:
            client.create_parameter_set("a", ZEROS, COUNTING)
            workers = [client.parameter_set("a", replay_window_bytes=1 << 20) for _ in range(4)]
            for worker in workers:
                worker.push(ONES)
            workers[0].checkpoint()
            restarts.remember()
            for worker in workers:
                worker.push(ONES)
            restarts.come_back(address=second)
            assert all(receipt.sequence == 3 for receipt in pool.map(lambda worker: worker.push(ONES), workers))
            params = workers[0].pull()
            assert params.version == 12
            np.testing.assert_array_equal(params["x"], 12)


def test_a_server_that_can_not_be_reached_is_passed_over_by_every_call(second: str) -> None:
    with Server(Config(listen=second)) as server, optserve.Client([NOBODY, server.address], timeout=20.0) as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        client._transport._current = 0  # type: ignore[attr-defined]
        weights.push(ONES)
        client._transport._current = 0  # type: ignore[attr-defined]
        assert [each.id for each in client.list_parameter_sets()] == ["a"]
        client._transport._current = 0  # type: ignore[attr-defined]
        assert weights.state().version == 1
        client._transport._current = 0  # type: ignore[attr-defined]
        weights.delete()
        assert client.list_parameter_sets() == []


def test_what_must_be_sent_once_goes_to_the_server_that_says_it_serves() -> None:
    """The other one answers calls, but says that it does not serve, as while it drains."""
    with Server(Config(listen="127.0.0.1:0")) as draining, Server(Config(listen="127.0.0.1:0")) as serving:
        draining._set_health(NOT_SERVING)
        with optserve.Client([draining.address, serving.address]) as client:
            client.create_parameter_set("a", ZEROS, COUNTING)
        assert [len(each._engine.list()) for each in (draining, serving)] == [0, 1]


def test_a_server_that_refuses_to_serve_is_left_for_the_next() -> None:
    with Server(Config(listen="127.0.0.1:0")) as draining, Server(Config(listen="127.0.0.1:0")) as serving:
        for server in (draining, serving):
            with optserve.Client(server.address) as client:
                client.create_parameter_set("a", ZEROS, COUNTING)
        with optserve.Client([draining.address, serving.address]) as client:
            weights = client.parameter_set("a")
            draining._service.streams.close()
            assert weights.push(ONES).version == 1
        assert [each._engine.get("a").position.version for each in (draining, serving)] == [0, 1]


def test_that_no_server_serves_is_reported_in_time() -> None:
    with optserve.Client([NOBODY, "127.0.0.1:2"], timeout=0.5) as client:
        with pytest.raises(optserve.ServerUnavailable, match=r"127.0.0.1:[12]"):
            client.list_parameter_sets()
        with pytest.raises(optserve.ServerUnavailable, match="none of 2 servers serves"):
            client.create_parameter_set("a", ZEROS, COUNTING)


def test_a_client_says_where_it_may_be_connected() -> None:
    with optserve.Client([NOBODY, "unix:/tmp/a,b"]) as client:
        assert repr(client) == "Client('127.0.0.1:1,unix:/tmp/a,b')"


@pytest.mark.parametrize("address", ["", [], "127.0.0.1:1,", ["127.0.0.1:1", ":memory:"], "127.0.0.1:1,nowhere"])
def test_addresses_that_can_not_be_are_refused(address: str | list[str]) -> None:
    with pytest.raises(optserve.InvalidName, match="expected"):
        optserve.Client(address)
