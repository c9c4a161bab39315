"""A TCP proxy that loses what it is told to lose."""

import contextlib
import functools
import socket
import threading
from collections.abc import Callable
from typing import Self


class Proxy:
    """Forwards connections to a server at `host:port`.

    `swallow_answers()` drops what the server sends from now on; `cut()` breaks every connection and forwards again.
    `hold_answers()` keeps what the server sends until `release_answers()`; `carried` counts bytes, both ways together.
    `limit` asks, for each new connection, how many bytes it may carry before it breaks; `answers`, how many messages of the
    server's it may carry: the next one is dropped, which is counted in `dropped`, and the connection breaks. New connections
    go to `target`.
    """

    def __init__(
        self, target: str, limit: Callable[[], int] | None = None, answers: Callable[[], int] | None = None
    ) -> None:
        self.target = target
        self._limit = limit
        self._answers = answers
        self._swallowing = False
        self._released = threading.Event()
        self._released.set()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [self._start(self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.carried = 0
        self.dropped = 0

    def swallow_answers(self) -> None:
        """Drop every byte from the server until `cut`."""
        self._swallowing = True

    def hold_answers(self) -> None:
        """Keep what comes from the server, until `release_answers` or `cut`."""
        self._released.clear()

    def release_answers(self) -> None:
        """Send on what was held."""
        self._released.set()

    def cut(self) -> None:
        """Break all connections; new ones work."""
        self._swallowing = False
        self._released.set()
        with self._lock:
            for each in self._sockets:
                _break(each)

    def close(self) -> None:
        """Break all connections and refuse new ones."""
        _break(self._listener)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                host, _, port = self.target.rpartition(":")
                server = socket.create_connection((host, int(port)))
            except OSError:  # the server is not there now, as after a restart
                client.close()
                continue
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # else small messages wait for 40 ms
            self.connections += 1
            budget = Budget(self._limit() if self._limit else None)
            messages = Messages(self._answers()) if self._answers else None
            with self._lock:
                self._sockets |= {client, server}
            self._threads.append(self._start(functools.partial(self._pump, client, server, budget)))
            self._threads.append(self._start(functools.partial(self._pump_answers, server, client, budget, messages)))

    def _pump(self, source: socket.socket, sink: socket.socket, budget: "Budget") -> None:
        try:
            while (data := source.recv(1 << 16)) and (data := budget.take(data)):
                self._count(data)
                sink.sendall(data)
        except OSError:
            pass
        self._end(source, sink)

    def _pump_answers(
        self, source: socket.socket, sink: socket.socket, budget: "Budget", messages: "Messages | None"
    ) -> None:
        try:
            while (data := source.recv(1 << 16)) and (data := budget.take(data)):
                if messages is not None:
                    data = messages.take(data)
                    if messages.exhausted:
                        self.dropped += 1
                        break
                self._released.wait()
                self._count(data)
                if not self._swallowing:
                    sink.sendall(data)
        except OSError:
            pass
        self._end(source, sink)

    def _count(self, data: bytes) -> None:
        with self._lock:
            self.carried += len(data)

    def _end(self, source: socket.socket, sink: socket.socket) -> None:
        _break(source)
        _break(sink)
        with self._lock:
            if source in self._sockets:
                self._sockets.discard(source)
                source.close()


class Budget:
    """How many bytes a connection may still carry, both ways together; None is without end."""

    def __init__(self, size: int | None) -> None:
        self._left = size
        self._lock = threading.Lock()

    def take(self, data: bytes) -> bytes:
        """As much of the data as may still pass."""
        if self._left is None:
            return data
        with self._lock:
            passed = data[: self._left]
            self._left -= len(passed)
            return passed


class Messages:
    """How many small gRPC messages a connection may still bring from the server: each is a DATA frame of HTTP/2.

    Reference: RFC 9113, section 4.1 (frames: a length of 3 bytes, a type, 5 more bytes, a payload of that length).
    """

    HEADER, DATA = 9, 0

    def __init__(self, count: int) -> None:
        self._left = count
        self._pending = b""
        self.exhausted = False

    def take(self, data: bytes) -> bytes:
        """The whole frames that may pass now; `exhausted` once one of them would be a message too many."""
        self._pending += data
        end = 0
        while (begin := end + self.HEADER) <= len(self._pending):
            size = int.from_bytes(self._pending[end : end + 3])
            if begin + size > len(self._pending):
                break
            if self._pending[end + 3] == self.DATA:
                self.exhausted |= self._left == 0
                self._left -= 1
            end = begin + size
        passed, self._pending = self._pending[:end], self._pending[end:]
        return passed


def _break(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def limited(connection: socket.socket, limit: int) -> socket.socket:
    """The near end of a connection that carries `limit` bytes, both ways together, before it breaks."""
    near, far = socket.socketpair()
    left = [limit]
    lock = threading.Lock()

    def forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                with lock:
                    allowed = data[: left[0]]
                    left[0] -= len(allowed)
                target.sendall(allowed)
                if not left[0]:
                    break
        for each in (source, target):
            _break(each)

    threads = [
        threading.Thread(target=forward, args=ends, daemon=True) for ends in ((far, connection), (connection, far))
    ]
    for thread in threads:
        thread.start()
    threading.Thread(target=_close_after, args=(threads, far, connection), daemon=True).start()
    return near


def _close_after(threads: list[threading.Thread], *sockets: socket.socket) -> None:
    for thread in threads:
        thread.join()
    for each in sockets:
        each.close()
