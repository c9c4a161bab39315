"""What a worker is told, and what it sends again, when the server comes back from an older state."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optserve
from optserve import formats, optim
from optserve._exchange import Attempt, OutgoingPush
from optserve._ledger import Ledger
from optserve._window import Window
from optserve.v1 import parameter_set_pb2, step_pb2
from optserve_server import Server
from optserve_server.engine.history import Stored
from proxy import Proxy
from restarts import Restarts

COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients
ONES = {"x": np.ones(4, np.float32)}
ZEROS = {"x": np.zeros(4, np.float32)}
NewId = Callable[[], str]
ENOUGH = 1 << 26  # bytes


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    with Restarts(tmp_path) as restarts:
        yield restarts


def powers(number: int) -> dict[str, np.ndarray[Any, Any]]:
    """A gradient that can be told from all others in the sum of them."""
    return {"x": np.full(4, 2.0**number, np.float32)}


def test_a_rollback_is_raised_once_and_says_where_the_set_is(restarts: Restarts) -> None:
    with optserve.Client(restarts.address) as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        weights.push(powers(0))
        weights.checkpoint()
        restarts.remember()
        for number in (1, 2):
            weights.push(powers(number))
        restarts.come_back()
        with pytest.raises(optserve.RolledBack, match="knew version 3, and of its 3 pushes 1 are left") as raised:
            weights.push(powers(3))
        assert raised.value.to == 1
        assert weights.settle() is None
        assert weights.push(powers(4)).sequence == 2
        np.testing.assert_array_equal(weights.pull()["x"], 1 + 16)


def test_a_worker_whose_pushes_are_all_gone_is_told_too(restarts: Restarts) -> None:
    with optserve.Client(restarts.address) as client:
        client.create_parameter_set("a", ZEROS, COUNTING).checkpoint()
        restarts.remember()
        weights = client.parameter_set("a")
        weights.push(powers(0))
        restarts.come_back()
        with pytest.raises(optserve.RolledBack, match="of its 1 pushes 0 are left"):
            weights.pull()
        assert weights.push(powers(1)).sequence == 1


def test_a_push_under_way_is_not_applied_and_the_next_one_does_not_collide_with_it(restarts: Restarts) -> None:
    """The older state has none of its sequences, so that a later push gets a sequence that came before with other bytes."""
    with (
        Proxy(restarts.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        weights.push(powers(0))
        weights.checkpoint()
        restarts.remember()
        weights.push(powers(1))
        proxy.swallow_answers()
        pushing = pool.submit(weights.push, powers(2))
        while restarts.server._engine.get("a").position.version < 3:
            assert not pushing.done()
        restarts.come_back()
        proxy.cut()
        with pytest.raises(optserve.RolledBack, match="push 3, which was under way, was not applied"):
            pushing.result()
        assert weights.settle() is None
        assert [weights.push(powers(number)).sequence for number in (3, 4)] == [2, 3]
        assert weights.settle() is None
        np.testing.assert_array_equal(weights.pull()["x"], 1 + 8 + 16)


@pytest.mark.parametrize("window", [0, ENOUGH])
def test_a_step_that_was_done_before_the_rollback_is_done_again_or_not_reported_as_done(
    restarts: Restarts, window: int
) -> None:
    """Its receipt had come, its parameters had not."""
    with (
        Proxy(restarts.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
    ):
        large = {"x": np.ones(1 << 20, np.float32)}
        weights = client.create_parameter_set("a", large, COUNTING, replay_window_bytes=window)
        weights.checkpoint()
        restarts.remember()
        weights.pull()
        stream = weights._session._stream
        assert stream is not None
        receive = stream.receive

        def one_message(deadline: float) -> Any:
            answer = receive(deadline)
            assert answer.message.HasField("receipt")
            stream.receive = cut  # type: ignore[method-assign]
            return answer

        def cut(deadline: float) -> Any:
            restarts.come_back()
            proxy.cut()
            raise optserve.ServerUnavailable("cut")

        stream.receive = one_message  # type: ignore[method-assign]
        if window:
            params = weights.step(large)
            assert params.receipt is not None
            assert params.receipt.position == params.position
            assert (params["x"] == 2).all()
            return
        with pytest.raises(optserve.RolledBack, match="of its 1 pushes 0 are left"):
            weights.step(large)
        assert weights.settle() is None
        assert weights.push(large).sequence == 1


WAYS: dict[str, dict[str, Any]] = {
    "stream": {},
    "shared memory": {},
    "int8": {"push_format": formats.Int8()},
    "top-k": {"push_format": formats.TopK(0.1)},
}


@pytest.mark.parametrize("way", WAYS)
def test_pushes_that_the_server_lost_are_sent_again_with_the_same_bits(
    restarts: Restarts, way: str, memory_client: optserve.Client, new_id: NewId, caplog: pytest.LogCaptureFixture
) -> None:
    """All that a push may carry, from arrays that the worker fills anew for each push."""
    shape = (40, 1000)
    start = {"w": np.zeros(shape, np.float32), "e": np.zeros(shape, np.float32)}
    generator = np.random.default_rng(0)
    gradients: dict[str, Any] = {"w": np.empty(shape, np.float32)}
    values = np.empty((3, 1000), np.float32)
    transport = "shared_memory" if way == "shared memory" else "stream"
    with optserve.Client(restarts.address, transport=transport) as client:
        arguments: Any = (start, optim.Adagrad(lr=0.1))
        weights = client.create_parameter_set("a", *arguments, replay_window_bytes=ENOUGH, **WAYS[way])
        undisturbed = memory_client.create_parameter_set(new_id(), *arguments, **WAYS[way])
        for step in range(6):
            if step == 2:
                weights.checkpoint()
                restarts.remember()
            if step == 5:
                restarts.come_back()
            gradients["w"][:] = generator.normal(size=shape)
            values[:] = generator.normal(size=values.shape)
            if step % 2 and not WAYS[way]:
                gradients["e"] = optserve.RowSparse([step, 7, 20], values)
            options: dict[str, Any] = {"loss_scale": 2.0**step}
            if step in (0, 3):
                options["hyperparameters"] = {"default": {"lr": 0.1 / (step + 1)}}
            ours, expected = weights.step(gradients, **options), undisturbed.step(gradients, **options)
        for name in start:
            np.testing.assert_array_equal(ours[name], expected[name])
        assert ours.receipt is not None
        assert expected.receipt is not None
        assert (ours.version, ours.receipt.sequence, ours.receipt.duplicate) == (6, 6, False)
        assert ours.receipt.learning_rates == expected.receipt.learning_rates
    assert "came back at version 2, from an older state; 3 of this worker's pushes are sent again" in caplog.text


def test_a_refused_push_is_sent_again_too_since_it_has_a_sequence(restarts: Restarts) -> None:
    with optserve.Client(restarts.address) as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING, replay_window_bytes=ENOUGH)
        weights.checkpoint()
        restarts.remember()
        weights.push(powers(0))
        with pytest.raises(optserve.NonFiniteValue):
            weights.push({"x": np.full(4, np.nan, np.float32)})
        weights.push(powers(1))
        restarts.come_back()
        assert weights.push(powers(2)).sequence == 4
        np.testing.assert_array_equal(weights.pull()["x"], 1 + 2 + 4)


def test_pushes_are_sent_again_over_a_connection_that_breaks_anywhere(restarts: Restarts) -> None:
    size, count = 60_000, 12
    randomness = random.Random(0)
    limit = [lambda: 1 << 30]
    with (
        Proxy(restarts.address, lambda: limit[0]()) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
    ):
        weights = client.create_parameter_set(
            "a", {"x": np.zeros(size, np.float32)}, COUNTING, replay_window_bytes=ENOUGH
        )
        weights.checkpoint()
        restarts.remember()
        gradient = np.zeros(size, np.float32)
        for number in range(count):
            gradient[:] = 0
            gradient[number] = 1
            weights.push({"x": gradient})
        limit[0] = lambda: randomness.randrange(1_000, 20 * size)
        restarts.come_back()
        proxy.cut()
        before = proxy.connections
        assert weights.push({"x": np.ones(size, np.float32)}).sequence == count + 1
        assert proxy.connections > before + 3
        limit[0] = lambda: 1 << 30
        proxy.cut()
        params = weights.pull()
    assert params.version == count + 1
    np.testing.assert_array_equal(params["x"][:count], 2)
    np.testing.assert_array_equal(params["x"][count:], 1)


def test_a_rollback_past_the_window_is_raised(restarts: Restarts) -> None:
    """Which has room for two pushes of the three that are lost."""
    with optserve.Client(restarts.address) as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING, replay_window_bytes=2 * 64)
        weights.checkpoint()
        restarts.remember()
        for number in range(3):
            weights.push(powers(number))
        restarts.come_back()
        with pytest.raises(optserve.RolledBack, match="of its 3 pushes 0 are left"):
            weights.push(powers(3))
        assert weights.push(powers(4)).sequence == 1
        np.testing.assert_array_equal(weights.pull()["x"], 16)


def test_a_worker_that_lost_nothing_is_told_of_lost_versions_unless_it_has_a_window(restarts: Restarts) -> None:
    """What others lost, they send again, or are told."""
    with optserve.Client(restarts.address) as client:
        other = client.create_parameter_set("a", ZEROS, COUNTING, replay_window_bytes=ENOUGH)
        plain = client.parameter_set("a")
        careful = client.parameter_set("a", replay_window_bytes=ENOUGH)
        for handle in (plain, careful):
            handle.push(ONES)
        other.checkpoint()
        restarts.remember()
        other.push(ONES)
        for handle in (plain, careful):
            assert handle.pull().version == 3
        restarts.come_back()
        with pytest.raises(optserve.RolledBack, match="knew version 3, and of its 1 pushes 1 are left"):
            plain.pull()
        assert careful.push(ONES).sequence == 2
        assert other.pull().version == 4
        np.testing.assert_array_equal(plain.pull()["x"], 4)


def test_a_push_of_unknown_outcome_is_not_sent_again_and_settles_as_not_applied(restarts: Restarts) -> None:
    with (
        Proxy(restarts.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
    ):
        weights = client.create_parameter_set("a", ZEROS, COUNTING, replay_window_bytes=ENOUGH)
        weights.checkpoint()
        restarts.remember()
        weights.push(powers(0))
        proxy.swallow_answers()
        weights._session._timeout = 2.0
        with pytest.raises(optserve.OutcomeUnknown):
            weights.push(powers(1))
        restarts.come_back()
        proxy.cut()
        weights._session._timeout = 60.0
        assert weights.settle() is None
        assert weights.push(powers(2)).sequence == 2
        np.testing.assert_array_equal(weights.pull()["x"], 1 + 4)


@pytest.mark.parametrize("way", ["stream", "int8"])
def test_a_push_that_was_settled_is_sent_again_as_it_was(restarts: Restarts, way: str) -> None:
    with (
        Proxy(restarts.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
    ):
        weights = client.create_parameter_set("a", ZEROS, COUNTING, replay_window_bytes=ENOUGH, **WAYS[way])
        weights.checkpoint()
        restarts.remember()
        gradient = powers(0)
        weights.push(gradient)
        proxy.swallow_answers()
        gradient["x"][:] = 2
        weights._session._timeout = 2.0
        with pytest.raises(optserve.OutcomeUnknown):
            weights.push(gradient)
        proxy.cut()
        weights._session._timeout = 60.0
        assert weights.settle() is not None
        gradient["x"][:] = 4
        restarts.come_back()
        proxy.cut()
        assert weights.push(gradient).sequence == 3
        np.testing.assert_allclose(weights.pull()["x"], 1 + 2 + 4, rtol=1e-6)


def test_rounds_that_the_server_lost_are_made_again_by_their_workers(restarts: Restarts) -> None:
    with optserve.Client(restarts.address) as client, ThreadPoolExecutor(2) as pool:
        policy = optserve.Sync(2, deadline=20.0)
        first = client.create_parameter_set("a", ZEROS, COUNTING, policy=policy, replay_window_bytes=ENOUGH)
        second = client.parameter_set("a", replay_window_bytes=ENOUGH)
        first.checkpoint()
        restarts.remember()
        for number in range(4):
            if number == 3:
                restarts.come_back()
            futures = [pool.submit(worker.push, powers(number)) for worker in (first, second)]
            assert [future.result().version for future in futures] == [number + 1] * 2
        np.testing.assert_array_equal(first.pull()["x"], 1 + 2 + 4 + 8)


def test_receipts_say_what_is_on_stable_storage_and_the_window_keeps_only_the_rest(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    set_id = new_id()
    tcp_client.create_parameter_set(set_id, ZEROS, COUNTING)
    weights = tcp_client.parameter_set(set_id, replay_window_bytes=ENOUGH)
    for sequence in range(1, 4):
        assert weights.push(ONES).durable_sequence == 0
        assert weights._session._window.nbytes == 64 * sequence
    parameter_set, identity = server._engine.get(set_id), weights.identity

    def stored(sequence: int) -> None:
        """Say that pushes up to one are in a checkpoint."""
        session = (identity.client_id, identity.epoch, sequence)
        parameter_set.stored(Stored(sequence, sequence, [session], optserve.Durability.CHECKPOINT))

    stored(2)
    weights._session._disconnect()
    weights.pull()
    assert weights._session._window.nbytes == 64
    stored(3)
    assert weights.push(ONES).durable_sequence == 3
    assert weights._session._window.nbytes == 64


def opened(
    *, epoch: int = 7, last: int, incarnation: int = 1, version: int, durable: int = 0, rewinds: int = 0
) -> step_pb2.Opened:
    position = parameter_set_pb2.Position(incarnation=incarnation, version=version)
    receipt = step_pb2.Receipt(sequence=last, position=position, outcome=step_pb2.OUTCOME_APPLIED) if last else None
    return step_pb2.Opened(
        epoch=epoch,
        last_sequence=last,
        last_receipt=receipt,
        position=position,
        durable_sequence=durable,
        rewinds=rewinds,
    )


def ledger(pushes: int, window: int = 0) -> Ledger:
    """Of a worker that has pushed alone."""
    ledger = Ledger("a", None, None, Window(window))
    assert ledger.adopt(opened(last=0, version=0), None) == []
    for sequence in range(1, pushes + 1):
        ledger.window.keep(sequence, OutgoingPush(ONES, {}, {}), None)
        ledger.received(
            optserve.Receipt(
                sequence=sequence, position=optserve.Position(1, sequence), outcome=optserve.Outcome.APPLIED
            )
        )
    return ledger


@pytest.mark.parametrize("window", [0, ENOUGH])
def test_a_rewind_is_raised_whatever_the_window_has_and_nothing_is_sent_again(window: int) -> None:
    known = ledger(5, window)
    with pytest.raises(
        optserve.RolledBack,
        match="at version 2, somebody rewound it: .* of its 5 pushes that came after version 2 are undone",
    ):
        known.adopt(opened(last=5, incarnation=2, version=2, rewinds=1), None)
    assert known.adopt(opened(last=5, incarnation=2, version=2, rewinds=1), None) == []
    assert known.attempt() == Attempt(7, 6)
    with pytest.raises(optserve.RolledBack):  # what was pushed before the rewind is not there to be sent again
        known.adopt(opened(last=3, incarnation=3, version=0, rewinds=1), None)


def test_a_push_that_a_rewind_undid_has_its_receipt() -> None:
    known = ledger(5)
    attempt = known.unsettled = known.attempt()
    with pytest.raises(optserve.RolledBack, match="push 6, which was under way, was applied"):
        known.adopt(opened(last=6, incarnation=2, version=2, rewinds=1), attempt)
    receipt = known.outcome(attempt)
    assert receipt is not None
    assert receipt.sequence == 6
    assert known.attempt() == Attempt(7, 7)


@pytest.mark.parametrize("consumed", range(6))
def test_what_is_missing_is_sent_again_unless_the_server_had_said_that_it_is_safe(consumed: int) -> None:
    known = ledger(5, ENOUGH)
    known.adopt(opened(last=5, version=5, durable=3), None)
    back = opened(last=consumed, incarnation=2, version=consumed, durable=min(3, consumed))
    if consumed < 3:  # so its storage was damaged
        with pytest.raises(optserve.RolledBack, match=f"of its 5 pushes {consumed} are left"):
            known.adopt(back, None)
        assert known.attempt() == Attempt(7, consumed + 1)
    else:
        assert [kept.sequence for kept in known.adopt(back, None)] == list(range(consumed + 1, 6))
        assert known.attempt() == Attempt(7, 6)


def test_what_was_not_sent_again_is_missing_still_when_the_connection_breaks_meanwhile() -> None:
    known = ledger(4, ENOUGH)
    first, *_ = known.adopt(opened(last=1, incarnation=2, version=1), None)
    position = optserve.Position(2, 2)
    known.received(optserve.Receipt(sequence=first.sequence, position=position, outcome=optserve.Outcome.APPLIED))
    assert [kept.sequence for kept in known.adopt(opened(last=2, incarnation=2, version=2), None)] == [3, 4]


def test_an_old_receipt_does_not_make_the_worker_forget_the_version_that_it_knew() -> None:
    known = ledger(5)
    position = optserve.Position(1, 2)
    known.received(optserve.Receipt(sequence=2, position=position, outcome=optserve.Outcome.APPLIED, duplicate=True))
    with pytest.raises(optserve.RolledBack, match="knew version 5"):
        known.adopt(opened(last=5, incarnation=2, version=3), None)


def test_a_session_that_was_forgotten_leaves_a_push_under_way_in_doubt_for_good() -> None:
    known = ledger(2)
    attempt = known.attempt()
    with pytest.raises(optserve.OutcomeUnknown, match="push 3 .*forgotten this session"):
        known.adopt(opened(epoch=9, last=0, version=3), attempt)
    known.unsettled = attempt
    known.adopt(opened(epoch=9, last=0, version=3), None)
    known.received(
        optserve.Receipt(sequence=3, position=optserve.Position(1, 9), outcome=optserve.Outcome.APPLIED)
    )  # of the new session
    assert known.outcome(attempt) is None


@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize("last", range(4))
def test_the_next_sequence_after_a_rollback_is_the_one_that_the_server_expects(last: int, under_way: bool) -> None:
    known = ledger(2 if under_way else 3)
    attempt = known.attempt() if under_way else None
    with pytest.raises(optserve.RolledBack) as raised:
        known.adopt(opened(last=last, incarnation=2, version=1, rewinds=1), attempt)
    assert raised.value.to == 1
    assert known.attempt() == Attempt(7, last + 1)
