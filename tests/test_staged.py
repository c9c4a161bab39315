"""Gradients that are staged: sent ahead of their push, which comes to what it comes to without that."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optserve
from direct import DirectSet
from optserve import optim
from optserve._session import MOST_AHEAD, Session
from optserve._specification import Run, TensorSpec
from optserve._wire import Frame, Payload
from optserve.v1 import step_pb2
from optserve_server import Config, Server
from optserve_server.engine.push import Declared
from proxy import Proxy

NewId = Callable[[], str]
Arrays = dict[str, np.ndarray[Any, Any]]

SIZES = {"a": 3, "b": 40_000, "c": 20_000}  # of which together go into shared memory
ADAM = optim.AdamW(lr=1e-2)


def gradients(seed: int) -> Arrays:
    randomness = np.random.default_rng(seed)
    return {name: randomness.standard_normal(size).astype(np.float32) for name, size in SIZES.items()}


def created(client: optserve.Client, new_id: NewId, optimizer: optim.Optimizer = ADAM) -> optserve.ParameterSet:
    return client.create_parameter_set(new_id(), {name: np.ones(k, np.float32) for name, k in SIZES.items()}, optimizer)


def same(one: optserve.Parameters, two: optserve.Parameters) -> bool:
    return all((one[name] == two[name]).all() for name in SIZES)


moves = st.lists(st.tuples(st.sampled_from(sorted(SIZES)), st.integers(0, 3)), max_size=8)


@pytest.fixture(params=["memory", "tcp", "shared_memory"])
def pair(request: pytest.FixtureRequest, new_id: NewId) -> tuple[optserve.ParameterSet, optserve.ParameterSet]:
    """Two sets that begin alike, of which the handles have made a step: one to stage, and one to compare it with."""
    client = request.getfixturevalue(f"{request.param}_client")
    staged, plain = created(client, new_id), created(client, new_id)
    assert same(staged.step(gradients(0)), plain.step(gradients(0)))
    return staged, plain


def test_whatever_is_staged_in_whatever_order_the_push_is_what_it_is_given(
    pair: tuple[optserve.ParameterSet, optserve.ParameterSet],
) -> None:
    staged, plain = pair

    @given(
        moves, st.sets(st.sampled_from(sorted(SIZES))), st.integers(0, 3), st.sampled_from([1.0, 4.0]), st.booleans()
    )
    def hold(order: list[tuple[str, int]], exchanged: set[str], seed: int, loss_scale: float, pulls: bool) -> None:
        pushed = {name: array.copy() for name, array in gradients(seed).items()}
        for name, other in order:
            pushed[name] = gradients(other)[name]  # each is another array
            staged.stage({name: pushed[name]}, expected=list(SIZES))
        pushed |= {name: gradients(9)[name] for name in exchanged}
        if pulls:
            staged.pull()  # between the push's beginning and its end
        options: dict[str, Any] = {"loss_scale": loss_scale, "hyperparameters": {"default": {"lr": 1e-3 * (seed + 1)}}}
        before = staged.identity.sequence
        assert same(staged.step(pushed, **options), plain.step(pushed, **options))
        assert staged.identity.sequence == before + 1

    hold()


def test_what_was_written_to_since_counts_once_it_is_staged_again(
    pair: tuple[optserve.ParameterSet, optserve.ParameterSet],
) -> None:
    staged, plain = pair
    pushed = gradients(1)
    staged.stage(pushed, expected=list(SIZES))
    pushed["b"] *= 0.5
    staged.stage({"b": pushed["b"]}, expected=list(SIZES))
    assert same(staged.step(pushed), plain.step(pushed))


def test_a_push_of_other_tensors_than_expected_is_that_push(
    pair: tuple[optserve.ParameterSet, optserve.ParameterSet],
) -> None:
    staged, plain = pair
    pushed = gradients(1)
    staged.stage({"b": pushed["b"]}, expected=list(SIZES))
    fewer = {"b": pushed["b"], "a": pushed["a"]}
    assert same(staged.step(fewer), plain.step(fewer))


def test_a_push_that_begins_anew_takes_no_room_twice(new_id: NewId) -> None:
    room = 3 * sum(SIZES.values()) * 4 // 2  # bytes: one push and a half
    with (
        Server(Config(listen="127.0.0.1:0", max_bytes_in_flight=room)) as server,
        optserve.Client(server.address, transport="stream", timeout=5.0) as client,
    ):
        weights = created(client, new_id)
        weights.step(gradients(0))
        pushed, stream = gradients(1), weights._session._stream
        weights.stage(pushed, expected=list(SIZES))
        weights.stage({"b": pushed["b"]}, expected=["b", "c"])
        assert weights.push({"c": pushed["c"], "b": pushed["b"]}).version == 2
        assert weights._session._stream is stream  # nobody was told to try again


def test_what_is_sent_ahead_again_and_again_stays_within_what_a_server_takes(
    pair: tuple[optserve.ParameterSet, optserve.ParameterSet],
) -> None:
    staged, plain = pair
    pushed = gradients(1)
    for _ in range(4 * MOST_AHEAD + 1):
        pushed = {name: array.copy() for name, array in pushed.items()}
        staged.stage(pushed, expected=list(SIZES))
    assert same(staged.step(pushed), plain.step(pushed))


def test_the_push_sends_what_was_not_staged_and_nothing_else(
    server: Server, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[str]] = []
    part = Session._part

    def noted(self: Session, ahead: Any, gradients: Arrays) -> Any:
        parts.append(list(gradients))
        return part(self, ahead, gradients)

    monkeypatch.setattr(Session, "_part", noted)
    with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
        weights = created(client, new_id)
        weights.step(gradients(0))
        pushed = gradients(1)
        before = proxy.carried
        weights.stage({"b": pushed["b"], "c": pushed["c"]}, expected=list(SIZES))
        weights.push(pushed)
        assert parts == [["b", "c"], ["a"]]
        assert proxy.carried - before < 1.1 * sum(array.nbytes for array in pushed.values())


def test_a_connection_that_breaks_loses_what_was_staged_and_not_the_push(server: Server, new_id: NewId) -> None:
    with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
        weights = created(client, new_id, optim.SGD(lr=1.0, maximize=True))
        weights.step(gradients(0))
        pushed = gradients(1)
        weights.stage({"b": pushed["b"]}, expected=list(SIZES))
        proxy.cut()
        weights.stage({"c": pushed["c"]}, expected=list(SIZES))  # whether or not it has noticed
        parameters = weights.step(pushed)
        assert parameters.version == 2
        np.testing.assert_array_equal(parameters["b"], 1 + gradients(0)["b"] + pushed["b"])


def test_wrong_names_and_shapes_are_refused_and_the_handle_goes_on(client: optserve.Client, new_id: NewId) -> None:
    weights = created(client, new_id)
    weights.step(gradients(0))
    for staged, expected in (
        ({"x": np.ones(3, np.float32)}, list(SIZES)),
        ({"a": np.ones(4, np.float32)}, list(SIZES)),
        ({"a": np.ones(3, np.float64)}, list(SIZES)),
        ({"a": np.ones(3, np.float32)}, ["b"]),
        ({"a": np.ones(3, np.float32)}, ["a", "x"]),
    ):
        with pytest.raises(optserve.TensorMismatch):
            weights.stage(staged, expected=expected)
    assert weights.step(gradients(1)).version == 2


def test_nothing_is_sent_before_the_first_call_nor_of_what_is_compressed(server: Server, new_id: NewId) -> None:
    with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
        set_id = created(client, new_id).id
        before = proxy.carried
        client_of = client.parameter_set(set_id)
        described = proxy.carried
        client_of.stage(gradients(0), expected=list(SIZES))
        assert proxy.carried == described >= before
        compressed = client.parameter_set(set_id, push_format=optserve.formats.Int8())
        compressed.step(gradients(0))
        compressed.stage(gradients(1), expected=list(SIZES))
        assert compressed.step(gradients(1)).version == 2


def frame(chunk: Payload | None = None, **fields: Any) -> Frame[step_pb2.StepRequest]:
    return Frame(step_pb2.StepRequest(**fields), chunk)


def test_the_wire_lets_a_push_begin_anew_or_be_amended_but_not_overtaken(server: Server, new_id: NewId) -> None:
    with optserve.Client(server.address, transport="stream") as client:
        weights = client.create_parameter_set(
            new_id(), {"x": np.zeros(2, np.float32)}, optim.SGD(lr=1.0, maximize=True)
        )
        stream = client._transport.open()
        stream.send([frame(open=step_pb2.Open(parameter_set_id=weights.id, client_id="plain"))])
        opened = stream.receive(float("inf")).message.opened
        declared = [step_pb2.PushedTensor(spec=opened.tensors[0])]

        def chunk(value: float) -> Payload:
            return Payload([Run(0, 0, 2)], [np.full(2, value, np.float32).tobytes()])

        stream.send([frame(chunk(64.0), push=step_pb2.Push(sequence=1, tensors=declared))])
        stream.send([frame(chunk(8.0), push=step_pb2.Push(sequence=1, tensors=declared))])  # anew
        stream.send([frame(push=step_pb2.Push(sequence=1, loss_scale=2.0), commit=True)])  # amended
        assert stream.receive(float("inf")).message.receipt.gradient_norm == pytest.approx(4 * 2**0.5)
        np.testing.assert_array_equal(weights.pull()["x"], [4.0, 4.0])
        stream.send([frame(push=step_pb2.Push(sequence=2)), frame(push=step_pb2.Push(sequence=3))])
        with pytest.raises(optserve.MessageOrder, match="expected `commit` of push 2; got `push` 3"):
            stream.receive(float("inf"))
        stream.close()


def test_what_is_wrong_with_an_amendment_refuses_the_push() -> None:
    direct = DirectSet({"x": np.zeros(2, np.float32)}, ADAM)
    push = direct.set.begin(1, [Declared(TensorSpec.of("x", np.ones(2, np.float32)))])
    push.say(base=None, changes=None, loss_scale=-1.0, samples=1.0)
    refusal = push.refusal
    assert refusal is not None
    push.say(base=None, changes=None, loss_scale=1.0, samples=-1.0)
    assert push.refusal is refusal
