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
    `limit` asks, for each new connection, how many bytes it may carry before it breaks.
    """

    def __init__(self, target: str, limit: Callable[[], int] | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._limit = limit
        self._swallowing = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [self._start(self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def swallow_answers(self) -> None:
        """Drop every byte from the server until `cut`."""
        self._swallowing = True

    def cut(self) -> None:
        """Break all connections; new ones work."""
        self._swallowing = False
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
                server = socket.create_connection(self._target)
            except OSError:  # the server is not there now, as after a restart
                client.close()
                continue
            self.connections += 1
            budget = Budget(self._limit() if self._limit else None)
            with self._lock:
                self._sockets |= {client, server}
            for source, sink, answers in ((client, server, False), (server, client, True)):
                pump = functools.partial(self._pump, source, sink, answers, budget)
                self._threads.append(self._start(pump))

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool, budget: "Budget") -> None:
        try:
            while data := source.recv(1 << 16):
                data = budget.take(data)
                if not data:
                    break
                if not (answers and self._swallowing):
                    sink.sendall(data)
        except OSError:
            pass
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
