"""The local channel: a Step stream over a Unix socket, for workers on the server's host.

It takes over from a gRPC stream that stays open beside it, and carries the same messages: each is its length, 4 bytes
little-endian, one byte that says what it is, and its bytes. A round trip takes a tenth of gRPC's time.
"""

import contextlib
import socket
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

from optserve._errors import (
    DeadlineExceeded,
    InvalidChunk,
    OptserveError,
    Refusal,
    ServerUnavailable,
)
from optserve._messages import decode_refusal, encode_refusal
from optserve._process import Owner
from optserve._shared_memory import connected
from optserve._transport import Stream
from optserve._wire import LARGEST_MESSAGE, Frame
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse

CHANNEL = 2**64 - 1  # asked for in place of a segment's number
MESSAGE, ERROR = 0, 1  # an error is a serialized Refusal, and the last that comes
HEADER_BYTES = 5
BUFFER_BYTES = 64 << 10


class LocalChannel:
    """A Step stream; raises NoSharedMemory if the server can't be reached so, ServerUnavailable if it has ended it or died."""

    def __init__(self, offer: step_pb2.SharedMemory, beside: Stream, timeout: float) -> None:
        self._address = offer.socket
        self._connection = connected(offer, CHANNEL)
        self._connection.settimeout(timeout)
        self._incoming = reader(self._connection)
        # Nobody may hold this any more and never have closed it.
        self._end = weakref.finalize(self, _end, Owner(), self._connection, self._incoming, beside)
        try:
            begun = self._incoming.read(1)
        except OSError as error:  # it is gone, or does not answer
            raise ServerUnavailable(f"{self._address}: {error}") from None
        if not begun:
            raise ServerUnavailable(f"{self._address} closed the connection: this stream has ended")

    def send(self, frames: Iterable[Frame[StepRequest]]) -> None:
        try:
            for frame in frames:
                write(self._connection, MESSAGE, frame.to_bytes())
        except TimeoutError:
            raise DeadlineExceeded(f"the server takes nothing in at {self._address}") from None
        except OSError:  # why, `receive` will find
            pass

    def receive(self, deadline: float) -> Frame[StepResponse]:
        self._connection.settimeout(max(1e-3, deadline - time.monotonic()))
        try:
            message = _read(self._incoming)
        except TimeoutError:
            raise DeadlineExceeded(f"no server answered at {self._address} in time") from None
        except (OSError, ValueError) as error:  # the latter if it was closed meanwhile
            raise ServerUnavailable(f"{self._address}: {error}") from None
        if message is None:
            raise ServerUnavailable(f"{self._address} ended the stream")
        kind, data = message
        if kind == ERROR:
            raise decode_refusal(step_pb2.Refusal.FromString(data)).error()
        return Frame.from_bytes(StepResponse, data)

    def close(self) -> None:
        self._end()


def _end(owner: Owner, connection: socket.socket, incoming: BinaryIO, beside: Stream) -> None:
    if not owner.here:  # whose connection it still is
        return
    with contextlib.suppress(OSError):  # the server was first
        connection.shutdown(socket.SHUT_RDWR)
    incoming.close()
    connection.close()
    beside.close()


def write(connection: socket.socket, kind: int, data: bytes) -> None:
    """Send one message."""
    header = len(data).to_bytes(4, "little") + bytes([kind])
    if len(data) < BUFFER_BYTES:
        connection.sendall(header + data)
    else:
        connection.sendall(header)
        connection.sendall(data)


def reader(connection: socket.socket) -> BinaryIO:
    """What comes over a connection, as a file."""
    return cast("BinaryIO", connection.makefile("rb", buffering=BUFFER_BYTES))


def messages(incoming: BinaryIO) -> Iterator[bytes]:
    """Messages until the connection ends; raises InvalidChunk for one that is too large."""
    while (message := _read(incoming)) is not None:
        yield message[1]


def _read(incoming: BinaryIO) -> tuple[int, bytes] | None:
    """Kind and bytes of the next message, or None at the end of the connection, even if that comes too early."""
    header = incoming.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    size = int.from_bytes(header[:4], "little")
    if size > LARGEST_MESSAGE:
        raise InvalidChunk(f"expected messages of at most {LARGEST_MESSAGE} bytes; got {size}")
    data = incoming.read(size)
    return (header[4], data) if len(data) == size else None


def encode_error(error: OptserveError) -> bytes:
    """An error as the last message of a channel."""
    return encode_refusal(Refusal.of(error)).SerializeToString()
