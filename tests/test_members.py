"""Members under bad conditions: connections that break, workers that come late or never, messages that nobody should send."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import optserve
from optserve import Async, Buffered, Sync, optim, staleness
from optserve.v1 import optimizer_service_pb2, optimizer_service_pb2_grpc, policy_pb2, step_pb2, tensor_pb2
from optserve_server import Config, Server
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.pipeline import Pipeline

Request = step_pb2.StepRequest
NewId = Callable[[], str]
PATIENCE = 30.0  # seconds
LEASE = 0.5
ONES = {"x": np.ones(4, np.float32)}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that soon counts workers as gone."""
    with Server(Config(listen="127.0.0.1:0", lease=LEASE)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[optserve.Client]:
    with optserve.Client(server.address, transport="stream", timeout=PATIENCE) as client:
        yield client


class RawStream:
    """One Step stream, message by message."""

    def __init__(self, server: Server, set_id: str, client_id: str, epoch: int = 0, *, join: bool = False) -> None:
        self._channel = grpc.insecure_channel(server.address)
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        stub = optimizer_service_pb2_grpc.OptimizerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._answers = stub.Step(iter(self._requests.get, None), timeout=PATIENCE)
        self.send(open=step_pb2.Open(parameter_set_id=set_id, client_id=client_id, epoch=epoch, join=join))

    def send(self, **fields: Any) -> None:
        self._requests.put(Request(**fields))

    def push(self, sequence: int) -> None:
        spec = tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[4])
        begin = step_pb2.Push(sequence=sequence, tensors=[step_pb2.PushedTensor(spec=spec)])
        segments = [tensor_pb2.Segment(count=4)]
        self.send(push=begin, chunk=tensor_pb2.Chunk(segments=segments, data=ONES["x"].tobytes()), commit=True)

    def answer(self) -> step_pb2.StepResponse:
        return next(self._answers)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._answers.cancel()
        self._requests.put(None)
        self._channel.close()


@pytest.fixture
def opened(server: Server) -> Iterator[Callable[..., RawStream]]:
    """Streams on this server, closed in the end."""
    streams: list[RawStream] = []

    def opened(*arguments: Any, **options: Any) -> RawStream:
        streams.append(RawStream(server, *arguments, **options))
        return streams[-1]

    yield opened
    for stream in streams:
        stream.close()


def until(holds: Callable[[], object]) -> None:
    """Until something holds."""
    never = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if holds():
            return
        never.wait(0.005)
    raise AssertionError("it does not come to be")


def made(client: optserve.Client, server: Server, set_id: str, policy: Any = None) -> ParameterSet:
    client.create_parameter_set(set_id, {"x": np.zeros(4, np.float32)}, optim.SGD(lr=1.0), policy=policy or Async())
    return server._engine.get(set_id)


def arrived(parameter_set: ParameterSet) -> list[str]:
    return sorted(parameter_set._barrier._arrived)


def test_a_worker_that_comes_to_a_barrier_again_over_another_connection_has_come(
    client: optserve.Client, server: Server, new_id: NewId, opened: Callable[..., RawStream]
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id)
    other, first = opened(set_id, "other", join=True), opened(set_id, "back", join=True)
    other.answer()
    epoch = first.answer().opened.epoch
    first.send(barrier=0)
    until(lambda: arrived(parameter_set) == ["back"])
    (before,) = parameter_set._barrier._arrived.values()
    second = opened(set_id, "back", epoch, join=True)
    second.answer()
    second.send(barrier=0)
    until(
        lambda: parameter_set._barrier._arrived.get("back", before) != before
    )  # whether the first has gone yet or not
    with pytest.raises(grpc.RpcError, match="opened a newer stream"):
        first.answer()
    assert arrived(parameter_set) == ["back"]
    other.send(barrier=0)
    assert other.answer().barriers == second.answer().barriers == 1


def test_barriers_from_before_a_worker_was_a_member_do_not_let_it_through(
    client: optserve.Client, server: Server, new_id: NewId
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id)
    late = client.parameter_set(set_id, client_id="late")
    late.pull()
    with late.worker("early") as early:
        early.barrier()
        waiting = threading.Thread(target=late.barrier)
        waiting.start()
        until(lambda: arrived(parameter_set) == ["late"])
        early.barrier()
        waiting.join(PATIENCE)
    assert parameter_set.barriers == 2


def test_nobody_waits_for_a_barrier_that_is_far_ahead(
    client: optserve.Client, server: Server, new_id: NewId, opened: Callable[..., RawStream]
) -> None:
    set_id = new_id()
    made(client, server, set_id)
    stream = opened(set_id, "odd")
    stream.send(barrier=1 << 63)
    stream.answer()
    assert stream.answer().barriers == 1


def test_the_lease_of_a_member_that_came_while_others_waited_ends_in_time(
    client: optserve.Client, server: Server, new_id: NewId, opened: Callable[..., RawStream]
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id, Sync(2, deadline=10 * PATIENCE))
    waiting = opened(set_id, "waiting")
    waiting.push(1)
    waiting.answer()
    until(lambda: [commit for commit in parameter_set._rounds._waiting.values() if commit.decided is not None])
    opened(set_id, "silent", join=True).answer()
    assert waiting.answer().receipt.outcome == step_pb2.OUTCOME_APPLIED


def test_who_waits_to_be_opened_again_makes_room_for_a_newer_stream(
    client: optserve.Client, server: Server, new_id: NewId, opened: Callable[..., RawStream]
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id, Sync(2, deadline=10 * PATIENCE))
    first = opened(set_id, "impatient")
    epoch = first.answer().opened.epoch
    first.push(1)
    until(lambda: parameter_set._rounds.has("impatient"))
    inside = server._service.streams._inside
    second = opened(set_id, "impatient", epoch)
    until(lambda: server._service.streams._inside == inside + 1 and parameter_set._opening)
    third = opened(set_id, "impatient", epoch)
    with pytest.raises(grpc.RpcError, match="opened a newer stream"):
        second.answer()
    other = opened(set_id, "other")
    other.push(1)
    assert third.answer().opened.last_sequence == 1


def test_the_dead_of_sets_where_nobody_waits_are_no_members_for_ever(
    client: optserve.Client, server: Server, new_id: NewId, opened: Callable[..., RawStream]
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id, Async(staleness.DelayCompensation()))
    for k in range(5):
        stream = opened(set_id, f"dead-{k}")
        stream.push(1)
        stream.send(pull=step_pb2.Pull())
        for _ in range(3):
            stream.answer()
        stream.close()
    alive = client.parameter_set(set_id, client_id="alive")
    until(lambda: alive.step(ONES) and len(parameter_set._members) == 1)
    assert len(parameter_set._pipeline.bases.versions) == 1


def test_a_worker_whose_block_was_not_entered_is_kept_alive(
    client: optserve.Client, server: Server, new_id: NewId
) -> None:
    set_id = new_id()
    made(client, server, set_id)
    worker = client.parameter_set(set_id).worker("careless")
    worker.pull()
    assert worker._session in client._heart._sessions
    worker.close()


@pytest.mark.parametrize(("policy", "samples"), [(Sync(2), 1e-42), (Buffered(2), 1e37)])
def test_weights_that_make_infinities_of_ordinary_gradients_are_refused(
    client: optserve.Client, server: Server, new_id: NewId, policy: Any, samples: float
) -> None:
    set_id = new_id()
    made(client, server, set_id, policy)
    with pytest.raises(
        optserve.InvalidPolicy, match=r"expected samples to be a number of at least 1e-09, at most 1e\+12"
    ):
        client.parameter_set(set_id).push(ONES, samples=samples)


@pytest.mark.parametrize(("policy", "samples"), [(Sync(2), 1e-9), (Buffered(2), 1e12)])
def test_the_mean_of_pushes_of_few_or_many_samples_is_finite(
    client: optserve.Client, server: Server, new_id: NewId, policy: Any, samples: float
) -> None:
    set_id = new_id()
    made(client, server, set_id, policy)
    workers = [client.parameter_set(set_id, client_id=f"worker-{k}") for k in range(2)]
    pushes = [threading.Thread(target=each.push, args=(ONES,), kwargs={"samples": samples}) for each in workers]
    for push in pushes:
        push.start()
    for push in pushes:
        push.join(PATIENCE)
    np.testing.assert_allclose(workers[0].pull()["x"], -1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "sync", [policy_pb2.Sync(workers=3, late=7), policy_pb2.Sync(workers=3, aggregation=policy_pb2.Aggregation())]
)
def test_a_policy_that_is_not_understood_is_refused(
    client: optserve.Client, server: Server, new_id: NewId, sync: policy_pb2.Sync
) -> None:
    set_id = new_id()
    made(client, server, set_id)
    sync.deadline.FromSeconds(5)
    request = optimizer_service_pb2.UpdateParameterSetRequest(id=set_id, policy=policy_pb2.Policy(sync=sync))
    with grpc.insecure_channel(server.address) as channel:
        stub = optimizer_service_pb2_grpc.OptimizerServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.UpdateParameterSet(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_change_that_is_refused_leaves_no_room_for_its_policy_behind(
    client: optserve.Client, server: Server, new_id: NewId
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id)

    class Full:
        def append(self, events: object) -> None:
            raise optserve.StorageFailed("the disk is full")

    log, parameter_set._log = parameter_set._log, Full()  # type: ignore[assignment]
    with pytest.raises(optserve.StorageFailed):
        parameter_set.update({}, Sync(2))
    parameter_set._log = log
    assert parameter_set._pipeline.mean is None


def test_a_push_may_begin_while_the_policy_changes(
    client: optserve.Client, server: Server, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_id = new_id()
    parameter_set = made(client, server, set_id, Buffered(2, staleness=staleness.DelayCompensation()))
    compensated = Pipeline._compensated.fget  # type: ignore[attr-defined]
    changes = itertools.chain([Async()], itertools.repeat(None))

    def changing(pipeline: Pipeline) -> Any:
        value = compensated(pipeline)
        if (policy := next(changes)) is not None:
            parameter_set.update({}, policy)
        return value

    monkeypatch.setattr(Pipeline, "_compensated", property(changing))
    monkeypatch.setattr(parameter_set._pipeline, "_compiled", set())
    assert client.parameter_set(set_id).push(ONES).applied


def test_who_waits_in_vain_is_told_for_whom(client: optserve.Client, server: Server, new_id: NewId) -> None:
    set_id, soon = new_id(), new_id()
    made(client, server, set_id, Sync(8))
    made(client, server, soon, Sync(8, deadline=0.1))
    with optserve.Client(server.address, transport="stream", timeout=0.8) as hasty:
        with pytest.raises(optserve.OutcomeUnknown, match=r"may wait for other workers, of whom `workers\(\)` says"):
            hasty.parameter_set(set_id).push(ONES)
        with pytest.raises(optserve.OptserveError, match=r"expected pushes of 8 workers within 0\.1 s; 1 came"):
            hasty.parameter_set(soon).push(ONES)
