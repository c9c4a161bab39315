"""The server: an engine behind gRPC, with health and reflection."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Self

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from optserve._errors import InvalidArgument
from optserve._transport import SERVICE, serialize
from optserve._wire import LARGEST_MESSAGE, Frame
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.standby_pb2 import FollowRequest, FollowResponse
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve_server.config import Config
from optserve_server.engine.buffers import private
from optserve_server.engine.engine import Engine
from optserve_server.engine.history import Log
from optserve_server.engine.rules import own
from optserve_server.interceptor import ErrorInterceptor
from optserve_server.pair import Pair
from optserve_server.replication.follower import Follower
from optserve_server.service import OptimizerService
from optserve_server.shared_memory import SharedMemory, shareable
from optserve_server.stalls import Stalls
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.keeper import Keeper
from optserve_server.storage.schedule import Schedule

log = structlog.get_logger()

CONTROL_THREADS = 16  # beyond one for each stream, so that health and control never wait behind streams

OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # a second server on one port is an error, not a coin toss
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),  # chunks; never a whole tensor
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.http2.max_frame_size", 4 << 20),  # a chunk is one frame
    ("grpc.keepalive_permit_without_calls", 1),  # workers ping every 30 s, also between steps
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 60_000),  # find workers that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
]


class Server:
    """A running server: `with Server(Config(listen="127.0.0.1:0")) as server: ... server.address`.

    Raises InvalidRule for a file of rules that can't be used, ValueError for a data directory that can't, OSError if it can't
    listen there.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        for path in config.rules:
            own.load(path)
        with ExitStack() as acquired:  # given back if this server can't be built
            self._shared_memory = _shared_memory(config.max_shared_memory)
            if self._shared_memory is not None:
                acquired.callback(self._shared_memory.close)
            allocate = private if self._shared_memory is None else shareable
            self._engine = Engine(config.threads, allocate, config.lease)
            acquired.callback(self._engine.close)
            self._stalls = Stalls(config.upload_timeout)
            acquired.callback(self._stalls.close)
            self._storage: DataDirectory | None = None
            if config.data_dir is not None:
                self._storage = DataDirectory(
                    config.data_dir, config.retention, config.checkpoint_store, self._acknowledged
                )
                acquired.callback(self._storage.close)
            self._pair = Pair(config, self._engine, self._storage, self._tell_health)
            acquired.callback(self._pair.close)
            self._service = OptimizerService(
                self._engine,
                self._storage,
                max_streams=config.max_streams,
                max_bytes_in_flight=config.max_bytes_in_flight,
                shared_memory=self._shared_memory,
                pair=self._pair,
            )
            self._health = health.HealthServicer()
            self._grpc = self._build()
            acquired.callback(self._grpc.stop, None)
            self.address = self._bind(config.listen)
            self._pair.stand(self.address, self._serve)
            self._acquired = acquired.pop_all()
        self._stopping = threading.Lock()
        self._failed = False

    def start(self) -> Self:
        """Restore what the data directory has, saying so to who asks, then serve; a standby follows, from nothing."""
        try:
            if self._pair.follower is not None:
                self._follow(self._pair.follower)
            else:
                self._service.status = pb.GetServerStatusResponse(phase=pb.PHASE_RESTORING)
                self._grpc.start()
                self._restore()
                self._serve()
        except BaseException:
            self._acquired.close()
            raise
        if not self.config.is_local:
            log.warning("anyone who reaches this address can use it: there is no authentication", address=self.address)
        return self

    def stop(self, grace: float | None = None) -> None:
        """Drain and stop: refuse new work, give pushes in flight up to `grace` seconds, then end every call.

        The state is then written to the data directory. Stopping again does nothing.
        """
        if not self._stopping.acquire(blocking=False):
            return
        grace = self.config.grace if grace is None else grace
        with self._acquired:
            self._pair.close()
            self._health.enter_graceful_shutdown()
            self._service.status = pb.GetServerStatusResponse(phase=pb.PHASE_DRAINING)
            self._service.streams.close()
            self._service.pushes.close()
            self._engine.drain()
            drained = self._service.pushes.drain(grace)
            self._grpc.stop(None).wait()
            self._service.checkpoint_all()
        log.info("stopped", address=self.address, drained=drained)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _acknowledged(self, keeper: Keeper, own: Log) -> Log:
        """The log of a set that says nothing which the other server may say otherwise."""
        assert self._pair.primary is not None
        return self._pair.primary.log(keeper, own)

    def _serve(self) -> None:
        self._service.status = pb.GetServerStatusResponse(phase=pb.PHASE_SERVING)
        self._tell_health()
        log.info("serving", address=self.address)

    def _follow(self, follower: Follower) -> None:
        self._service.status = pb.GetServerStatusResponse(phase=pb.PHASE_STANDBY, primary=self.config.follow)
        self._grpc.start()
        self._keep()
        follower.start()
        log.info("following", primary=self.config.follow, address=self.address)

    def _build(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(self.config.max_streams + CONTROL_THREADS, "optserve-call"),
            interceptors=[ErrorInterceptor()],
            options=OPTIONS,
        )
        server.add_generic_rpc_handlers((_handlers(self._service, self._stalls),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _restore(self) -> None:
        if self._storage is None:
            return
        restoring = pb.PHASE_RESTORING

        def note(read: int, total: int) -> None:
            self._service.status = pb.GetServerStatusResponse(phase=restoring, bytes_read=read, bytes_total=total)

        self._storage.restore(self._engine, note)
        self._keep()

    def _keep(self) -> None:
        """Write checkpoints from now on."""
        if self._storage is None:
            return
        schedule = Schedule(self._storage, self.config.checkpoint_interval, self._fail)
        self._acquired.callback(schedule.close)
        self._service.schedule = schedule

    def _fail(self) -> None:
        """Tell who watches over servers that this one needs a restart."""
        self._failed = True
        self._tell_health()

    def _tell_health(self) -> None:
        primary = self._pair.primary
        serves = self._service.status.phase == pb.PHASE_SERVING and not self._failed
        serves = serves and not (primary is not None and primary.deposed)
        status = health_pb2.HealthCheckResponse
        self._set_health(status.SERVING if serves else status.NOT_SERVING)

    def _bind(self, listen: str) -> str:
        try:
            port = self._grpc.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"can't listen on {listen!r}; is another server there? ({error})") from error
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE.full_name):
            self._health.set(name, status)


def _shared_memory(max_bytes: int) -> SharedMemory | None:
    """Shared memory, if it is wanted and can be had: workers do without."""
    try:
        return SharedMemory(max_bytes) if max_bytes and hasattr(os, "memfd_create") else None
    except OSError as error:  # a temporary directory whose path is too long for a socket, for one
        log.warning("no shared memory", reason=str(error))
        return None


def _handlers(service: OptimizerService, stalls: Stalls) -> grpc.GenericRpcHandler:
    """A gRPC handler for every method of the contract. Messages with chunks are parsed by `Frame`, not by gRPC, so that
    ill-formed bytes are refused like any other bad input."""
    return grpc.method_handlers_generic_handler(
        SERVICE.full_name, {method.name: _handler(service, stalls, method) for method in SERVICE.methods}
    )


def _handler(service: OptimizerService, stalls: Stalls, method: Any) -> Any:
    name = method.name

    def step(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Frame[StepResponse]]:
        with stalls.watch(context) as watch:
            yield from service.step(_frames(StepRequest, requests), watch)

    def upload(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        with stalls.watch(context) as watch:
            return service.call(name, watch.over(_frames(pb.CreateParameterSetRequest, requests)))

    def download(request: bytes, context: grpc.ServicerContext) -> Iterator[Frame[Any]]:
        with stalls.watch(context) as watch:
            yield from watch.taken(service.call(name, _parsed(kind, request)))

    def follow(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[FollowResponse]:
        yield from service.follow(_parsed(FollowRequest, request) for request in requests)

    kind = getattr(pb, method.input_type.name, None)
    if name == "Follow":
        return grpc.stream_stream_rpc_method_handler(follow, None, serialize)
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(step, None, Frame.to_bytes)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(upload, None, serialize)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(download, None, Frame.to_bytes)
    return grpc.unary_unary_rpc_method_handler(
        lambda request, context: service.call(name, _parsed(kind, request)), None, serialize
    )


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(
            f"expected a serialized {kind.DESCRIPTOR.full_name}; got {len(data)} other bytes"
        ) from error


def _frames(kind: Any, requests: Iterator[bytes]) -> Iterator[Frame[Any]]:
    return (Frame.from_bytes(kind, data) for data in requests)
