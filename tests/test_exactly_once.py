"""A push is applied exactly once, whatever the connection loses."""

import gc
import itertools
import random
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import optserve
from optserve import _local_channel, optim
from optserve._shared_memory import connected
from optserve.v1 import step_pb2
from optserve_server import Config, Server
from optserve_server.engine.threads import Threads
from proxy import Proxy, limited

NewId = Callable[[], str]
COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients


def test_a_push_whose_acknowledgement_is_lost_is_applied_once(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    ones = {"x": np.ones(4, np.float32)}
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = client.parameter_set(direct.id)
        assert not weights.push(ones).duplicate
        proxy.swallow_answers()
        pushing = pool.submit(weights.push, ones)
        while direct.describe().version < 2:
            assert not pushing.done()
        proxy.cut()
        receipt = pushing.result()
        assert (receipt.sequence, receipt.version, receipt.applied, receipt.duplicate) == (2, 2, True, True)
        assert not weights.push(ones).duplicate
    params = direct.pull()
    np.testing.assert_array_equal(params["x"], np.full(4, 3, np.float32))
    assert params.version == 3


def test_a_refusal_whose_answer_is_lost_is_the_same_refusal(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    """Also for a step, whose pull is then not answered, so that the pushes after it get their own receipts."""
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    ones = {"x": np.ones(4, np.float32)}
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = client.parameter_set(direct.id, client_id="refused")
        weights.push(ones)
        (entry,) = server._engine.get(direct.id)._sessions.copy()
        assert entry.last_sequence == 1
        proxy.swallow_answers()
        stepping = pool.submit(weights.step, {"x": np.full(4, np.nan, np.float32)})
        while server._engine.get(direct.id)._sessions.copy()[0].last_sequence < 2:
            assert not stepping.done()
        proxy.cut()
        with pytest.raises(optserve.NonFiniteValue):
            stepping.result()
        receipts = [weights.push(ones) for _ in range(3)]
        assert [receipt.sequence for receipt in receipts] == [3, 4, 5]
        assert [receipt.version for receipt in receipts] == [2, 3, 4]
        assert not any(receipt.duplicate for receipt in receipts)


SIZE, PUSHES = 60_000, 40  # of the two tests that follow


def test_steps_over_a_connection_that_breaks_anywhere_are_each_applied_once(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    """Every connection carries a random number of bytes, so it breaks in requests, answers and handshakes alike."""
    randomness = random.Random(0)
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(SIZE, np.float32)}, COUNTING)
    limit = lambda: randomness.randrange(1_000, 20 * SIZE)  # noqa: E731
    with (
        Proxy(server.address, limit) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
    ):
        check_steps_that_count(client.parameter_set(direct.id), direct)
        assert proxy.connections > 5


def test_steps_over_a_local_channel_that_breaks_anywhere_are_each_applied_once(
    shared_memory_client: optserve.Client, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    randomness = random.Random(0)
    connections = itertools.count()

    def breaking(offer: step_pb2.SharedMemory, number: int) -> socket.socket:
        next(connections)
        return limited(connected(offer, number), randomness.randrange(1, 700))

    monkeypatch.setattr(_local_channel, "connected", breaking)
    direct = shared_memory_client.create_parameter_set(new_id(), {"x": np.zeros(SIZE, np.float32)}, COUNTING)
    check_steps_that_count(direct, shared_memory_client.parameter_set(direct.id))
    assert next(connections) > 5


def check_steps_that_count(weights: optserve.ParameterSet, other: optserve.ParameterSet) -> None:
    """Every step adds one to an element of its own, once, though some answers are lost and some pushes sent again."""
    duplicates = 0
    for number in range(PUSHES):
        gradient = np.zeros(SIZE, np.float32)
        gradient[number] = 1
        receipt = weights.step({"x": gradient}).receipt
        assert receipt is not None
        assert (receipt.sequence, receipt.version) == (number + 1, number + 1)
        duplicates += receipt.duplicate
    assert 0 < duplicates < PUSHES
    params = other.pull()
    np.testing.assert_array_equal(params["x"][:PUSHES], 1)
    np.testing.assert_array_equal(params["x"][PUSHES:], 0)


def test_a_push_without_a_receipt_in_time_is_of_unknown_outcome_and_can_be_settled(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    ones = {"x": np.ones(4, np.float32)}
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, timeout=1.0, transport="stream") as client,
    ):
        weights = client.parameter_set(direct.id)
        weights.push(ones)
        proxy.swallow_answers()
        with pytest.raises(optserve.OutcomeUnknown, match=r"push 2 .*settle\(\) finds out"):
            weights.push(ones)
        with pytest.raises(optserve.DeadlineExceeded):  # still no answers: nothing is settled by that
            weights.settle()
        proxy.cut()
        receipt = weights.settle()
        assert receipt is not None
        assert (receipt.sequence, receipt.version, receipt.applied) == (2, 2, True)
        assert weights.settle() is None
        assert weights.push(ones).sequence == 3
    np.testing.assert_array_equal(direct.pull()["x"], np.full(4, 3, np.float32))


def test_a_push_whose_session_is_over_can_not_be_settled(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    direct = tcp_client.create_parameter_set(new_id(), {"x": [0.0]}, COUNTING)
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, timeout=1.0, transport="stream") as client,
    ):
        weights = client.parameter_set(direct.id, client_id="shared")
        weights.push({"x": [1.0]})
        proxy.swallow_answers()
        with pytest.raises(optserve.OutcomeUnknown):
            weights.push({"x": [1.0]})
        proxy.cut()
        tcp_client.parameter_set(direct.id, client_id="shared").pull()  # under a new epoch: the session is over
        for _ in range(2):  # that is no answer, and never becomes one
            with pytest.raises(
                optserve.OutcomeUnknown, match=r"what became of push 2 .* can't be found out: .*newer session"
            ):
                weights.settle()
            with pytest.raises(optserve.SessionSuperseded):
                weights.pull()
        with pytest.raises(optserve.SessionSuperseded):
            weights.push({"x": [1.0]})
    assert direct.describe().version == 2


def test_a_push_that_never_arrived_settles_as_not_applied(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    ones = {"x": np.ones(4, np.float32)}
    limit = [1 << 30]
    with (
        Proxy(server.address, lambda: limit[0]) as proxy,
        optserve.Client(proxy.address, timeout=1.0, transport="stream") as client,
    ):
        weights = client.parameter_set(direct.id)
        weights.push(ones)
        limit[0] = 0  # from now on no connection carries anything
        stream = weights._session._stream
        assert stream is not None
        send = stream.send

        def cut_first(frames: object) -> None:
            proxy.cut()
            send(frames)  # type: ignore[arg-type]

        stream.send = cut_first  # type: ignore[method-assign]
        with pytest.raises(optserve.OutcomeUnknown):
            weights.push(ones)
        limit[0] = 1 << 30
        weights._session._timeout = 60.0  # gRPC takes its time to connect again
        assert weights.settle() is None
        assert weights.push(ones).sequence == 2
    assert direct.describe().version == 2


def test_closing_a_handle_ends_a_call_that_another_thread_waits_in(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = client.parameter_set(direct.id)
        weights.push({"x": np.ones(4, np.float32)})
        proxy.swallow_answers()
        pushing = pool.submit(weights.push, {"x": np.ones(4, np.float32)})
        while direct.describe().version < 2:
            assert not pushing.done()
        weights.close()
        with pytest.raises(optserve.ClientClosed):
            pushing.result()
    assert direct.describe().version == 2


def test_interrupting_the_caller_does_not_interrupt_the_update(
    memory_client: optserve.Client, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the engine in this process is at work: the update is whole, and counted once."""
    weights = memory_client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    ones = {"x": np.ones(4, np.float32)}
    weights.push(ones)
    run = Threads.run

    def interrupted(*arguments: Any, **options: Any) -> None:
        run(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Threads, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            weights.push(ones)
    receipt = weights.settle()
    assert receipt is not None
    assert receipt.version == 2
    np.testing.assert_array_equal(weights.step(ones)["x"], np.full(4, 3, np.float32))


def test_handles_that_are_dropped_leave_no_stream_behind(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    set_id = new_id()
    tcp_client.create_parameter_set(set_id, {"x": [0.0]}, COUNTING)
    gc.collect()
    before = server._service.streams._inside
    for _ in range(20):
        tcp_client.parameter_set(set_id).pull()
    gc.collect()
    gate = server._service.streams
    with gate._changed:
        assert gate._changed.wait_for(lambda: gate._inside <= before, timeout=30)


def test_a_server_that_is_not_there_is_reported_in_time() -> None:
    with optserve.Client("127.0.0.1:1", timeout=0.5) as client:
        with pytest.raises(optserve.ServerUnavailable, match=r"127.0.0.1:1"):
            client.list_parameter_sets()
        with pytest.raises(optserve.DeadlineExceeded, match=r"127.0.0.1:1"):
            client.create_parameter_set("a", {"x": [1.0]}, optim.SGD())


def test_a_server_that_has_forgotten_the_set_says_so(new_id: NewId) -> None:
    with Server(Config(listen="127.0.0.1:0")) as server:
        client = optserve.Client(server.address)
        weights = client.create_parameter_set(new_id(), {"x": [1.0]}, optim.SGD())
        weights.push({"x": [1.0]})
    with Server(Config(listen=server.address)), client, pytest.raises(optserve.ParameterSetNotFound):
        weights.push({"x": [1.0]})


def test_two_handles_under_one_client_id_do_not_mix(tcp_client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    tcp_client.create_parameter_set(set_id, {"x": [0.0]}, COUNTING)
    first = tcp_client.parameter_set(set_id, client_id="worker-1")
    second = tcp_client.parameter_set(set_id, client_id="worker-1")
    first.push({"x": [1.0]})
    second.push({"x": [1.0]})
    with pytest.raises(optserve.SessionSuperseded, match=r"worker-1"):
        first.push({"x": [1.0]})
    assert second.describe().version == 2


def test_threads_share_a_handle_in_turns(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"x": np.zeros(3, np.float32)}, COUNTING)
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda _: weights.push({"x": np.ones(3, np.float32)}), range(64)))
    assert sorted(receipt.version for receipt in receipts) == list(range(1, 65))


def test_workers_push_concurrently_without_losing_an_update(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    weights = client.create_parameter_set(set_id, {"x": np.zeros(50_000, np.float32)}, COUNTING)

    def work(_: int) -> None:
        with client.parameter_set(set_id) as mine:
            for _ in range(20):
                mine.step({"x": np.ones(50_000, np.float32)})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    params = weights.pull()
    assert params.version == 120
    np.testing.assert_array_equal(params["x"], 120)
