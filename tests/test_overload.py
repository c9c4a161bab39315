"""Overload: more uploads than there is room for, workers that stop half way, readers that do not read."""

import contextlib
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import optserve
from optserve import optim
from optserve._messages import encode_spec
from optserve._specification import MOST_BUFFERS, ParameterSetSpec, TensorSpec
from optserve.formats import BFloat16
from optserve.v1 import optimizer_service_pb2, optimizer_service_pb2_grpc, step_pb2, tensor_pb2
from optserve_server import Config, Server
from optserve_server.gate import Gate
from processes import ServerProcess, running

Array = np.ndarray[Any, Any]
MIB = 1 << 20
COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients
PATIENCE = 60.0  # seconds that a condition may take to come true
SIZE = 1 << 18
NBYTES = 4 * SIZE
ONES = {"x": np.ones(SIZE, np.float32)}
ZEROS = {"x": np.zeros(SIZE, np.float32)}
TENSOR = tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[SIZE])


class Stub:
    """A stream as generated stubs open it."""

    def __init__(self, channel: grpc.Channel, set_id: str, client_id: str) -> None:
        self._requests: queue.SimpleQueue[step_pb2.StepRequest | None] = queue.SimpleQueue()
        step = optimizer_service_pb2_grpc.OptimizerServiceStub(channel).Step  # type: ignore[no-untyped-call]
        self.call = step(iter(self._requests.get, None))
        self.position = self.ask(open=step_pb2.Open(parameter_set_id=set_id, client_id=client_id)).opened.position

    def send(self, **fields: Any) -> None:
        self._requests.put(step_pb2.StepRequest(**fields))

    def ask(self, **fields: Any) -> step_pb2.StepResponse:
        """Send a message and wait for an answer."""
        self.send(**fields)
        answer: step_pb2.StepResponse = next(self.call)
        return answer

    def begin(self, sequence: int = 1) -> None:
        """Half of a push of ones."""
        push = step_pb2.Push(sequence=sequence, tensors=[step_pb2.PushedTensor(spec=TENSOR)])
        self.send(push=push, chunk=half(0))

    def finish(self) -> step_pb2.Receipt:
        """The other half, and what became of it."""
        return self.ask(chunk=half(1), commit=True).receipt

    def end(self) -> None:
        """Say that no more will come."""
        self._requests.put(None)


def half(number: int) -> tensor_pb2.Chunk:
    count = SIZE // 2
    segment = tensor_pb2.Segment(offset=number * count, count=count)
    return tensor_pb2.Chunk(segments=[segment], data=ONES["x"][:count].tobytes())


class Brake:
    """Holds back what a handle sends in the middle, until `release`."""

    def __init__(self) -> None:
        self.held = threading.Semaphore(0)
        self.release = threading.Event()

    def apply(self, handle: optserve.ParameterSet) -> None:
        """Hold back the handle's messages from now on, on this stream: half of each exchange's."""
        stream = handle._session._stream
        assert stream is not None
        send = stream.send
        stream.send = lambda frames: send(self._braked(frames))  # type: ignore[method-assign]

    def _braked(self, frames: Iterable[Any]) -> Iterator[Any]:
        frames = list(frames)
        yield from frames[: len(frames) // 2]
        self.held.release()
        self.release.wait()
        yield from frames[len(frames) // 2 :]


def resident(server: ServerProcess, what: str = "VmRSS") -> int:
    """A process's resident memory in bytes, now or (VmHWM) at most."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def serves(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="optserve.v1.OptimizerService")
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


def holds_at_last(gate: Gate, inside: int) -> bool:
    with gate._changed:
        return gate._changed.wait_for(lambda: gate._inside == inside, PATIENCE)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true while we wait for it."""
    patience = threading.Event()
    return any(condition() or patience.wait(0.01) for _ in range(int(PATIENCE / 0.01)))


# -- uploads that stall


def test_stalled_uploads_leave_the_rest_alone_and_cost_what_they_have_sent(tmp_path: Path) -> None:
    """64 workers stop half way: health and control answer, and memory stays within what is promised."""
    workers, chunks = 64, 2
    size = chunks * (2 * MIB // 4)
    gradient = {"x": np.ones(size, np.float32)}
    with (
        running("--listen", "127.0.0.1:0", log=tmp_path / "log") as server,
        optserve.Client(server.address, transport="stream") as client,
        ThreadPoolExecutor(workers) as pool,
    ):
        small = client.create_parameter_set("small", {"x": np.zeros(3, np.float32)}, optim.Adam())
        small.push({"x": np.ones(3, np.float32)})
        idle = resident(server)
        weights = client.create_parameter_set("a", {"x": np.zeros(size, np.float32)}, optim.Adam())
        handles, brake = [client.parameter_set("a") for _ in range(workers)], Brake()
        for handle in handles:
            handle.gradient_buffers()  # opens its stream
            brake.apply(handle)
        pushes = [pool.submit(handle.push, gradient) for handle in handles]
        for _ in pushes:
            assert brake.held.acquire(timeout=PATIENCE)
        assert serves(server.address)
        assert [each.id for each in client.list_parameter_sets()] == ["a", "small"]
        assert small.push({"x": np.ones(3, np.float32)}).version == 2
        promised = idle + weights.describe().state_bytes + 4 * size + int(workers * (1.3 * 4 * size + 4 * MIB))
        assert resident(server) <= promised
        brake.release.set()
        assert sorted(push.result().version for push in pushes) == list(range(1, workers + 1))
        assert resident(server, "VmHWM") <= promised


def test_uploads_beyond_the_bytes_in_flight_are_told_to_try_again_and_when(tmp_path: Path) -> None:
    """Eight begin where there is room for three; those three can finish, and then the others can."""
    with (
        running("--listen", "127.0.0.1:0", "--max-bytes-in-flight", str(3 * NBYTES), log=tmp_path / "log") as server,
        optserve.Client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        admitted = []
        for number in range(8):
            stub = Stub(channel, "a", f"worker-{number}")
            stub.begin()
            if number < 3:
                admitted.append(stub)
                continue
            with pytest.raises(grpc.RpcError) as caught:
                stub.finish()
            error: Any = caught.value
            metadata = dict(error.trailing_metadata())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert metadata["optserve-reason"] == "SERVER_BUSY"
            assert 0 < int(metadata["grpc-retry-pushback-ms"]) < 10_000
        assert [stub.finish().position.version for stub in admitted] == [1, 2, 3]
        for number in range(3, 8):
            stub = Stub(channel, "a", f"worker-{number}")
            stub.begin()
            assert stub.finish().position.version == number + 1
            stub.end()
        assert (weights.pull()["x"] == 8).all()


@pytest.fixture
def impatient() -> Iterator[Server]:
    """A server that waits half a second for an upload, and has room for one; its loops are compiled."""
    with optserve.Client(":memory:") as client:
        client.create_parameter_set("a", ZEROS, COUNTING).push(ONES)
    with Server(Config(listen="127.0.0.1:0", upload_timeout=0.5, max_bytes_in_flight=NBYTES)) as server:
        yield server


def test_an_upload_without_progress_is_ended_and_its_room_is_free_again(impatient: Server) -> None:
    """What it had sent is not applied, and the next push has its sequence."""
    with optserve.Client(impatient.address) as client, grpc.insecure_channel(impatient.address) as channel:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        stalled = Stub(channel, "a", "stalled")
        stalled.begin()
        with pytest.raises(grpc.RpcError) as caught:
            next(stalled.call)
        assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert holds_at_last(impatient._service.pushes, 0)
        again = Stub(channel, "a", "stalled")
        again.begin()
        receipt = again.finish()
        assert (receipt.sequence, receipt.position.version) == (1, 1)
        assert (weights.pull()["x"] == 1).all()
        again.end()


def test_a_worker_whose_upload_was_ended_sends_it_again(impatient: Server) -> None:
    with (
        optserve.Client(impatient.address, transport="stream") as client,
        optserve.Client(impatient.address, transport="stream") as other,
        ThreadPoolExecutor(1) as pool,
    ):
        large = {"x": np.ones(1 << 20, np.float32)}  # several messages
        weights = client.create_parameter_set("a", {"x": np.zeros(1 << 20, np.float32)}, COUNTING)
        weights.gradient_buffers()  # opens its stream
        brake = Brake()
        brake.apply(weights)
        pushing = pool.submit(weights.push, large)
        assert brake.held.acquire(timeout=PATIENCE)
        versions = {other.parameter_set("a").push(large).version, pushing.result().version}  # once there is room
        assert versions == {1, 2}
        brake.release.set()
        assert (weights.pull()["x"] == 2).all()


def test_an_upload_in_shared_memory_that_is_not_committed_is_ended(impatient: Server) -> None:
    """What lies there is dropped with it, and the handle goes on with its next push."""
    with optserve.Client(impatient.address, transport="shared_memory") as client:
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        weights.gradient_buffers()
        session = weights._session
        frames = list(session._requests(weights._outgoing(ONES, None, None, 1.0, 1.0), None, 1))
        frames[-1].message.commit = False
        assert session._stream is not None
        session._stream.send(frames)
        assert holds_at_last(impatient._service.pushes, NBYTES)
        assert holds_at_last(impatient._service.pushes, 0)
        assert weights.push(ONES).version == 1
        assert (weights.pull()["x"] == 1).all()


def test_a_creation_without_progress_is_ended_and_its_room_is_free_again(impatient: Server) -> None:
    go_on = threading.Event()
    request = optimizer_service_pb2.CreateParameterSetRequest
    spec = encode_spec(ParameterSetSpec("a", (TensorSpec.of("x", ONES["x"]),), COUNTING))

    def stalled(*begun: Any) -> Iterator[Any]:
        yield from begun
        go_on.wait()

    with optserve.Client(impatient.address) as client, grpc.insecure_channel(impatient.address) as channel:
        create = optimizer_service_pb2_grpc.OptimizerServiceStub(channel).CreateParameterSet  # type: ignore[no-untyped-call]
        for begun in ([], [request(spec=spec)], [request(spec=spec), request(chunk=half(0))]):
            error = create.future(stalled(*begun)).exception(timeout=PATIENCE)
            assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
            assert holds_at_last(impatient._service.pushes, 0)
            assert holds_at_last(impatient._service.streams, 0)
        assert client.list_parameter_sets() == []
        assert client.create_parameter_set("a", ZEROS, COUNTING).push(ONES).version == 1
        go_on.set()


def test_streams_that_rest_between_pushes_are_not_ended(impatient: Server) -> None:
    """While they rest another stream stalls and is ended, which takes longer than a rest would be allowed."""
    with (
        optserve.Client(impatient.address, transport="shared_memory") as client,
        grpc.insecure_channel(impatient.address) as channel,
    ):
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        resting, silent = Stub(channel, "a", "resting"), Stub(channel, "a", "silent")
        resting.begin()
        assert resting.finish().outcome == step_pb2.OUTCOME_APPLIED
        assert holds_at_last(impatient._service.pushes, 0)  # the stub does not try again
        held = weights.step(ONES, copy=False)
        for _ in range(2):
            stalled = Stub(channel, "a", "stalled")
            stalled.begin()
            with pytest.raises(grpc.RpcError):
                next(stalled.call)
            assert holds_at_last(impatient._service.pushes, 0)
        resting.begin(2)
        assert resting.finish().position.version == 3
        assert holds_at_last(impatient._service.pushes, 0)
        silent.begin()
        assert silent.finish().position.version == 4
        assert (held["x"] == 2).all()
        for stub in (resting, silent):
            stub.end()


def test_uploads_that_were_ended_leave_no_memory_behind(tmp_path: Path) -> None:
    """Workers send half of 8 MiB and vanish, one after the other: less is kept than half of what they sent."""
    size, workers = 2 * MIB, 16
    gradient = {"x": np.ones(size, np.float32)}
    with (
        running("--listen", "127.0.0.1:0", log=tmp_path / "log") as server,
        optserve.Client(server.address, transport="stream") as client,
    ):
        client.create_parameter_set("a", {"x": np.zeros(size, np.float32)}, COUNTING).push(gradient)

        def begin_and_vanish() -> None:
            with client.parameter_set("a") as handle, ThreadPoolExecutor(1) as pool:
                handle.gradient_buffers()
                brake = Brake()
                brake.apply(handle)
                pushing = pool.submit(handle.push, gradient)
                assert brake.held.acquire(timeout=PATIENCE)
                handle.close()
                brake.release.set()
                with pytest.raises(optserve.ClientClosed):
                    pushing.result()

        for _ in range(4):
            begin_and_vanish()
        before = resident(server)
        for _ in range(workers):
            begin_and_vanish()
        assert resident(server) <= before + workers * 4 * size // 4


# -- more work than there is room for


@pytest.mark.parametrize("transport", ["stream", "auto"])
def test_many_workers_get_through_a_narrow_gate(transport: str) -> None:
    """64 push at once where three fit: every push is applied, once, and no worker hears of it."""
    workers = 64
    config = Config(listen="127.0.0.1:0", max_bytes_in_flight=3 * NBYTES)
    with (
        Server(config) as server,
        optserve.Client(server.address, transport=transport) as client,
        ThreadPoolExecutor(workers) as pool,
    ):
        weights = client.create_parameter_set("a", ZEROS, COUNTING)
        handles = [client.parameter_set("a") for _ in range(workers)]
        together = threading.Barrier(workers)
        most: list[int] = []

        def work(handle: optserve.ParameterSet) -> optserve.Receipt:
            together.wait()
            receipt = handle.push(ONES)
            most.append(server._service.pushes._inside)
            return receipt

        receipts = list(pool.map(work, handles))
        assert sorted(receipt.version for receipt in receipts) == list(range(1, workers + 1))
        assert {receipt.sequence for receipt in receipts} == {1}
        assert max(most) <= 3 * NBYTES
        assert (weights.pull()["x"] == workers).all()


def test_a_step_that_is_applied_while_the_server_drains_is_not_applied_again(tmp_path: Path) -> None:
    """Its pull needs a copy, for which a draining server has no room; another push keeps the server from stopping."""
    size = 1 << 20
    large = {"x": np.ones(size, np.float32)}
    server, brakes = Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)).start(), [Brake(), Brake()]
    with optserve.Client(server.address, transport="stream") as client, ThreadPoolExecutor(3) as pool:
        client.create_parameter_set("a", {"x": np.zeros(size, np.float32)}, COUNTING)
        handles = [client.parameter_set("a", pull_format=BFloat16()) for _ in brakes]
        for handle, brake in zip(handles, brakes, strict=True):
            handle.gradient_buffers()  # opens its stream
            brake.apply(handle)
        first, second = (pool.submit(handle.step, large) for handle in handles)
        gate = server._service.pushes
        assert holds_at_last(gate, 8 * size)
        stopping = pool.submit(server.stop)
        with gate._changed:
            assert gate._changed.wait_for(lambda: gate._closed, PATIENCE)
        stream = handles[0]._session._stream
        brakes[0].release.set()
        assert eventually(lambda: handles[0]._session._stream is not stream)
        brakes[1].release.set()
        stopping.result()
        with Server(Config(listen=server.address, data_dir=tmp_path)):
            receipts = [first.result().receipt, second.result().receipt]
            assert {receipt.version for receipt in receipts if receipt is not None} == {1, 2}
            assert (client.parameter_set("a").pull()["x"] == 2).all()


# -- readers that do not read


@pytest.mark.parametrize("shared", [False, True], ids=["on other connections", "on the same connection"])
def test_readers_that_stop_reading_hold_nobody_up(shared: bool) -> None:
    """Four ask for 20 MB each, at different versions, and leave it there; the others step and pull all the same."""
    size = 5 << 20
    ones = {"x": np.ones(size, np.float32)}
    with (
        Server(Config(listen="127.0.0.1:0")) as server,
        optserve.Client(server.address, transport="stream") as streaming,
        optserve.Client(server.address, transport="shared_memory") as sharing,
        contextlib.ExitStack() as channels,
    ):
        weights = streaming.create_parameter_set("a", {"x": np.zeros(size, np.float32)}, COUNTING)
        others = [weights, streaming.parameter_set("a"), sharing.parameter_set("a")]
        parameter_set = server._engine.get("a")
        common: Any = streaming._transport
        version = 0
        for number in range(4):
            options = [("reader", number)]  # so that gRPC does not share the connection
            channel = (
                common._channel
                if shared
                else channels.enter_context(grpc.insecure_channel(server.address, options=options))
            )
            idle = Stub(channel, "a", f"idle-{number}")
            idle.send(pull=step_pb2.Pull())
            assert eventually(lambda: pinned(parameter_set) > 0 or server._service.pushes._inside > 0)
            for other in others:
                version += 1
                params = other.step(ones, copy=False)
                assert params.version == version
                assert (params["x"] == version).all()
        assert weights.pull().version == version
        assert len(parameter_set.memories) <= MOST_BUFFERS


def pinned(parameter_set: Any) -> int:
    buffers = parameter_set._buffers
    return sum(buffer.pins for buffer in (buffers.current, *buffers._others))


# -- for ever


def test_memory_does_not_grow_over_ten_thousand_steps(tmp_path: Path) -> None:
    """Small steps of four workers, refusals among them."""
    start, workers = {"x": np.zeros(100, np.float32), "y": np.zeros(())}, 4
    with (
        running("--listen", "127.0.0.1:0", log=tmp_path / "log") as server,
        optserve.Client(server.address) as client,
        ThreadPoolExecutor(workers) as pool,
    ):
        weights = client.create_parameter_set("a", start, optim.Adam())
        handles = [client.parameter_set("a") for _ in range(workers)]

        def work(handle: optserve.ParameterSet, steps: int) -> None:
            good = {name: np.ones_like(array) for name, array in start.items()}
            for number in range(steps):
                if number % 50 == 49:
                    with pytest.raises(optserve.NonFiniteValue):
                        handle.step(good | {"y": np.array(np.nan)})
                handle.step(good)

        list(pool.map(work, handles, [2_000 // workers] * workers))
        before = resident(server)
        list(pool.map(work, handles, [10_000 // workers] * workers))
        assert weights.describe().version == 12_000
        assert resident(server) <= before + 4 * MIB
        assert server.stop(signal.SIGTERM) == 0
