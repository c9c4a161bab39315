"""How calls reach an engine: over gRPC, or into one inside this process. Nothing above this module knows which."""

import contextlib
import queue
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc
from google.protobuf.message import Message

from optserve._errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidName,
    OptserveError,
    ServerError,
    ServerUnavailable,
    error_from,
)
from optserve._process import Owner
from optserve._wire import LARGEST_MESSAGE, Frame
from optserve.v1 import optimizer_service_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse

if TYPE_CHECKING:
    from optserve_server.service import OptimizerService

SERVICE = optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"]
Outgoing = queue.SimpleQueue[Iterable[Frame[StepRequest]] | None]

FOLLOW = "Follow"  # between servers only

REASON_KEY = "optserve-reason"  # trailing metadata: the stable name of an error
MEMORY = ":memory:"
SERVING = b"\x08\x01"  # a grpc.health.v1.HealthCheckResponse whose status is 1
_ADDRESS = re.compile(r"unix:.+|(dns:(///)?)?([\w.-]+|\[[0-9a-fA-F:.%\w]+\]):(?P<port>\d{1,5})")

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.http2.max_frame_size", 4 << 20),  # a chunk is one frame; measured, see docs/architecture.md
    ("grpc.keepalive_time_ms", 30_000),  # notice a peer that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
]


class Stream(Protocol):
    """An open Step stream."""

    def send(self, frames: Iterable[Frame[StepRequest]]) -> None:
        """Send frames in order; they may be made lazily, so what they refer to must last until the answer is there."""

    def receive(self, deadline: float) -> Frame[StepResponse]:
        """The next answer; raises DeadlineExceeded at `deadline` (monotonic seconds), or what the server says."""

    def close(self) -> None:
        """End the stream; a `receive` that waits ends with an error."""


class Transport(Protocol):
    """A way to call the service's methods by name."""

    def call(self, method: str, request: Any, timeout: float, *, wait: bool = False) -> Any:
        """Call a unary method, or one that takes a stream if `request` is an iterator of frames.

        With `wait`, a server that can't be reached is waited for: so a call that must not be repeated is sent once.
        """

    def download(self, method: str, request: Any, timeout: float) -> Iterator[Frame[Any]]:
        """Call a method that answers with a stream of frames."""

    def open(self) -> Stream:
        """Open a Step stream."""

    def close(self) -> None:
        """End every stream and call."""


def connect(address: str) -> "Transport":
    """The transport for an address: `host:port`, `unix:/path`, or `:memory:`; raises InvalidName."""
    return MemoryTransport() if address == MEMORY else connect_to(address)


def connect_to(address: str) -> "GrpcTransport":
    """The transport to a server at `host:port` or `unix:/path`; raises InvalidName."""
    matched = _ADDRESS.fullmatch(address)
    if matched is None or int(matched["port"] or 0) > 65535:
        raise InvalidName(f"expected an address such as 'localhost:50051', 'unix:/path' or ':memory:'; got {address!r}")
    return GrpcTransport(address)


def typed(error: grpc.RpcError, address: str) -> OptserveError:
    """The typed error that a failed call stands for."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.CANCELLED:  # we translate our own cancellations before they get here
        return ServerUnavailable(f"{address} ended the call: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"no server answered at {address} in time")
    reason = dict(cast("Iterable[tuple[str, str]]", error.trailing_metadata() or ())).get(REASON_KEY)
    if code is grpc.StatusCode.UNAVAILABLE and reason is None:
        return ServerUnavailable(f"{address}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and reason is None:  # not ours: no promise that nothing was taken in
        return ServerError(f"{address}: {details}")
    return error_from(code.name, reason, details)


class GrpcTransport:
    """Calls over one gRPC channel."""

    def __init__(self, address: str) -> None:
        self._owner = Owner()
        self._address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._deadlines = Deadlines()
        self._methods = {method.name: self._bind(method) for method in SERVICE.methods if method.name != FOLLOW}
        self._health: Callable[..., Any] = self._channel.unary_unary("/grpc.health.v1.Health/Check")

    def call(self, method: str, request: Any, timeout: float, *, wait: bool = False) -> Any:
        self._owner.check()
        try:
            return self._methods[method](request, timeout=timeout, wait_for_ready=wait)
        except grpc.RpcError as error:
            raise typed(error, self._address) from None
        except ValueError as error:
            raise self._closed(error) from None

    def serving(self, timeout: float) -> bool:
        """Whether the server says, by gRPC's health protocol, that it serves."""
        self._owner.check()
        try:
            return self._health(b"", timeout=timeout) == SERVING  # type: ignore[no-any-return]
        except grpc.RpcError:
            return False
        except ValueError as error:
            raise self._closed(error) from None

    def download(self, method: str, request: Any, timeout: float) -> Iterator[Frame[Any]]:
        self._owner.check()
        try:
            yield from self._methods[method](request, timeout=timeout)
        except grpc.RpcError as error:
            raise typed(error, self._address) from None
        except ValueError as error:
            raise self._closed(error) from None

    def open(self) -> "GrpcStream":
        self._owner.check()
        try:
            return GrpcStream(self._methods["Step"], self._deadlines, self._address)
        except ValueError as error:
            raise self._closed(error) from None

    def close(self) -> None:
        if self._owner.here:
            self._deadlines.close()
            self._channel.close()

    def _closed(self, error: ValueError) -> Exception:
        """gRPC says by a ValueError's text alone that the channel is closed."""
        return ClientClosed("this client was closed") if "closed" in str(error).lower() else error

    def _bind(self, method: Any) -> Callable[..., Any]:
        path = f"/{SERVICE.full_name}/{method.name}"
        response: Any = getattr(optimizer_service_pb2, method.output_type.name, None)
        if method.name == "Step":
            return self._channel.stream_stream(path, Frame.to_bytes, lambda data: Frame.from_bytes(StepResponse, data))
        if method.server_streaming:
            return self._channel.unary_stream(path, serialize, lambda data: Frame.from_bytes(response, data))
        if method.client_streaming:
            return self._channel.stream_unary(path, Frame.to_bytes, response.FromString)
        return self._channel.unary_unary(path, serialize, response.FromString)


class GrpcStream:
    """A Step stream over gRPC. gRPC's sending thread makes and sends one frame after the other."""

    def __init__(self, step: Callable[..., Any], deadlines: "Deadlines", address: str) -> None:
        self._outgoing: Outgoing = queue.SimpleQueue()
        self._deadlines = deadlines
        self._address = address
        self._failures: list[Exception] = []
        self._call = step(_requests(self._outgoing, self._failures))
        # gRPC's thread waits on the queue for ever; it must not keep a stream alive that nobody holds.
        self._end = weakref.finalize(self, _end, Owner(), self._outgoing, self._call)

    def send(self, frames: Iterable[Frame[StepRequest]]) -> None:
        self._outgoing.put(frames)

    def receive(self, deadline: float) -> Frame[StepResponse]:
        expired = self._deadlines.arm(self._call, deadline)
        try:
            return next(self._call)
        except StopIteration:
            raise ServerUnavailable(f"{self._address} ended the stream") from None
        except grpc.RpcError as error:
            if self._failures:
                raise self._failures[0] from None
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"no server answered at {self._address} in time") from None
            raise typed(error, self._address) from None
        finally:
            expired()

    def close(self) -> None:
        self._end()


def _requests(outgoing: "Outgoing", failures: list[Exception]) -> Iterator[Frame[StepRequest]]:
    try:
        while (frames := outgoing.get()) is not None:
            yield from frames
    except Exception as error:  # gRPC would only say that iterating failed
        failures.append(error)
        raise


def _end(owner: Owner, outgoing: "Outgoing", call: grpc.Call) -> None:
    if owner.here:
        outgoing.put(None)
        call.cancel()


class Deadlines:
    """Cancels calls that are overdue: streams live long, so that each wait on one needs a deadline of its own."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._armed: dict[int, tuple[float, grpc.Call]] = {}
        self._next_wake = float("inf")
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, call: grpc.Call, deadline: float) -> Callable[[], None]:
        """Cancel the call at the deadline, in monotonic seconds, unless the returned function is called before."""
        key = id(call)
        with self._condition:
            self._armed[key] = (deadline, call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="optserve-deadlines", daemon=True)
                self._thread.start()
            if deadline < self._next_wake:
                self._condition.notify()
        return lambda: self._disarm(key)

    def close(self) -> None:
        """End the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _disarm(self, key: int) -> None:
        with self._condition:
            self._armed.pop(key, None)

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                overdue = [key for key, (deadline, _) in self._armed.items() if deadline <= now]
                for key in overdue:
                    self._armed.pop(key)[1].cancel()
                self._next_wake = min((deadline for deadline, _ in self._armed.values()), default=float("inf"))
                self._condition.wait(None if self._next_wake == float("inf") else self._next_wake - now)


class MemoryTransport:
    """The same service, called directly; needs the extra `server`."""

    def __init__(self) -> None:
        try:
            from optserve_server.engine.engine import Engine
            from optserve_server.service import OptimizerService
        except ImportError as error:
            raise ServerUnavailable(
                f"':memory:' runs the engine in this process, which needs optserve[server]: {error}"
            ) from error
        self._owner = Owner()
        self._engine = Engine()
        self._service: OptimizerService | None = OptimizerService(self._engine)

    def call(self, method: str, request: Any, timeout: float, *, wait: bool = False) -> Any:
        return self._open_service().call(method, request)

    def download(self, method: str, request: Any, timeout: float) -> Iterator[Frame[Any]]:
        yield from self._open_service().call(method, request)

    def open(self) -> "MemoryStream":
        return MemoryStream(self._open_service())

    def close(self) -> None:
        if self._service is not None and self._owner.here:
            self._service = None
            self._engine.close()

    def _open_service(self) -> "OptimizerService":
        self._owner.check()
        if self._service is None:
            raise ClientClosed("this client was closed, and its engine with it")
        return self._service


class MemoryStream:
    """A Step stream on a thread of its own, so that interrupting the caller can't stop the service half way."""

    def __init__(self, service: "OptimizerService") -> None:
        self._outgoing: deque[Iterator[Frame[StepRequest]]] = deque()
        self._answers = service.step(self._requests())
        self._thread = ThreadPoolExecutor(1, "optserve-memory")

    def send(self, frames: Iterable[Frame[StepRequest]]) -> None:
        self._outgoing.append(iter(frames))

    def receive(self, deadline: float) -> Frame[StepResponse]:
        try:
            return self._thread.submit(next, self._answers).result()
        except RuntimeError as error:
            raise ClientClosed("this stream was closed") from error

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._answers.close)
        self._thread.shutdown(wait=False)

    def _requests(self) -> Iterator[Frame[StepRequest]]:
        while self._outgoing:
            yield from self._outgoing.popleft()


def serialize(message: Message) -> bytes:
    """A message's bytes, whatever its type."""
    return message.SerializeToString()
