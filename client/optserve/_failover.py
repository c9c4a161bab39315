"""Several addresses of one service: calls go to the server that serves, which another may take over from."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from optserve._errors import InvalidName, ServerUnavailable
from optserve._retry import retried
from optserve._transport import Stream, Transport, connect, connect_to
from optserve._wire import Frame
from optserve.v1.step_pb2 import StepRequest, StepResponse

PROBE_SECONDS = 2.0  # for one server to say whether it serves


def connect_all(address: str | Sequence[str]) -> tuple[Transport, str]:
    """The transport for one address or several, in a sequence or with commas between; and these as one string.

    Raises InvalidName.
    """
    addresses = [each.strip() for each in address.split(",")] if isinstance(address, str) else list(address)
    if not addresses:
        raise InvalidName("expected at least one address; got none")
    single = len(addresses) == 1
    return connect(addresses[0]) if single else Failover([connect_to(each) for each in addresses]), ",".join(addresses)


class Server(Transport, Protocol):
    """A transport to one server, which can be asked whether that serves."""

    def serving(self, timeout: float) -> bool: ...


class Failover:
    """Calls to one of several servers, at first the first. After one that says ServerUnavailable, calls go to the next.

    Nothing is tried again here: that is for who calls, inside one deadline.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._current = 0
        self._lock = threading.Lock()

    def call(self, method: str, request: Any, timeout: float, *, wait: bool = False) -> Any:
        deadline = time.monotonic() + timeout
        if wait:
            retried(self._find, timeout)
        server, failed = self._chosen()
        try:
            return server.call(method, request, max(0.0, deadline - time.monotonic()), wait=wait)
        except ServerUnavailable:
            failed()
            raise

    def download(self, method: str, request: Any, timeout: float) -> Iterator[Frame[Any]]:
        server, failed = self._chosen()
        try:
            yield from server.download(method, request, timeout)
        except ServerUnavailable:
            failed()
            raise

    def open(self) -> "FailoverStream":
        server, failed = self._chosen()
        return FailoverStream(server.open(), failed)

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def _chosen(self) -> tuple[Server, Callable[[], None]]:
        """The server to call, and what to call if that fails: others may have found out before."""
        chosen = self._current

        def failed() -> None:
            with self._lock:
                if self._current == chosen:
                    self._current = (chosen + 1) % len(self._servers)

        return self._servers[chosen], failed

    def _find(self, timeout: float) -> None:
        """Let the next call go to a server that serves, since it is sent once; raises ServerUnavailable if none does."""
        for _ in self._servers:
            server, failed = self._chosen()
            if server.serving(min(timeout, PROBE_SECONDS)):
                return
            failed()
        raise ServerUnavailable(f"none of {len(self._servers)} servers serves")


class FailoverStream:
    """A stream to one of several servers, which tells if that is not available."""

    def __init__(self, stream: Stream, failed: Callable[[], None]) -> None:
        self._stream = stream
        self._failed = failed

    def send(self, frames: Iterable[Frame[StepRequest]]) -> None:
        self._stream.send(frames)

    def receive(self, deadline: float) -> Frame[StepResponse]:
        try:
            return self._stream.receive(deadline)
        except ServerUnavailable:
            self._failed()
            raise

    def close(self) -> None:
        self._stream.close()
