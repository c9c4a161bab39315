"""Shared memory: the same results as over the stream, nothing copied, readers left alone, and nothing for strangers."""

import contextlib
import fcntl
import gc
import mmap
import os
import queue
import random
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optserve
from direct import DirectSet
from holder import holding
from optserve import Parameters, formats, optim
from optserve._carriers import Segments
from optserve._retry import Retry
from optserve._shared_memory import Mappings
from optserve._specification import MOST_BUFFERS
from optserve.v1 import optimizer_service_pb2_grpc, parameter_set_pb2, step_pb2, tensor_pb2
from optserve_server import Config, Server
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.gate import Gate
from optserve_server.shared_memory import F_SEAL_FUTURE_WRITE
from processes import running
from proxy import Proxy

NewId = Callable[[], str]
Array = np.ndarray[Any, Any]
COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients
LARGE = 20_000  # float32 elements of a set whose readers map it; a small one is copied
TENSOR = tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[LARGE])
PATIENCE = 30.0  # seconds that a condition may take to come true
ONES = {"x": np.ones(LARGE, np.float32)}
ZEROS = {"x": np.zeros(LARGE, np.float32)}

# -- the same results


def elements(kind: str, large: bool) -> dict[str, Array]:
    """Normal values: a matrix, a vector, a scalar and nothing at all, in one dtype or in each."""
    rows = 8_000 if large else 40
    shapes: dict[str, tuple[int, ...]] = {"matrix": (rows, 3), "vector": (rows + 7,), "scalar": (), "empty": (0, 4)}
    dtypes = [kind] * 4 if kind != "mixed" else ["bfloat16", "float64", "float16", "float32"]
    return {
        name: normal(shape, dtype, seed)
        for seed, ((name, shape), dtype) in enumerate(zip(shapes.items(), dtypes, strict=True))
    }


def normal(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
    return np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def bits(tensors: dict[str, Array]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


def shares_memory(handle: optserve.ParameterSet) -> bool:
    return isinstance(handle._session._carrier, Segments)


def mapped_segments(handle: optserve.ParameterSet) -> set[int]:
    """Numbers of the segments of parameters that a handle has in its address space."""
    carrier = handle._session._carrier
    assert isinstance(carrier, Segments)
    return set(carrier._mappings._parameters)


each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "mixed"])
each_size = pytest.mark.parametrize("large", [False, True], ids=["small", "large"])


@each_size
@each_dtype
def test_steps_give_the_bits_of_the_stream_and_of_the_engine(
    dtype: str,
    large: bool,
    shared_memory_client: optserve.Client,
    tcp_client: optserve.Client,
    new_id: NewId,
) -> None:
    """Whatever is pushed, all of the tensors or one, and whether results are copied or not."""
    randomness = random.Random(dtype)
    start, optimizer = elements(dtype, large), optim.Adam(lr=0.1, weight_decay=0.01)
    engine = DirectSet(start, optimizer)
    shared, streamed = (
        client.create_parameter_set(new_id(), start, optimizer) for client in (shared_memory_client, tcp_client)
    )
    for number in range(8):
        names = randomness.sample(list(start), randomness.randint(1, len(start)))
        gradients = {name: normal(start[name].shape, start[name].dtype, 100 + number) for name in names}
        engine.push(gradients)
        expected = bits(engine.pull())
        assert bits(streamed.step(gradients)) == expected
        assert bits(shared.step(gradients, copy=bool(number % 2))) == expected
        assert bits(shared.pull()) == expected
        wanted = randomness.sample(list(start), 2)
        assert list(bits(shared.pull(tensors=wanted)).items()) == [(name, expected[name]) for name in wanted]
    assert shares_memory(shared)
    assert bool(mapped_segments(shared)) == large


@each_size
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_updates_of_a_set_of_moments_are_those_of_the_stream_and_of_the_engine(
    dtype: str,
    large: bool,
    shared_memory_client: optserve.Client,
    tcp_client: optserve.Client,
    memory_client: optserve.Client,
    new_id: NewId,
) -> None:
    """Beside gradients in shared memory the caller's parameters travel in chunks, for weight decay."""
    start = elements(dtype, large)
    handles = [
        client.create_parameter_set(new_id(), start, optim.AdamW(lr=0.1), holds="moments")
        for client in (memory_client, tcp_client, shared_memory_client)
    ]
    for number in range(4):
        names = list(start)[number % 3 :]
        gradients = {name: normal(start[name].shape, start[name].dtype, 100 + number) for name in names}
        parameters = {name: start[name] for name in names}
        expected, *others = (bits(handle.step(gradients, parameters=parameters)) for handle in handles)
        assert list(expected) == names
        assert others == [expected, expected]
    assert shares_memory(handles[-1])


# -- nothing copied


def test_a_step_with_gradient_buffers_sends_no_tensor(server: Server, new_id: NewId) -> None:
    """A connection that carries 20 000 bytes in all is enough for five steps of 4 MB each way."""
    size = 1 << 20
    with (
        Proxy(server.address, lambda: 20_000) as proxy,
        optserve.Client(server.address, transport="stream") as direct,
        optserve.Client(proxy.address, transport="shared_memory") as client,
    ):
        created = direct.create_parameter_set(new_id(), {"x": np.zeros(size, np.float32)}, COUNTING)
        weights = client.parameter_set(created.id)
        buffers = weights.gradient_buffers()
        for version in range(1, 6):
            buffers["x"].fill(1)
            params = weights.step(buffers, copy=False)
            assert params.version == version
            assert (params["x"] == version).all()
        assert proxy.connections == 1


def test_gradient_buffers_and_results_lie_in_the_servers_memory(
    shared_memory_client: optserve.Client, new_id: NewId
) -> None:
    start = {"x": np.zeros((100, 200), np.float32), "s": np.zeros((), np.float64)}
    weights = shared_memory_client.create_parameter_set(new_id(), start, COUNTING)
    buffers = weights.gradient_buffers()
    for array in buffers.values():
        array.fill(2)
    assert {name: (array.shape, array.dtype) for name, array in buffers.items()} == {
        name: (array.shape, array.dtype) for name, array in start.items()
    }
    params = weights.step(buffers, copy=False)
    for array in (*buffers.values(), *params.values()):
        assert is_shared(array)
    assert not any(is_shared(array) for array in weights.pull().values())
    assert (params["x"] == 2).all()


def is_shared(array: Array) -> bool:
    """Whether an array lies in a memory file that optserve made."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= address < end:
            return "/memfd:optserve" in line
    raise AssertionError(f"no memory at {address:x}")


def test_gradients_may_lie_anywhere(client: optserve.Client, new_id: NewId) -> None:
    """In the buffers, outside of them, in views, in lists, and each of a push's in another place."""
    start = {name: np.zeros((60, 200), np.float32) for name in "abc"} | {"s": np.zeros(3)}
    weights = client.create_parameter_set(new_id(), start, COUNTING)
    buffers = weights.gradient_buffers()
    buffers["a"].fill(1)
    strided = np.full((200, 120), 2, np.float32).T[::2]
    params = weights.step({"c": strided, "a": buffers["a"], "s": [1.0, 2.0, 3.0], "b": buffers["a"] * 3})
    assert [params[name].max() for name in "abc"] == [params[name].min() for name in "abc"] == [1, 3, 2]
    np.testing.assert_array_equal(params["s"], [1, 2, 3])


def test_a_buffer_may_be_another_tensors_gradient(shared_memory_client: optserve.Client, new_id: NewId) -> None:
    start = {name: np.zeros(LARGE, np.float32) for name in "ab"}
    weights = shared_memory_client.create_parameter_set(new_id(), start, COUNTING)
    buffers = weights.gradient_buffers()
    buffers["a"].fill(1)
    buffers["b"].fill(2)
    params = weights.step({"a": buffers["b"], "b": buffers["a"]})
    assert (params["a"][0], params["b"][0]) == (2, 1)


# -- results that last


@each_size
def test_a_result_that_is_not_copied_stays_until_the_handles_next_step(
    large: bool, client: optserve.Client, new_id: NewId
) -> None:
    """Through many versions of another worker, through calls that move no tensors, and through a push that is refused."""
    size = LARGE if large else 100
    ones = {"x": np.ones(size, np.float32)}
    weights = client.create_parameter_set(new_id(), {"x": np.zeros(size, np.float32)}, COUNTING)
    other = client.parameter_set(weights.id)
    params = weights.step(ones, copy=False)

    def unchanged() -> bool:
        for _ in range(5):
            other.step(ones)
        return bool((params["x"] == 1).all())

    assert unchanged()
    weights.describe()
    weights.gradient_buffers()["x"].fill(7)
    assert weights.settle() is None
    assert unchanged()
    with pytest.raises(optserve.NonFiniteValue):
        weights.step({"x": np.full(size, np.nan, np.float32)}, copy=False)
    with pytest.raises(optserve.NonFiniteValue):
        weights.push({"x": np.full(size, np.inf, np.float32)})
    assert unchanged()
    with pytest.raises(ValueError, match="read-only"):
        params["x"][0] = 0
    assert params.version == 1
    assert weights.step(ones, copy=False).version == 17


@each_size
def test_a_result_that_is_copied_is_the_callers_for_ever(large: bool, client: optserve.Client, new_id: NewId) -> None:
    size = LARGE if large else 100
    ones = {"x": np.ones(size, np.float32)}
    weights = client.create_parameter_set(new_id(), {"x": np.zeros(size, np.float32)}, COUNTING)
    history = [weights.step(ones) for _ in range(6)]
    history[0]["x"][:] = -1  # is nobody else's business
    assert [params["x"].max() for params in history] == [params["x"].min() for params in history]
    assert [params["x"][0] for params in history] == [-1, 2, 3, 4, 5, 6]
    assert (weights.pull()["x"] == 6).all()


WORKERS = 5
ACTIONS = ["step", "step, copied", "push", "pull", "step, refused"]


@settings(max_examples=25)
@given(
    st.sampled_from(["float32", "bfloat16"]),
    st.lists(st.tuples(st.integers(0, WORKERS - 1), st.sampled_from(ACTIONS)), max_size=40),
)
def test_every_reader_keeps_its_version_whoever_comes_and_goes(
    server: Server,
    shared_memory_client: optserve.Client,
    new_id: NewId,
    dtype: str,
    actions: list[tuple[int, str]],
) -> None:
    """Each worker adds one to an element of its own, of one of two tensors: values are exact counters.

    The set never has more than three buffers.
    """
    counts = {name: np.zeros(LARGE, dtype) for name in ("even", "odd")}
    weights = shared_memory_client.create_parameter_set(new_id(), counts, COUNTING)
    parameter_set = server._engine.get(weights.id)
    handles = [shared_memory_client.parameter_set(weights.id) for _ in range(WORKERS)]
    held: dict[int, tuple[Parameters, dict[str, bytes]]] = {}  # by worker, what it may still read
    kept: list[tuple[Parameters, dict[str, bytes]]] = []  # copies
    version = 0
    for worker, action in actions:
        handle, name = handles[worker], ("even", "odd")[worker % 2]
        gradient = np.zeros(LARGE, dtype)
        gradient[worker] = 1 if action != "step, refused" else np.nan
        if action == "step, refused":
            with pytest.raises(optserve.NonFiniteValue):
                handle.step({name: gradient}, copy=False)
        else:
            held.pop(worker, None)
            if action != "pull":
                counts[name][worker] += 1
                version += 1
            if action == "push":
                assert handle.push({name: gradient}).version == version
            else:
                copied = action != "step"
                params = handle.pull() if action == "pull" else handle.step({name: gradient}, copy=copied)
                assert params.version == version
                assert bits(params) == bits(counts)
                kept += [(params, bits(counts))] if copied else []
                held |= {} if copied else {worker: (params, bits(counts))}
        for params, values in (*held.values(), *kept):
            assert bits(params) == values
        assert len(parameter_set.memories) <= MOST_BUFFERS
    for handle in handles:
        handle.close()
    weights.delete()


def test_readers_on_threads_never_see_half_an_update(
    server: Server, shared_memory_client: optserve.Client, new_id: NewId
) -> None:
    """Every element counts all updates, so a version that is torn, or changes under its reader, has unequal elements."""
    size = 1 << 18
    ones = {"x": np.ones(size, np.float32)}
    weights = shared_memory_client.create_parameter_set(new_id(), {"x": np.zeros(size, np.float32)}, COUNTING)

    def work(seed: int) -> None:
        randomness = random.Random(seed)
        with shared_memory_client.parameter_set(weights.id) as mine:
            for _ in range(25):
                params = mine.step(ones, copy=randomness.random() < 0.3)
                for _ in range(randomness.randint(1, 3)):
                    assert (params["x"] == params.version).all()

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    assert weights.pull().version == 25 * WORKERS
    assert len(server._engine.get(weights.id).memories) <= MOST_BUFFERS
    assert eventually(lambda: not pins(server._engine.get(weights.id)))


def pins(parameter_set: ParameterSet) -> int:
    """How many readers keep a version as it is."""
    buffers = parameter_set._buffers
    return sum(buffer.pins for buffer in (buffers.current, *buffers._others))


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true while we wait for it."""
    patience = threading.Event()
    return any(condition() or patience.wait(0.01) for _ in range(int(PATIENCE / 0.01)))


def test_a_worker_maps_no_more_segments_than_the_set_has(shared_memory_client: optserve.Client, new_id: NewId) -> None:
    """Buffers come and go with the number of readers; who keeps one mapped keeps its memory."""
    randomness = random.Random(0)
    weights = shared_memory_client.create_parameter_set(new_id(), ZEROS, COUNTING)
    handles = [shared_memory_client.parameter_set(weights.id) for _ in range(3)]
    for _ in range(200):
        randomness.choice(handles).step(ONES, copy=randomness.random() < 0.5)
    assert max(len(mapped_segments(handle)) for handle in handles) <= MOST_BUFFERS


# -- where there is none


@pytest.fixture
def no_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails must fail at once."""
    monkeypatch.setattr(Retry, "pause", lambda *_: pytest.fail("tried again"))


def works_over_the_stream(weights: optserve.ParameterSet) -> bool:
    buffers = weights.gradient_buffers()
    buffers["x"].fill(1)
    version = weights.push(buffers).version
    params = weights.step(buffers, copy=False)
    assert (params.version, params["x"].min()) == (version + 1, params["x"].max())
    return not shares_memory(weights) and not is_shared(buffers["x"]) and not is_shared(params["x"])


@pytest.mark.usefixtures("no_second_attempt")
def test_a_server_that_shares_no_memory_is_used_over_the_stream() -> None:
    with Server(Config(listen="127.0.0.1:0", max_shared_memory=0)) as server:
        with optserve.Client(server.address) as client:
            assert works_over_the_stream(client.create_parameter_set("a", ZEROS, COUNTING))
        with optserve.Client(server.address, transport="shared_memory") as client:
            weights = client.parameter_set("a")
            with pytest.raises(optserve.NoSharedMemory, match="the server offers no shared memory for set 'a'"):
                weights.step(ONES)
            assert weights.describe().version == 2


@pytest.mark.usefixtures("no_second_attempt")
def test_a_server_on_another_host_is_used_over_the_stream() -> None:
    """As seen from there: the socket that it names does not exist."""
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        with grpc.insecure_channel(server.address) as channel:
            stub = Stub(channel, "a")
            Path(stub.offer.socket).unlink()
            stub.end()
        assert works_over_the_stream(weights)
        with optserve.Client(server.address, transport="shared_memory") as client:
            weights = client.parameter_set("a")
            for _ in range(2):
                with pytest.raises(optserve.NoSharedMemory, match="no shared memory with the server: .*/segments"):
                    weights.step(ONES)
            assert weights.describe().version == 2


@pytest.mark.usefixtures("no_second_attempt")
def test_workers_beyond_the_room_for_gradients_use_the_stream() -> None:
    with (
        Server(Config(listen="127.0.0.1:0", max_shared_memory=6 * LARGE)) as server,
        optserve.Client(server.address) as client,
        optserve.Client(server.address, transport="shared_memory") as insisting,
    ):
        first = client.create_parameter_set("a", ZEROS, COUNTING)
        assert first.step(ONES).version == 1
        assert shares_memory(first)
        assert works_over_the_stream(client.parameter_set("a"))
        with pytest.raises(optserve.NoSharedMemory):
            insisting.parameter_set("a").step(ONES)
        first.close()
        assert room_left(server)
        assert insisting.parameter_set("a").step(ONES).version == 4


def room_left(server: Server) -> bool:
    """Whether all room for gradients in shared memory becomes free."""
    assert server._shared_memory is not None
    return empties(server._shared_memory._room)


def empties(gate: Gate) -> bool:
    with gate._changed:
        return gate._changed.wait_for(lambda: gate._inside == 0, PATIENCE)


@pytest.mark.parametrize("transport", ["", "tcp", "Stream", "shared-memory", "SHARED_MEMORY", None])
def test_a_way_of_tensors_that_does_not_exist_is_refused(transport: Any) -> None:
    with pytest.raises(optserve.InvalidArgument, match="'auto', 'stream' or 'shared_memory'; got"):
        optserve.Client("127.0.0.1:1", transport=transport)


@pytest.mark.parametrize("format", [{"push_format": formats.Int8()}, {"pull_format": formats.BFloat16()}], ids=str)
def test_formats_go_over_the_stream(
    format: dict[str, Any], server: Server, shared_memory_client: optserve.Client, new_id: NewId
) -> None:
    with optserve.Client(server.address) as client:
        weights = client.create_parameter_set(new_id(), ZEROS, COUNTING, **format)
        assert works_over_the_stream(weights)
    with pytest.raises(optserve.InvalidFormat, match="no formats with shared memory"):
        shared_memory_client.parameter_set(weights.id, **format)


def test_an_engine_in_this_process_answers_every_call_and_has_no_memory_to_share(new_id: NewId) -> None:
    with optserve.Client(":memory:") as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        assert works_over_the_stream(weights)
        assert weights.pull(newer_than=2) is None
        assert list(weights.pull(tensors=["x"])) == ["x"]
        assert weights.update(lr=0.5).version == weights.describe().version == 2
        assert weights.settle() is None
        assert [each.id for each in client.list_parameter_sets()] == ["a"]
        weights.delete()
        assert client.list_parameter_sets() == []
    with optserve.Client(":memory:", transport="shared_memory") as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        with pytest.raises(optserve.NoSharedMemory, match="the server offers no shared memory"):
            weights.push(ONES)


# -- strangers


class Stub:
    """A stream as any language opens it: generated stubs, a socket, and memory files."""

    def __init__(self, channel: grpc.Channel, set_id: str, *, shared_memory: bool = True) -> None:
        self._requests: queue.SimpleQueue[step_pb2.StepRequest | None] = queue.SimpleQueue()
        step = optimizer_service_pb2_grpc.OptimizerServiceStub(channel).Step  # type: ignore[no-untyped-call]
        self.answers = step(iter(self._requests.get, None))
        opening = step_pb2.Open(parameter_set_id=set_id, client_id="stub", shared_memory=shared_memory)
        opened = self.ask(open=opening).opened
        self.position = opened.position
        self.offer = opened.shared_memory

    def send(self, **fields: Any) -> None:
        self._requests.put(step_pb2.StepRequest(**fields))

    def ask(self, **fields: Any) -> step_pb2.StepResponse:
        """Send a message and wait for an answer."""
        self.send(**fields)
        answer: step_pb2.StepResponse = next(self.answers)
        return answer

    def end(self) -> None:
        """Say that no more will come, and wait until the server has nothing more to say."""
        self._requests.put(None)
        assert list(self.answers) == []

    def segment(self, number: int) -> int:
        """Descriptor of a segment of this stream."""
        (descriptor,) = asked(self.offer.socket, self.offer.token + number.to_bytes(8, "little"))
        return descriptor

    def gradients(self) -> Array:
        """The memory for this stream's gradients."""
        descriptor = self.segment(self.offer.gradient_segment)
        mapped = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        return np.frombuffer(mapped, np.float32)


def asked(path: str, *parts: bytes, patience: float = PATIENCE) -> list[int]:
    """What a segment socket answers to a request: a descriptor, or none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.settimeout(patience)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            return list(socket.recv_fds(connection, 1, 8)[1])
        return []


def push(sequence: int, *chunks: tensor_pb2.Chunk, **fields: Any) -> dict[str, Any]:
    """The fields of a whole push in one message, or of its first part."""
    declared = step_pb2.Push(sequence=sequence, tensors=[step_pb2.PushedTensor(spec=TENSOR, **fields)])
    return {"push": declared, "chunk": chunks[0], "commit": len(chunks) == 1} if chunks else {"push": declared}


def lying(offset: int = 0, count: int = LARGE, tensor: int = 0) -> tensor_pb2.Chunk:
    """A chunk whose elements lie in shared memory."""
    segment = tensor_pb2.Segment(tensor=tensor, offset=offset, count=count)
    return tensor_pb2.Chunk(segments=[segment], in_shared_memory=True)


def sent(values: Array) -> tensor_pb2.Chunk:
    """A chunk that carries its elements."""
    return tensor_pb2.Chunk(segments=[tensor_pb2.Segment(count=values.size)], data=values.tobytes())


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def weights(tcp_client: optserve.Client, new_id: NewId) -> Iterator[optserve.ParameterSet]:
    """A large set of zeros that counts."""
    weights = tcp_client.create_parameter_set(new_id(), ZEROS, COUNTING)
    yield weights
    weights.delete()


def test_generated_stubs_step_through_shared_memory(channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    stub.gradients()[stub.offer.gradient_offsets[0] // 4 :][:LARGE] = 3
    answer = stub.ask(**push(1, lying()), pull=step_pb2.Pull(in_shared_memory=True))
    assert (answer.receipt.outcome, answer.end) == (step_pb2.OUTCOME_APPLIED, True)
    assert not answer.HasField("chunk")
    mapped = mmap.mmap(stub.segment(answer.parameters.segment), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    params = np.frombuffer(mapped, np.float32, LARGE, stub.offer.parameter_offsets[0])
    weights.push(ONES)
    assert (params == 3).all()
    assert (weights.pull()["x"] == 4).all()
    stub.end()


def test_parameters_can_be_mapped_for_reading_only(channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    answer = stub.ask(pull=step_pb2.Pull(in_shared_memory=True))
    descriptor = stub.segment(answer.parameters.segment)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 0)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"\1", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR), 0)
    mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    assert not any(mapped[: 4 * LARGE])
    stub.end()


def test_segments_can_be_neither_resized_nor_unsealed(channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    pulled = stub.ask(pull=step_pb2.Pull(in_shared_memory=True)).parameters.segment
    common = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    for number, seals in ((stub.offer.gradient_segment, common), (pulled, common | F_SEAL_FUTURE_WRITE)):
        descriptor = stub.segment(number)
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == seals
        for size in (0, 1, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(descriptor)
    stub.end()


def test_only_the_servers_user_can_enter_the_sockets_directory_and_it_goes_with_the_server() -> None:
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        client.create_parameter_set("a", ZEROS, COUNTING)
        with grpc.insecure_channel(server.address) as channel:
            stub = Stub(channel, "a")
            directory = Path(stub.offer.socket).parent
            status = directory.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.geteuid())
            stub.end()
    assert not directory.exists()


def test_who_knows_no_token_and_number_gets_no_segment_and_holds_nobody_up(
    server: Server, channel: grpc.Channel, weights: optserve.ParameterSet, tcp_client: optserve.Client, new_id: NewId
) -> None:
    """Twenty connections that say nothing are open all the while."""
    stub = Stub(channel, weights.id)
    foreign = tcp_client.create_parameter_set(new_id(), ZEROS, COUNTING)
    own, others = (server._engine.get(each.id).memories[0].segment.number for each in (weights, foreign))
    token, path = stub.offer.token, stub.offer.socket
    requests = [
        bytes(16) + bytes(8),
        token[::-1] + own.to_bytes(8, "little"),
        token + others.to_bytes(8, "little"),  # of a set that this stream has nothing to do with
        token + (own + 1_000_000).to_bytes(8, "little"),
        token + b"\xff" * 8,
        token[:-1],
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        random.Random(0).randbytes(1 << 16),
    ]
    with contextlib.ExitStack() as silent:
        for _ in range(20):
            connection = silent.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(path)
        for request in requests:
            assert asked(path, request) == []
            os.close(stub.segment(own))
            os.close(stub.segment(stub.offer.gradient_segment))
    stub.end()


def test_a_request_may_come_in_parts(server: Server, channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    number = server._engine.get(weights.id).memories[0].segment.number
    whole = stub.segment(number)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(stub.offer.socket)
        connection.sendall(stub.offer.token)
        os.close(stub.segment(number))  # when this is answered, the server has seen the first part of the other
        connection.sendall(number.to_bytes(8, "little"))
        (parted,) = socket.recv_fds(connection, 1, 1)[1]
    assert os.path.sameopenfile(whole, parted)
    stub.end()


def test_a_token_alone_asks_for_nothing(channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    assert asked(stub.offer.socket, stub.offer.token) == []
    stub.end()


def test_many_workers_get_their_segments_at_once(
    shared_memory_client: optserve.Client, weights: optserve.ParameterSet
) -> None:
    together = threading.Barrier(48)

    def work(_: int) -> int:
        with shared_memory_client.parameter_set(weights.id) as mine:
            together.wait()
            return mine.push(ONES).version

    with ThreadPoolExecutor(48) as pool:
        assert sorted(pool.map(work, range(48))) == list(range(1, 49))


def test_a_token_is_void_once_its_stream_has_ended(channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    os.close(stub.segment(stub.offer.gradient_segment))
    stub.end()
    number = stub.offer.gradient_segment.to_bytes(8, "little")
    assert asked(stub.offer.socket, stub.offer.token + number) == []


@pytest.mark.parametrize("offered", [False, True], ids=["not offered", "not fetched"])
def test_a_chunk_in_memory_that_the_stream_does_not_share_is_out_of_order(
    offered: bool, channel: grpc.Channel, weights: optserve.ParameterSet
) -> None:
    stub = Stub(channel, weights.id, shared_memory=offered)
    assert bool(stub.offer.socket) == offered
    with pytest.raises(grpc.RpcError) as caught:
        stub.ask(**push(1, lying()))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert dict(error.trailing_metadata())["optserve-reason"] == "MESSAGE_ORDER"
    assert "shares no memory" in error.details()
    assert weights.describe().version == 0


OUTSIDE = {
    "one too many": [lying(count=LARGE + 1)],
    "one too far": [lying(offset=1)],
    "just after": [lying(), lying(offset=LARGE, count=1)],
    "far away": [lying(offset=1 << 63, count=1 << 10)],
    "wrapping around": [lying(offset=(1 << 64) - 1, count=2)],
    "of no element": [lying(count=0)],
    "of another tensor": [lying(tensor=1)],
    "twice": [lying(), lying(offset=4096, count=1)],
    "half": [lying(count=LARGE // 2)],
    "without a segment": [tensor_pb2.Chunk(in_shared_memory=True)],
}


@pytest.mark.parametrize("chunks", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_runs_outside_of_their_tensor_are_refused(
    chunks: list[tensor_pb2.Chunk], channel: grpc.Channel, weights: optserve.ParameterSet
) -> None:
    stub = Stub(channel, weights.id)
    stub.gradients()[:] = 1
    stub.send(**push(1))
    for chunk in chunks:
        stub.send(chunk=chunk)
    answer = stub.ask(commit=True)
    assert answer.receipt.refusal.reason == "INVALID_CHUNK"
    assert not weights.pull()["x"].any()
    assert stub.ask(**push(2, lying())).receipt.outcome == step_pb2.OUTCOME_APPLIED
    assert (weights.pull()["x"] == 1).all()
    stub.end()


def test_encoded_gradients_do_not_lie_in_shared_memory(channel: grpc.Channel, weights: optserve.ParameterSet) -> None:
    stub = Stub(channel, weights.id)
    stub.gradients()[:] = 1
    for sequence, encoding in enumerate((tensor_pb2.ENCODING_BFLOAT16, tensor_pb2.ENCODING_INT8), start=1):
        answer = stub.ask(**push(sequence, lying(), encoding=encoding))
        assert answer.receipt.refusal.reason == "INVALID_CHUNK"
    assert weights.describe().version == 0
    stub.end()


def test_a_step_whose_pull_finds_nothing_newer_leaves_nothing_pinned(
    server: Server, channel: grpc.Channel, weights: optserve.ParameterSet
) -> None:
    stub = Stub(channel, weights.id)
    after = parameter_set_pb2.Position(incarnation=stub.position.incarnation, version=1)
    answer = stub.ask(**push(1, sent(ONES["x"])), pull=step_pb2.Pull(newer_than=after))
    assert (answer.receipt.outcome, answer.parameters.unchanged) == (step_pb2.OUTCOME_APPLIED, True)
    stub.end()
    assert pins(server._engine.get(weights.id)) == 0


# -- crashes


def segments() -> int:
    """How many segments this process, which is the server, has open."""
    gc.collect()
    files = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()).startswith("/memfd:optserve"):
                files.add(entry.stat().st_ino)
    return len(files)


def test_a_worker_that_is_killed_lets_go_of_everything(server: Server, weights: optserve.ParameterSet) -> None:
    """It held a result and had sent an uncommitted push; the others go on meanwhile and afterwards."""
    parameter_set, pushes = server._engine.get(weights.id), server._service.pushes
    for number in range(2):
        with holding(server.address, weights.id) as worker:
            with pushes._changed:
                assert pushes._changed.wait_for(lambda: pushes._inside == 4 * LARGE, PATIENCE)
            assert pins(parameter_set) == 1
            assert (weights.step(ONES)["x"] == 2 + 3 * number).all()
            worker.kill()
            assert (weights.step(ONES)["x"] == 3 + 3 * number).all()
        assert empties(pushes)
        assert eventually(lambda: pins(parameter_set) == 0)
    assert len(parameter_set.memories) <= MOST_BUFFERS
    assert weights.describe().version == 6


def test_workers_that_are_gone_leave_no_segment_behind(
    server: Server, shared_memory_client: optserve.Client, weights: optserve.ParameterSet
) -> None:
    """Whether they said so or were killed."""

    def come_and_go() -> None:
        with shared_memory_client.parameter_set(weights.id) as worker:
            worker.step(ONES)

    before = segments() - len(server._engine.get(weights.id).memories)
    for _ in range(3):
        come_and_go()
    with holding(server.address, weights.id):
        assert segments() > before
    assert eventually(lambda: not pins(server._engine.get(weights.id)))
    assert segments() - len(server._engine.get(weights.id).memories) == before


def test_a_server_that_is_killed_leaves_no_memory_and_its_worker_goes_on_with_the_next(tmp_path: Path) -> None:
    """From the checkpoint that there was, with the buffers that there were; what the worker read stays readable."""
    arguments, log = ("--data-dir", str(tmp_path / "data")), tmp_path / "log"
    files = set(Path("/dev/shm").iterdir())
    with optserve.Client("127.0.0.1:1") as client, contextlib.ExitStack() as lasting:
        with running("--listen", "127.0.0.1:0", *arguments, log=log) as server:
            client = lasting.enter_context(optserve.Client(server.address, transport="shared_memory"))
            hasty = lasting.enter_context(optserve.Client(server.address, transport="shared_memory", timeout=1))
            weights = client.create_parameter_set("a", ZEROS, COUNTING)
            impatient = hasty.parameter_set("a")
            impatient.pull()
            buffers = weights.gradient_buffers()
            buffers["x"].fill(1)
            weights.step(buffers)
            weights.checkpoint()
            params = weights.step(buffers, copy=False)
            server.stop(signal.SIGKILL)
            assert set(Path("/dev/shm").iterdir()) <= files
            with pytest.raises(optserve.OutcomeUnknown):
                impatient.step(ONES)
            with pytest.raises((optserve.ServerUnavailable, optserve.DeadlineExceeded)):
                impatient.pull()
            assert (params["x"] == 2).all()
            buffers["x"].fill(5)
        with running("--listen", server.address, *arguments, log=log):
            with pytest.raises(optserve.RolledBack, match=r"came back at version 1.*of its 2 pushes 1 are left"):
                weights.step(buffers)
            assert (weights.step(buffers)["x"] == 6).all()
            fresh = weights.gradient_buffers()
            assert not np.shares_memory(fresh["x"], buffers["x"])
            fresh["x"].fill(10)
            assert (weights.step(fresh, copy=False)["x"] == 16).all()
            assert shares_memory(weights)
    assert (params["x"] == 2).all()


def test_a_connection_that_breaks_before_the_segment_has_come_is_opened_again(
    server: Server, weights: optserve.ParameterSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server._shared_memory is not None
    attachments = server._shared_memory._attachments
    receive, broken = Mappings._receive, threading.Event()
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="shared_memory", timeout=10) as client,
    ):

        def after_a_break(mappings: Mappings, segment: int) -> int:
            if not broken.is_set():
                broken.set()
                proxy.cut()
                assert eventually(lambda: mappings._offer.token not in attachments)
            return receive(mappings, segment)

        monkeypatch.setattr(Mappings, "_receive", after_a_break)
        assert client.parameter_set(weights.id).step(ONES).version == 1


@pytest.mark.parametrize("transport", ["auto", "shared_memory"])
def test_parameters_whose_segment_cannot_be_had_come_all_the_same(
    transport: str, server: Server, weights: optserve.ParameterSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt to fetch a segment of parameters fails, as when the socket is crowded."""
    receive, failed = Mappings._receive, threading.Event()

    def crowded(mappings: Mappings, segment: int) -> int:
        if segment != mappings._offer.gradient_segment and not failed.is_set():
            failed.set()
            raise BlockingIOError
        return receive(mappings, segment)

    monkeypatch.setattr(Mappings, "_receive", crowded)
    with optserve.Client(server.address, transport=transport, timeout=10) as client:
        params = client.parameter_set(weights.id).step(ONES)
    assert failed.is_set()
    assert (params.version, params["x"].max()) == (1, 1)
