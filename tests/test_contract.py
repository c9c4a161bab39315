"""The contract as any language sees it: generated stubs only, no SDK, and every rule of message order and identity."""

import queue
import re
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import optserve
from optserve import optim
from optserve.v1 import (
    optimizer_pb2,
    optimizer_service_pb2,
    optimizer_service_pb2_grpc,
    parameter_set_pb2,
    step_pb2,
    tensor_pb2,
)
from optserve_server import Server

Stub = optimizer_service_pb2_grpc.OptimizerServiceStub
SIZE = 10


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Stub:
    return Stub(channel)  # type: ignore[no-untyped-call]


def tensor(name: str = "x", size: int = SIZE) -> tensor_pb2.TensorSpec:
    return tensor_pb2.TensorSpec(name=name, dtype=tensor_pb2.DTYPE_FLOAT32, shape=[size])


def chunk(values: Any, offset: int = 0, index: int = 0, *, replace: bool = False) -> tensor_pb2.Chunk:
    data = np.asarray(values, np.float32)
    segment = tensor_pb2.Segment(tensor=index, offset=offset, count=data.size)
    return tensor_pb2.Chunk(segments=[segment], data=data.tobytes(), replace=replace)


@pytest.fixture
def set_id(stub: Stub, new_id: Callable[[], str]) -> str:
    """A set of ten zeros under SGD with a learning rate of -1: parameters count what was added."""
    set_id = new_id()
    spec = parameter_set_pb2.ParameterSetSpec(
        id=set_id,
        tensors=[tensor()],
        optimizer=optimizer_pb2.Optimizer(
            rule="SGD",
            hyperparameters={
                "lr": optimizer_pb2.Value(integer=1),
                "maximize": optimizer_pb2.Value(boolean=True),
            },
        ),
    )
    request = optimizer_service_pb2.CreateParameterSetRequest
    response = stub.CreateParameterSet(iter([request(spec=spec), request(chunk=chunk(np.zeros(SIZE)))]))
    assert response.created
    return set_id


def opening(set_id: str, client_id: str = "worker", epoch: int = 0) -> step_pb2.StepRequest:
    return step_pb2.StepRequest(open=step_pb2.Open(parameter_set_id=set_id, client_id=client_id, epoch=epoch))


def pushing(sequence: int, *tensors: tensor_pb2.TensorSpec) -> step_pb2.Push:
    return step_pb2.Push(
        sequence=sequence, tensors=[step_pb2.PushedTensor(spec=each) for each in tensors or (tensor(),)]
    )


def whole_push(sequence: int, values: Any = None, **fields: Any) -> step_pb2.StepRequest:
    """A push in a single message."""
    values = np.ones(SIZE) if values is None else values
    return step_pb2.StepRequest(push=pushing(sequence), chunk=chunk(values), commit=True, **fields)


def with_rate(request: step_pb2.StepRequest, rate: float) -> step_pb2.StepRequest:
    change = request.push.hyperparameters.add()
    change.hyperparameters["lr"].number = rate
    return request


def run(stub: Stub, *requests: step_pb2.StepRequest) -> list[step_pb2.StepResponse]:
    return list(stub.Step(iter(requests)))


def pulled(stub: Stub, set_id: str) -> np.ndarray[Any, Any]:
    *_, answer = run(stub, opening(set_id, "reader"), step_pb2.StepRequest(pull=step_pb2.Pull()))
    assert answer.end
    return np.frombuffer(answer.chunk.data, np.float32)


def refused(error: grpc.RpcError) -> tuple[str, str, str]:
    """Code, reason and message of a call that was refused."""
    reason = dict(error.trailing_metadata()).get("optserve-reason", "")
    return error.code().name, reason, error.details()


def test_a_small_step_is_one_message_each_way(stub: Stub, set_id: str) -> None:
    opened, answer = run(stub, opening(set_id), whole_push(1, pull=step_pb2.Pull()))
    assert opened.opened.epoch != 0
    assert list(opened.opened.tensors) == [tensor()]
    assert answer.receipt.outcome == step_pb2.OUTCOME_APPLIED
    assert answer.parameters.position.version == 1
    assert answer.end
    np.testing.assert_array_equal(np.frombuffer(answer.chunk.data, np.float32), np.ones(SIZE))


def test_chunks_come_in_any_order_and_later_pushes_need_not_declare_again(stub: Stub, set_id: str) -> None:
    requests = [
        opening(set_id),
        step_pb2.StepRequest(push=pushing(1)),
        step_pb2.StepRequest(chunk=chunk(np.full(4, 2), offset=6)),
        step_pb2.StepRequest(chunk=chunk(np.full(6, 1))),
        step_pb2.StepRequest(commit=True),
        step_pb2.StepRequest(push=step_pb2.Push(sequence=2), chunk=chunk(np.ones(SIZE)), commit=True),
    ]
    _, first, second = run(stub, *requests)
    assert first.receipt.outcome == second.receipt.outcome == step_pb2.OUTCOME_APPLIED
    np.testing.assert_array_equal(pulled(stub, set_id), [2] * 6 + [3] * 4)


def test_a_push_sent_again_is_applied_once_and_gets_its_first_receipt(stub: Stub, set_id: str) -> None:
    opened, first = run(stub, opening(set_id), whole_push(1))
    run(stub, opening(set_id, "other"), whole_push(1))
    resumed, again = run(stub, opening(set_id, epoch=opened.opened.epoch), whole_push(1))
    assert resumed.opened.epoch == opened.opened.epoch
    assert resumed.opened.last_sequence == 1
    assert resumed.opened.last_receipt == first.receipt
    assert again.receipt.duplicate
    again.receipt.duplicate = False
    assert again.receipt == first.receipt
    np.testing.assert_array_equal(pulled(stub, set_id), np.full(SIZE, 2))


def test_a_step_sent_again_gets_the_current_parameters(stub: Stub, set_id: str) -> None:
    opened, _ = run(stub, opening(set_id), whole_push(1))
    run(stub, opening(set_id, "other"), whole_push(1))
    _, again = run(stub, opening(set_id, epoch=opened.opened.epoch), whole_push(1, pull=step_pb2.Pull()))
    assert (again.receipt.position.version, again.parameters.position.version) == (1, 2)


def test_a_refused_push_is_recorded_and_gets_the_same_refusal_again(stub: Stub, set_id: str) -> None:
    bad = whole_push(1, np.full(SIZE, np.nan), pull=step_pb2.Pull())
    opened, first = run(stub, opening(set_id), bad)
    assert first.receipt.refusal.reason == "NON_FINITE_VALUE"
    assert first.receipt.refusal.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert not first.HasField("parameters")
    _, again, good = run(stub, opening(set_id, epoch=opened.opened.epoch), bad, whole_push(2))
    assert again.receipt.duplicate
    assert again.receipt.refusal == first.receipt.refusal
    assert good.receipt.outcome == step_pb2.OUTCOME_APPLIED
    np.testing.assert_array_equal(pulled(stub, set_id), np.ones(SIZE))


@pytest.mark.parametrize(
    ("requests", "reason", "message"),
    [
        ([step_pb2.StepRequest(chunk=chunk(np.ones(9)))], "INVALID_CHUNK", "all of its 10 elements.*got 9"),
        (
            [step_pb2.StepRequest(chunk=chunk(np.ones(6))), step_pb2.StepRequest(chunk=chunk(np.ones(5), 5))],
            "INVALID_CHUNK",
            "elements 5 to 10 overlap",
        ),
        ([step_pb2.StepRequest(chunk=chunk(np.ones(6), 5))], "INVALID_CHUNK", "within its 10; got elements 5 to 11"),
        ([step_pb2.StepRequest(chunk=chunk(np.ones(10), index=1))], "INVALID_CHUNK", "got index 1"),
        (
            [step_pb2.StepRequest(chunk=tensor_pb2.Chunk(segments=chunk(np.ones(10)).segments, data=b"abc"))],
            "INVALID_CHUNK",
            "expected 40 bytes.*got 3",
        ),
        ([], "INVALID_CHUNK", "got 0"),
        ([step_pb2.StepRequest(chunk=tensor_pb2.Chunk())], "INVALID_CHUNK", "at least one segment"),
    ],
)  # fmt: skip
def test_truncated_and_overlapping_chunks_are_refused(
    stub: Stub, set_id: str, requests: list[step_pb2.StepRequest], reason: str, message: str
) -> None:
    end = step_pb2.StepRequest(commit=True)
    begin = step_pb2.StepRequest(push=pushing(1))
    _, answer, good = run(stub, opening(set_id), begin, *requests, end, whole_push(2))
    assert answer.receipt.refusal.reason == reason
    assert re.search(message, answer.receipt.refusal.message)
    assert good.receipt.outcome == step_pb2.OUTCOME_APPLIED
    np.testing.assert_array_equal(pulled(stub, set_id), np.ones(SIZE))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (tensor("y"), "TENSOR_MISMATCH"),
        (tensor(size=11), "TENSOR_MISMATCH"),
        (tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.DTYPE_FLOAT64, shape=[SIZE]), "TENSOR_MISMATCH"),
        (tensor(size=2**47), "TENSOR_MISMATCH"),  # nothing is allocated from what a push says
    ],
)
def test_a_wrong_declaration_is_refused(stub: Stub, set_id: str, spec: tensor_pb2.TensorSpec, reason: str) -> None:
    bad = step_pb2.StepRequest(push=pushing(1, spec), chunk=chunk(np.ones(SIZE)), commit=True)
    _, answer = run(stub, opening(set_id), bad)
    assert answer.receipt.refusal.reason == reason
    np.testing.assert_array_equal(pulled(stub, set_id), np.zeros(SIZE))


LYING = tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[2**32, 2**32])
UNTYPED = tensor_pb2.TensorSpec(name="x", shape=[SIZE])
STREAM_ERRORS: dict[str, tuple[list[Any], str, str]] = {
    "push before open": ([lambda _: whole_push(1)], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "pull before open": ([lambda _: step_pb2.StepRequest(pull=step_pb2.Pull())], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "open twice": ([opening, opening], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "chunk without push": (
        [opening, lambda _: step_pb2.StepRequest(chunk=chunk(np.ones(SIZE)))], "FAILED_PRECONDITION", "MESSAGE_ORDER",
    ),
    "commit without push": ([opening, lambda _: step_pb2.StepRequest(commit=True)], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "push inside a push": (
        [opening, lambda _: step_pb2.StepRequest(push=pushing(1)), lambda _: step_pb2.StepRequest(push=pushing(2))],
        "FAILED_PRECONDITION", "MESSAGE_ORDER",
    ),
    "gap in the sequence": ([opening, lambda _: whole_push(2)], "FAILED_PRECONDITION", "SEQUENCE_GAP"),
    "sequence 0": ([opening, lambda _: whole_push(0)], "FAILED_PRECONDITION", "SEQUENCE_GAP"),
    "one sequence, two gradients": (
        [opening, lambda _: whole_push(1), lambda _: whole_push(1, np.full(SIZE, 2))], "INVALID_ARGUMENT", "SEQUENCE_REUSED",
    ),
    "unknown set": ([lambda _: opening("no/such-set")], "NOT_FOUND", "PARAMETER_SET_NOT_FOUND"),
    "bad client id": ([lambda name: opening(name, "../x")], "INVALID_ARGUMENT", "INVALID_NAME"),
    "shape that overflows": (
        [opening, lambda _: step_pb2.StepRequest(push=pushing(1, LYING))], "INVALID_ARGUMENT", "INVALID_TENSOR",
    ),
    "pull inside a push": (
        [opening, lambda _: step_pb2.StepRequest(push=pushing(1), pull=step_pb2.Pull())],
        "FAILED_PRECONDITION", "MESSAGE_ORDER",
    ),
    "one sequence, two learning rates": (
        [opening, lambda _: whole_push(1), lambda _: with_rate(whole_push(1), 0.5)], "INVALID_ARGUMENT", "SEQUENCE_REUSED",
    ),
    "no dtype": ([opening, lambda _: step_pb2.StepRequest(push=pushing(1, UNTYPED))], "INVALID_ARGUMENT", "INVALID_TENSOR"),
}  # fmt: skip


@pytest.mark.parametrize(("requests", "code", "reason"), STREAM_ERRORS.values(), ids=STREAM_ERRORS.keys())
def test_a_stream_that_breaks_the_rules_ends_with_a_typed_status(
    stub: Stub, set_id: str, requests: list[Callable[[str], Any]], code: str, reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, *(request(set_id) for request in requests))
    assert refused(caught.value)[:2] == (code, reason)
    assert pulled(stub, set_id).max() <= 1


def test_a_newer_stream_of_the_same_client_takes_over(stub: Stub, set_id: str, new_id: Callable[[], str]) -> None:
    requests: queue.SimpleQueue[step_pb2.StepRequest | None] = queue.SimpleQueue()
    older = stub.Step(iter(requests.get, None))
    requests.put(opening(set_id))
    epoch = next(older).opened.epoch
    requests.put(step_pb2.StepRequest(push=pushing(1), chunk=chunk(np.ones(SIZE))))
    (newer,) = run(stub, opening(set_id, epoch=epoch))
    assert (newer.opened.epoch, newer.opened.last_sequence) == (epoch, 0)
    requests.put(step_pb2.StepRequest(commit=True))
    with pytest.raises(grpc.RpcError) as caught:
        next(older)
    assert refused(caught.value)[:2] == ("ABORTED", "SESSION_SUPERSEDED")
    np.testing.assert_array_equal(pulled(stub, set_id), np.zeros(SIZE))


CREATIONS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "nothing": ([], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "no specification": ([{"chunk": chunk(np.ones(SIZE))}], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "specification twice": ([{"spec": True}, {"spec": True}], "FAILED_PRECONDITION", "MESSAGE_ORDER"),
    "no values": ([{"spec": True}], "INVALID_ARGUMENT", "INVALID_CHUNK"),
    "an empty message": ([{"spec": True}, {}], "INVALID_ARGUMENT", "INVALID_CHUNK"),
    "unknown rule": ([{"spec": True, "rule": "Adm"}], "INVALID_ARGUMENT", "UNKNOWN_RULE"),
    "climbing id": ([{"spec": True, "id": "../../etc"}], "INVALID_ARGUMENT", "INVALID_NAME"),
    "two tensors of one name": (
        [{"spec": True, "tensors": [tensor(), tensor()]}], "INVALID_ARGUMENT", "INVALID_TENSOR",
    ),
    "set larger than the machine": (
        [{"spec": True, "tensors": [tensor(size=2**46)]}], "INVALID_ARGUMENT", "INVALID_TENSOR",
    ),
    "shape that overflows": ([{"spec": True, "tensors": [LYING]}], "INVALID_ARGUMENT", "INVALID_TENSOR"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "code", "reason"), CREATIONS.values(), ids=CREATIONS.keys())
def test_a_set_is_created_whole_or_not_at_all(
    stub: Stub, new_id: Callable[[], str], messages: list[dict[str, Any]], code: str, reason: str
) -> None:
    set_id = new_id()

    def request(fields: dict[str, Any]) -> optimizer_service_pb2.CreateParameterSetRequest:
        if not fields.get("spec"):
            return optimizer_service_pb2.CreateParameterSetRequest(**fields)
        spec = parameter_set_pb2.ParameterSetSpec(
            id=fields.get("id", set_id),
            tensors=fields.get("tensors", [tensor()]),
            optimizer=optimizer_pb2.Optimizer(rule=fields.get("rule", "Adam")),
        )
        return optimizer_service_pb2.CreateParameterSetRequest(spec=spec)

    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateParameterSet(iter([request(fields) for fields in messages]))
    assert refused(caught.value)[:2] == (code, reason)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetParameterSet(optimizer_service_pb2.GetParameterSetRequest(id=set_id))
    assert refused(caught.value)[:2] == ("NOT_FOUND", "PARAMETER_SET_NOT_FOUND")


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel) -> None:
    step = channel.stream_stream("/optserve.v1.OptimizerService/Step")  # bytes in, bytes out
    with pytest.raises(grpc.RpcError) as caught:
        list(step(iter([b"\xff" * 100])))
    assert refused(caught.value)[:2] == ("INVALID_ARGUMENT", "INVALID_CHUNK")


def test_bytes_that_are_no_request_are_refused(channel: grpc.Channel) -> None:
    describe = channel.unary_unary("/optserve.v1.OptimizerService/GetParameterSet")
    with pytest.raises(grpc.RpcError) as caught:
        describe(b"\xff" * 10)
    assert refused(caught.value)[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_a_long_message_in_any_alphabet_arrives_as_what_it_is(
    tcp_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    names = {f"{k}{'語' * 500}": np.zeros(1, np.float32) for k in range(10)}
    weights = tcp_client.create_parameter_set(new_id(), names, optim.SGD())
    with pytest.raises(optserve.TensorMismatch):
        weights.pull(tensors=["x"])


def test_rules_are_listed_with_hyperparameters_defaults_and_documentation(stub: Stub) -> None:
    rules = {rule.rule: rule for rule in stub.ListRules(optimizer_service_pb2.ListRulesRequest()).rules}
    built_in = [name for name in optim.catalogue() if hasattr(optim, name)]
    assert [name for name in rules if name in built_in] == built_in
    for rule in map(rules.__getitem__, built_in):
        assert rule.summary.endswith(".")
        assert "Reference:" in rule.documentation or rule.rule == "Momentum"
        assert all(hyperparameter.documentation for hyperparameter in rule.hyperparameters)
    adam = {each.name: each for each in rules["Adam"].hyperparameters}
    assert [value.number for value in adam["betas"].default_value.list.values] == [0.9, 0.999]
    assert (adam["lr"].live, adam["amsgrad"].live) == (True, False)
    assert list(rules["Adam"].slots) == ["exp_avg", "exp_avg_sq"]


def test_health_and_reflection_answer(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "optserve.v1.OptimizerService"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "optserve.v1.OptimizerService" in database.get_services()
    described = database.FindFileContainingSymbol("optserve.v1.OptimizerService")
    assert [method.name for method in described.service[0].method][-1] == "Step"


def test_the_sdk_and_generated_stubs_work_on_one_set(stub: Stub, set_id: str, tcp_client: optserve.Client) -> None:
    run(stub, opening(set_id), whole_push(1))
    params = tcp_client.parameter_set(set_id).step({"x": np.ones(SIZE, np.float32)})
    np.testing.assert_array_equal(params["x"], np.full(SIZE, 2, np.float32))
