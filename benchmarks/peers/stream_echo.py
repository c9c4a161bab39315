"""A gRPC Python stream that sends back each message as it comes: raw bytes, and no work.

A payload is one message each way; a large one is many, and the first are on their way back before the last are sent.
"""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc

from benchmarks.peers.gradient import gradient
from benchmarks.peers.process import spawned

METHOD = "/peer.Echo/Echo"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", 4 << 20),
]
LARGEST_MESSAGE = 10_000_000  # bytes: above, one message is not how anyone would send them
CHUNK = 2 << 20


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Send all messages on a stream that stays open, and receive as many."""
    payload = gradient(size).data.cast("B")
    length = len(payload) if len(payload) <= LARGEST_MESSAGE else CHUNK
    messages = [payload[begin : begin + length] for begin in range(0, len(payload), length)]
    requests: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
    with spawned(serve) as server, grpc.insecure_channel(server.recv(), OPTIONS) as channel:
        # the bytes are made when gRPC's own thread asks for the next message
        answers: Iterator[bytes] = channel.stream_stream(METHOD, request_serializer=bytes)(iter(requests.get, None))

        def step() -> list[bytes]:
            for message in messages:
                requests.put(message)
            return [next(answers) for _ in messages]

        yield step
        requests.put(None)


def serve(parent: Connection) -> None:
    """Serve until the parent is gone."""
    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    parent.send(f"127.0.0.1:{port}")
    parent.poll(None)


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Send back what comes."""
    return requests
