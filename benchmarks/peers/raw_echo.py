"""A TCP socket that sends back what it gets: the same bytes both ways, and no work at all."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from benchmarks.peers.gradient import gradient
from benchmarks.peers.process import spawned


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Send all bytes, then receive as many."""
    there = gradient(size).data.cast("B")
    back = memoryview(bytearray(len(there)))
    with spawned(serve, len(there)) as server, socket.create_connection(server.recv()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def step() -> memoryview:
            connection.sendall(there)
            receive(connection, back)
            return back

        yield step


def serve(parent: Connection, size: int) -> None:
    """Receive `size` bytes, send them back, again and again."""
    buffer = memoryview(bytearray(size))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        parent.send(listener.getsockname())
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while receive(connection, buffer):
                connection.sendall(buffer)


def receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill a buffer; False if the other side is gone."""
    received = 0
    while received < len(buffer):
        count = connection.recv_into(buffer[received:])
        if not count:
            return False
        received += count
    return True
