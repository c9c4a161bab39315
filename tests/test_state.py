"""A set's state as a value: another set goes on from it with the same bits, and what no set could be in is refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import optserve
from direct import DirectSet
from equality import same
from optserve import EMA, SWA, Lookahead, SkipNonFinite, State, Transforms, optim
from optserve._messages import encode_outline, encode_spec
from optserve._specification import ParameterSetSpec, Run
from optserve._transport import CHANNEL_OPTIONS
from optserve._wire import bytes_of, pack
from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server import Server
from optserve_server.engine import outlines, rules
from optserve_server.engine.engine import Engine
from optserve_server.engine.rules import Tensor, TensorRule
from optserve_server.engine.staging import Staging
from optserve_server.service import OptimizerService

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NewId = Callable[[], str]

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
SHAPES = {"w": (7, 5), "b": (4097,), "scalar": (), "late": (2,), "none": (0, 3)}
MIXED = {"w": np.float64, "b": np.float32, "scalar": bfloat16}


def tensors(seed: int, *, late: bool = True, dtypes: Mapping[str, Any] | None = None) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(size=shape), (dtypes or {}).get(name, np.float32))
        for name, shape in SHAPES.items()
        if late or name != "late"
    }


MOVES: dict[str, tuple[optim.Optimizer, dict[str, Any]]] = {
    "no slots": (optim.SGD(), {}),
    "memory": (optim.NAdam(), {}),
    "copies": (optim.ASGD(t0=2.0), {}),
    "many slots": (optim.Adan(weight_decay=0.1), {}),
    "averages": (optim.AMSGrad(), {"transforms": Transforms(lookahead=Lookahead(3), average=EMA(0.9))}),
    "waiting pushes": (optim.Adam(), {"transforms": Transforms(accumulate=3, average=SWA(2))}),
    "a buffer": (optim.Adam(), {"policy": optserve.Buffered(pushes=3)}),
    "a buffer of samples": (optim.Adam(), {"policy": optserve.Buffered(samples=2.5)}),
    "statistics": (optim.Adam(), {"buffers": {"b": "average", "scalar": "freeze"}, "pushes": "deltas"}),
    "in sync": (optim.Momentum(), {"policy": optserve.Sync(1), "guard": False}),
    "moments only": (optim.Adam(), {"holds": "moments"}),
}


@pytest.mark.parametrize(("optimizer", "options"), MOVES.values(), ids=MOVES.keys())
@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_a_set_goes_on_where_another_stood(
    request: pytest.FixtureRequest, memory_client: optserve.Client, new_id: NewId, transport: str,
    optimizer: optim.Optimizer, options: dict[str, Any],
) -> None:  # fmt: skip
    client: optserve.Client = request.getfixturevalue(f"{transport}_client")
    dtypes = MIXED if optimizer.rule == "NAdam" else None
    groups = [optim.Group("few", "b", "s*", lr=0.5)]
    weights = client.create_parameter_set(new_id(), tensors(0, dtypes=dtypes), optimizer, groups=groups, **options)
    for seed in range(1, 5):
        weights.push(tensors(seed, late=False, dtypes=dtypes))
    weights.update(lr=0.25)
    state = weights.state()
    assert (state.steps["late"], state.version) == (0, weights.describe().version)
    moved = memory_client.create_parameter_set(new_id(), state, **options)
    assert same(moved.state(), state)
    for seed in range(5, 9):
        gradients = tensors(seed, late=state.accumulation is None, dtypes=dtypes)
        ours, theirs = moved.step(gradients), weights.step(gradients)
        assert same(ours, theirs)
        assert ours.version == theirs.version
    if optimizer.rule == "ASGD" or "transform:average" in state.slots:
        assert same(moved.pull(evaluation=True), weights.pull(evaluation=True))
    assert same(moved.state(), weights.state())


def test_pushes_that_wait_weigh_by_their_samples_where_they_have_moved(
    memory_client: optserve.Client, new_id: NewId
) -> None:
    """Also in a buffer of another size."""
    policy = optserve.Buffered(samples=8.0)
    weights = memory_client.create_parameter_set(new_id(), {"w": np.zeros(3)}, optim.SGD(lr=1.0), policy=policy)
    weights.push({"w": np.full(3, 1.0)}, samples=1.0)
    weights.push({"w": np.full(3, 5.0)}, samples=3.0)
    for size in (8.0, 5.0):
        moved = memory_client.create_parameter_set(new_id(), weights.state(), policy=optserve.Buffered(samples=size))
        assert moved.push({"w": np.full(3, 2.0)}, samples=4.0).applied
        np.testing.assert_allclose(moved.pull()["w"], -(1 * 1 + 3 * 5 + 4 * 2) / 8, rtol=1e-15)
    with pytest.raises(optserve.InvalidState, match="fewer than 4 samples.*got 2 pushes, of 4 samples"):
        memory_client.create_parameter_set(new_id(), weights.state(), policy=optserve.Buffered(samples=4.0))


def test_skipped_pushes_are_counted_on(memory_client: optserve.Client, new_id: NewId) -> None:
    options = {"transforms": Transforms(nonfinite=SkipNonFinite(at_most=2))}
    weights = memory_client.create_parameter_set(new_id(), {"w": np.ones(3)}, optim.SGD(), **options)  # type: ignore[arg-type]
    weights.push({"w": np.full(3, np.nan)})
    moved = memory_client.create_parameter_set(new_id(), weights.state(), **options)  # type: ignore[arg-type]
    assert moved.push({"w": np.full(3, np.nan)}).outcome is optserve.Outcome.SKIPPED
    with pytest.raises(optserve.NonFiniteValue):
        moved.push({"w": np.full(3, np.nan)})


def test_a_state_may_leave_out_what_has_had_no_update(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), tensors(0), optim.NAdam(lr=0.1))
    weights.push(tensors(1, late=False))
    state = weights.state()
    slots = {
        slot: {name: array for name, array in arrays.items() if name != "late"} for slot, arrays in state.slots.items()
    }
    memory = {name: values for name, values in state.memory.items() if name != "late"}
    moved = memory_client.create_parameter_set(new_id(), replace(state, slots=slots, memory=memory))
    assert same(moved.state(), state)


def test_a_state_travels_in_chunks(server: Server, tcp_client: optserve.Client, new_id: NewId) -> None:
    import grpc

    from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

    weights = tcp_client.create_parameter_set(new_id(), {"w": np.ones(1_500_000, np.float32)}, optim.Adam())
    with grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        answers = list(OptimizerServiceStub(channel).ExportParameterSet(pb.ExportParameterSetRequest(id=weights.id)))
    assert answers[0].spec.id == weights.id
    assert [part.name for part in answers[1].state.parts] == ["parameters", "exp_avg", "exp_avg_sq"]
    assert max(answer.ByteSize() for answer in answers) < 2.1 * 2**20
    assert sum(segment.count for answer in answers[2:] for segment in answer.chunk.segments) == 3 * 1_500_000
    weights.delete()
    with pytest.raises(optserve.ParameterSetNotFound):
        tcp_client.parameter_set(weights.id)


def test_an_export_is_counted_as_bytes_in_flight() -> None:
    engine = Engine(1)
    service = OptimizerService(engine, max_bytes_in_flight=1)
    spec = ParameterSetSpec("a", (optserve.TensorSpec.of("w", np.ones(3)),), optim.SGD())
    values = engine.stage(spec.tensors)
    values.add([Run(0, 0, 3)], np.ones(3).tobytes())
    values.finish()
    engine.add(engine.create(spec, values))
    request = pb.ExportParameterSetRequest(id="a")
    first = service.call("ExportParameterSet", request)
    next(first)
    with pytest.raises(optserve.ServerBusy):
        next(service.call("ExportParameterSet", request))
    first.close()
    assert len(list(service.call("ExportParameterSet", request))) == 3
    engine.close()


def changed(state: State, slot: str, **arrays: Array | None) -> State:
    """A state with other arrays in a slot, or without them."""
    kept = {name: array for name, array in {**state.slots.get(slot, {}), **arrays}.items() if array is not None}
    return replace(state, slots={**state.slots, slot: kept})


W = np.ones((2, 3), np.float32)

BAD: dict[str, tuple[Callable[[State], State], dict[str, Any], type[optserve.OptserveError], str]] = {
    "unknown slot": (lambda s: changed(s, "momentum", w=W), {}, optserve.InvalidState, "'exp_avg'.*got 'momentum'"),
    "missing slot": (
        lambda s: replace(s, slots={"exp_avg": s.slots["exp_avg"]}), {}, optserve.InvalidState,
        "expected exp_avg_sq of tensor 'w'.*had 1 updates; got none",
    ),
    "missing tensor": (lambda s: changed(s, "exp_avg", w=None), {}, optserve.InvalidState, "exp_avg of tensor 'w'.*got none"),
    "unknown tensor": (lambda s: changed(s, "exp_avg", z=W), {}, optserve.InvalidState, "'b', 'w'; got 'z'"),
    "wrong shape": (
        lambda s: changed(s, "exp_avg", w=W.T.copy()), {}, optserve.InvalidState, r"shape \[2, 3\]; got \[3, 2\]"
    ),
    "wrong shape of parameters": (
        lambda s: replace(s, parameters={**s.parameters, "w": W.ravel()}), {}, optserve.InvalidState, r"got \[6\]"
    ),
    "wider dtype": (
        lambda s: changed(s, "exp_avg", w=W.astype(np.float64)), {}, optserve.InvalidState,
        "'exp_avg of w' as float32; got float64",
    ),
    "nan": (
        lambda s: changed(s, "exp_avg", w=W * np.nan), {}, optserve.NonFiniteValue, r"'exp_avg of w'.*nan at index \[0, 0\]"
    ),
    "infinite parameter": (
        lambda s: replace(s, parameters={**s.parameters, "b": np.full(2, np.inf, np.float32)}), {},
        optserve.NonFiniteValue, "'b'.*got inf",
    ),
    "negative steps": (
        lambda s: replace(s, steps={"w": -1, "b": 1}), {}, optserve.InvalidState, "steps of 'w'.*got -1"
    ),
    "steps of half": (
        lambda s: replace(s, steps={"w": 0.5, "b": 1}), {}, optserve.InvalidState, "whole number.*got 0.5"  # type: ignore[dict-item]
    ),
    "missing steps": (lambda s: replace(s, steps={"w": 1}), {}, optserve.InvalidState, "'b', 'w'; got those of 'w'"),
    "negative version": (lambda s: replace(s, version=-1), {}, optserve.InvalidState, "version.*got -1"),
    "missing memory": (lambda s: replace(s, memory={}), {}, optserve.InvalidState, "'mu_product' of tensor 'w'"),
    "unknown memory": (
        lambda s: replace(s, memory={"w": {"eta": 1.0}}), {}, optserve.InvalidState, "'mu_product'.*got 'eta'"
    ),
    "memory of nan": (
        lambda s: replace(s, memory={"w": {"mu_product": np.nan}}), {}, optserve.InvalidState, "finite; got nan"
    ),
    "memory of groups": (
        lambda s: replace(s, group_memory={"default": {"d": 1.0}}), {}, optserve.InvalidState, "groups; got 'default'"
    ),
    "no groups": (lambda s: replace(s, groups=()), {}, optserve.InvalidState, "'default' first"),
    "waiting pushes without accumulation": (
        lambda s: replace(s, accumulation=optserve.Accumulation(1, {"w": W})), {}, optserve.InvalidState, "fewer than"
    ),
    "waiting pushes without gradients": (
        lambda s: replace(s, accumulation=optserve.Accumulation(1, {})), {"transforms": Transforms(accumulate=2)},
        optserve.InvalidState, "gradients that 1 waiting",
    ),
    "average that the state lacks": (
        lambda s: s, {"transforms": Transforms(average=EMA())}, optserve.InvalidState, "transform:average of tensor 'w'"
    ),
    "no parameters": (
        lambda s: replace(s, parameters={}), {}, optserve.InvalidState, "parameters of tensor 'w'"
    ),
    "optimizer beside it": (
        lambda s: s, {"optimizer": optim.NAdam()}, optserve.InvalidArgument, "a state alone.*got NAdam"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_a_state_that_no_set_could_be_in_is_refused(
    request: pytest.FixtureRequest, new_id: NewId, transport: str,
    change: Callable[[State], State], options: dict[str, Any], error: type[Exception], message: str,
) -> None:  # fmt: skip
    client: optserve.Client = request.getfixturevalue(f"{transport}_client")
    start = {"w": W, "b": np.ones(2, np.float32)}
    with client.create_parameter_set(new_id(), start, optim.NAdam()) as weights:
        weights.push(start)
        state, set_id = weights.state(), new_id()
        with pytest.raises(error, match=f"(?s){message}"):
            client.create_parameter_set(set_id, change(state), **options)
        assert set_id not in [each.id for each in client.list_parameter_sets()]
        client.create_parameter_set(set_id, state).delete()
        weights.delete()


def test_outlines_of_other_clients_are_checked_too(server: Server, tcp_client: optserve.Client, new_id: NewId) -> None:
    """What the SDK would never send."""
    import grpc

    from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

    weights = tcp_client.create_parameter_set(new_id(), {"w": W}, optim.NAdam())
    weights.push({"w": W})
    state = weights.state()
    outline = encode_outline(state.packed()[0], state.tensors)
    spec = encode_spec(ParameterSetSpec(new_id(), state.tensors, state.optimizer))
    mistakes: list[Callable[[Any], object]] = [
        lambda message: message.parts[1].tensors.append(1),
        lambda message: message.parts[1].tensors.append(0),
        lambda message: message.parts[1].shapes.add(sizes=[2**60]),
        lambda message: message.parts.append(message.parts[1]),
        lambda message: message.steps.append(1),
        lambda message: message.steps.__setitem__(0, 2**64 - 1),
        lambda message: message.memory[0].values.append(1.0),
    ]
    with grpc.insecure_channel(server.address) as channel:
        stub = OptimizerServiceStub(channel)
        for mistake in mistakes:
            message = pb.CreateParameterSetRequest(spec=spec, state=outline)
            mistake(message.state)
            with pytest.raises(grpc.RpcError) as caught:
                stub.CreateParameterSet(iter([message]))
            assert ("optserve-reason", "INVALID_STATE") in caught.value.trailing_metadata()
    assert spec.id not in [each.id for each in tcp_client.list_parameter_sets()]


class RowSums(optim.SignSGD):
    """A rule for whole tensors: a slot of rows, and a memory of the group."""


def rows(optimizer: RowSums, tensors: Sequence[Tensor], memory: Array) -> None:
    memory += len(tensors)
    for tensor in tensors:
        tensor.slots["rows"][...] += tensor.gradient.sum(axis=1)
        tensor.parameter[...] -= optimizer.lr * memory[0] * tensor.slots["rows"][:, None]


def test_slots_of_other_shapes_and_memory_of_groups_move(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = TensorRule(rows, {"rows": lambda spec: spec.shape[:1]}, {"updates": 0.0})
    monkeypatch.setitem(rules.RULES, RowSums, rule)
    start = {"w": np.ones((3, 2)), "v": np.ones((2, 5))}
    first, second = DirectSet(start, RowSums()), DirectSet(start, RowSums())
    first.push({"w": start["w"]})
    outline, elements = outlines.outlined(first.set.capture())
    assert outline.group_memory == {"default": {"updates": 1.0}}
    assert {part.name: part.shapes for part in outline.parts}["rows"] == ((3,), (2,))
    staging = Staging(outline.elements(first.set.spec.tensors), first._threads)
    for payload in pack((k, bytes_of(each), each.itemsize) for k, each in enumerate(elements)):
        staging.add(payload.runs, payload.buffer)
    staging.finish()
    second.set.resume(outlines.start(second.set.spec, outline), staging)
    for direct in (first, second):
        direct.push(start)
    assert same(second.pull(), first.pull())
    with pytest.raises(optserve.InvalidState, match="'updates' of group 'default', which has had 1 updates"):
        outlines.start(first.set.spec, replace(outline, group_memory={}))
    with pytest.raises(optserve.InvalidState, match="'updates' of a group among 'default'"):
        outlines.start(first.set.spec, replace(outline, group_memory={"default": {"d": 1.0}}))


def test_a_set_with_state_in_fewer_bits_stays_where_it_is(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), {"w": W}, optim.Adam(), state="bfloat16")
    with pytest.raises(optserve.InvalidState, match=f"state in full.*{weights.id!r} keeps it as bfloat16"):
        weights.state()


def test_a_set_with_a_table_stays_where_it_is(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), {"rows": optserve.Table((2,), 10)}, optim.SGD())
    with pytest.raises(optserve.InvalidState, match="without tables.*'rows'"):
        weights.state()
