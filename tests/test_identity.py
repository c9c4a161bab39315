"""A worker that starts again goes on where its checkpoint was, and what it repeats is not applied again."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optserve
from optserve import Identity, optim
from optserve_server import Server
from proxy import Proxy
from restarts import Restarts

NewId = Callable[[], str]
COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients
ZEROS = {"x": np.zeros(4, np.float32)}


def powers(number: int) -> dict[str, np.ndarray[Any, Any]]:
    """A gradient that can be told from all others in the sum of them."""
    return {"x": np.full(4, 2.0**number, np.float32)}


def saved(weights: optserve.ParameterSet) -> Identity:
    """The identity, by way of a file."""
    return Identity(**json.loads(json.dumps(asdict(weights.identity))))


def test_pushes_that_a_worker_repeats_after_its_restart_are_applied_once(
    client: optserve.Client, new_id: NewId
) -> None:
    first = client.create_parameter_set(new_id(), ZEROS, COUNTING)
    receipts = [first.push(powers(0))]
    checkpoint = saved(first)
    assert checkpoint.sequence == 1
    receipts += [first.push(powers(number)) for number in range(1, 4)]
    first.close()
    again = client.parameter_set(first.id, identity=checkpoint)
    assert again.client_id == first.client_id
    assert again.pull().version == 4
    for number in range(1, 4):
        repeated = again.push(powers(number))
        assert repeated.duplicate
        assert (repeated.sequence, repeated.version) == (receipts[number].sequence, receipts[number].version)
    assert saved(again).sequence == 4
    fresh = again.push(powers(4))
    assert (fresh.sequence, fresh.version, fresh.duplicate) == (5, 5, False)
    np.testing.assert_array_equal(again.pull()["x"], 31)


def test_a_repeated_step_has_the_parameters_of_now(client: optserve.Client, new_id: NewId) -> None:
    first = client.create_parameter_set(new_id(), ZEROS, COUNTING)
    checkpoint = saved(first)
    assert checkpoint.sequence == 0
    for number in range(3):
        first.step(powers(number))
    again = client.parameter_set(first.id, identity=checkpoint)
    params = again.step(powers(0))
    assert params.receipt is not None
    assert (params.version, params.receipt.version, params.receipt.duplicate) == (3, 1, True)
    np.testing.assert_array_equal(params["x"], 7)


def test_other_gradients_under_a_sequence_that_was_consumed_are_refused(client: optserve.Client, new_id: NewId) -> None:
    first = client.create_parameter_set(new_id(), ZEROS, COUNTING)
    checkpoint = saved(first)
    first.push(powers(0))
    again = client.parameter_set(first.id, identity=checkpoint)
    for _ in range(2):
        with pytest.raises(optserve.SequenceReused):
            again.push(powers(1))
    assert again.push(powers(0)).duplicate
    np.testing.assert_array_equal(again.pull()["x"], 1)


def test_more_than_the_server_has_receipts_of_can_not_be_repeated(client: optserve.Client, new_id: NewId) -> None:
    first = client.create_parameter_set(new_id(), ZEROS, COUNTING)
    checkpoint = saved(first)
    for _ in range(17):
        first.push(powers(0))
    with pytest.raises(optserve.SequenceGap, match="receipts are kept for the last 16"):
        client.parameter_set(first.id, identity=checkpoint).push(powers(0))


def broken(deadline: float) -> Any:
    raise optserve.ServerUnavailable("the connection broke")


def test_what_a_repeated_push_was_is_not_guessed_from_its_sequence(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    """The answer is lost, and the server has consumed that sequence, but with other gradients."""
    first = tcp_client.create_parameter_set(new_id(), ZEROS, COUNTING)
    checkpoint = saved(first)
    first.push(powers(0))
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
    ):
        again = client.parameter_set(first.id, identity=checkpoint)
        again.pull()
        proxy.swallow_answers()
        again._session._timeout = 1.0
        with pytest.raises(optserve.OutcomeUnknown):
            again.push(powers(1))
        proxy.cut()
        again._session._timeout = 60.0
        for _ in range(2):
            with pytest.raises(optserve.OutcomeUnknown, match="push 1 .* repeats one that was consumed before"):
                again.settle()
        stream = again._session._stream
        assert stream is not None
        stream.receive = broken  # type: ignore[method-assign]
        with pytest.raises(optserve.SequenceReused):
            again.push(powers(1))
        assert again.push(powers(0)).duplicate
        assert again.settle() is None


def test_a_server_that_is_behind_an_identity_has_rolled_back(tmp_path: Path) -> None:
    with Restarts(tmp_path) as restarts, optserve.Client(restarts.address) as client:
        first = client.create_parameter_set("a", ZEROS, COUNTING)
        first.push(powers(0))
        first.checkpoint()
        restarts.remember()
        first.push(powers(1))
        checkpoint = saved(first)
        restarts.come_back()
        again = client.parameter_set("a", identity=checkpoint, replay_window_bytes=1 << 20)
        with pytest.raises(optserve.RolledBack, match="of its 2 pushes 1 are left") as raised:
            again.push(powers(2))
        assert raised.value.to == 1
        assert again.push(powers(3)).sequence == 2
        np.testing.assert_array_equal(again.pull()["x"], 1 + 8)


def test_a_set_that_was_created_anew_knows_nothing_of_an_identity(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    with client.create_parameter_set(set_id, ZEROS, COUNTING) as first:
        checkpoint = saved(first)
        first.delete()
    client.create_parameter_set(set_id, ZEROS, COUNTING)
    again = client.parameter_set(set_id, identity=checkpoint)
    with pytest.raises(optserve.OutcomeUnknown, match="forgotten the session that set"):
        again.push(powers(0))
    assert again.push(powers(0)).sequence == 1


def test_the_process_before_is_cut_off(client: optserve.Client, new_id: NewId) -> None:
    first = client.create_parameter_set(new_id(), ZEROS, COUNTING)
    first.push(powers(0))
    again = client.parameter_set(first.id, identity=first.identity)
    again.push(powers(1))
    with pytest.raises(optserve.SessionSuperseded):
        first.push(powers(2))


def test_an_identity_of_a_session_that_is_over_is_refused(client: optserve.Client, new_id: NewId) -> None:
    first = client.create_parameter_set(new_id(), ZEROS, COUNTING, client_id="worker")
    old = first.identity
    client.parameter_set(first.id, client_id="worker").push(powers(0))
    with pytest.raises(optserve.SessionSuperseded, match="'worker' has begun a newer session"):
        client.parameter_set(first.id, identity=old).push(powers(0))


def test_an_identity_brings_its_client_id(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), ZEROS, COUNTING, client_id="worker-1")
    assert (
        memory_client.parameter_set(weights.id, client_id="worker-1", identity=weights.identity).client_id == "worker-1"
    )
    with pytest.raises(optserve.InvalidArgument, match="identity of client 'worker-2'; got that of 'worker-1'"):
        memory_client.parameter_set(weights.id, client_id="worker-2", identity=weights.identity)


@pytest.mark.parametrize(
    "fields", [("no id", 1, 0), ("a", 0, 0), ("a", 1, -1), ("a", 1, 1.0), ("a", True, 0), ("a", 2**64, 0)]
)
def test_an_identity_that_can_not_be_one_is_refused(fields: Any) -> None:
    with pytest.raises(optserve.InvalidArgument, match="expected"):
        Identity(*fields)
