"""Shared memory: segments that workers on this host map instead of sending and receiving tensors.

A segment is a memfd: it has no name that could be guessed or left behind, and is gone with the last process that maps it.
Its descriptor is handed out over a Unix socket in a directory that only this server's user can enter, to those who know the
token of an open stream.
"""

import contextlib
import fcntl
import itertools
import mmap
import os
import secrets
import shutil
import socket
import socketserver
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optserve._errors import ServerBusy
from optserve._local_channel import CHANNEL
from optserve._shared_memory import NOTHING, NUMBER_BYTES, SOMETHING, TOKEN_BYTES, WORTHWHILE
from optserve._wire import Frame
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve_server import local_channel
from optserve_server.engine.arena import padded
from optserve_server.engine.buffers import Memory, private
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.gate import Gate

F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; mappings that exist stay writable
REQUEST_SECONDS = 5.0  # for a worker to say which segment it wants

GRADIENTS = 0  # number of the segment that every stream has for itself

_numbers = itertools.count(GRADIENTS + 1)


class Segment:
    """Zeroed memory that other processes can map: for writing, if `shared_writing`, else only for reading."""

    def __init__(self, nbytes: int, *, shared_writing: bool) -> None:
        self.number = next(_numbers)
        self.descriptor = os.memfd_create("optserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, max(1, nbytes))
        mapping = mmap.mmap(self.descriptor, max(1, nbytes))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (0 if shared_writing else F_SEAL_FUTURE_WRITE)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        self.array: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)[:nbytes]


def shareable(nbytes: int) -> Memory:
    """Memory that this process writes and others may read; a little is not worth a descriptor."""
    if nbytes < WORTHWHILE:
        return private(nbytes)
    segment = Segment(nbytes, shared_writing=False)
    return Memory(segment.array, segment)


Serve = Callable[[Iterator[Frame[StepRequest]]], Iterator[Frame[StepResponse]]]


class Attachment:
    """What one stream shares with its worker: a segment for its gradients, and the set's parameters."""

    def __init__(self, parameter_set: ParameterSet, serve: Serve, room: Gate, path: str, token: bytes) -> None:
        sizes = [padded(tensor.nbytes) for tensor in parameter_set.spec.tensors]
        self.offsets = list(itertools.accumulate(sizes, initial=0))[:-1]
        self.gradients: Segment | None = None  # until the worker comes to get it, and so turns out to be on this host
        self.offer = step_pb2.SharedMemory(
            socket=path,
            token=token,
            gradient_segment=GRADIENTS,
            gradient_offsets=self.offsets,
            parameter_offsets=parameter_set.offsets,
        )
        self._set = parameter_set
        self._serve = serve
        self._size = sum(sizes)
        self._room = room
        self._lock = threading.Lock()
        self._lasting = ExitStack()
        self._closed = False
        self._channel: socket.socket | None = None
        self._done = threading.Event()

    def find(self, number: int) -> Segment | None:
        """The segment of that number, if it is this stream's business; raises ServerBusy if there is no room for it."""
        if number != GRADIENTS:
            shared = [memory.segment for memory in self._set.memories if isinstance(memory.segment, Segment)]
            return next((each for each in shared if each.number == number), None)
        with self._lock:
            if self.gradients is None and not self._closed:
                self._lasting.enter_context(self._room.room(max(1, self._size)))
                self.gradients = Segment(self._size, shared_writing=True)
            return self.gradients

    def serve(self, connection: socket.socket) -> None:
        """Let the stream go on over a connection, until one of both ends."""
        with self._lock:
            if self._closed or self._channel is not None:
                return
            self._channel = connection
        try:
            local_channel.serve(connection, self._serve)
        finally:
            self._done.set()

    def close(self) -> None:
        """The stream has ended, and with it what goes on over a connection."""
        with self._lock:
            self._closed = True
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
            self._done.wait()
        self._lasting.close()


class SharedMemory:
    """The private directory, and the socket in it that hands out segments."""

    def __init__(self, max_bytes: int) -> None:
        self._room = Gate("bytes of shared memory", max_bytes)
        self._directory = tempfile.mkdtemp(prefix="optserve-")  # only this user can enter it
        self._path = str(Path(self._directory, "segments"))
        self._attachments: dict[bytes, Attachment] = {}
        self._server = _Server(self._path, self._handler())
        threading.Thread(target=self._server.serve_forever, name="optserve-segments", daemon=True).start()

    @contextmanager
    def attached(self, parameter_set: ParameterSet, serve: Serve) -> Iterator[Attachment]:
        """Share memory with a stream as long as this lasts, and let it go on over a local channel."""
        token = secrets.token_bytes(TOKEN_BYTES)
        attachment = self._attachments[token] = Attachment(parameter_set, serve, self._room, self._path, token)
        try:
            yield attachment
        finally:
            del self._attachments[token]
            attachment.close()

    def close(self) -> None:
        """Hand out no more."""
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        attachments = self._attachments

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                connection: socket.socket = self.request
                connection.settimeout(REQUEST_SECONDS)
                with contextlib.suppress(OSError):
                    request = _received(connection, TOKEN_BYTES + NUMBER_BYTES)
                    attachment = attachments.get(request[:TOKEN_BYTES])
                    if attachment is None or len(request) < TOKEN_BYTES + NUMBER_BYTES:
                        return
                    number = int.from_bytes(request[TOKEN_BYTES:], "little")
                    if number == CHANNEL:
                        connection.settimeout(None)
                        attachment.serve(connection)
                    else:
                        _hand_out(connection, attachment, number)

        return Handler


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 1024  # workers that come all at once


def _received(connection: socket.socket, size: int) -> bytes:
    """As many bytes, or fewer if the connection ends."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def _hand_out(connection: socket.socket, attachment: Attachment, number: int) -> None:
    try:
        segment = attachment.find(number)
    except (ServerBusy, OSError):  # no room, no descriptors, no memory
        segment = None
    if segment is None:
        connection.sendall(NOTHING)
    else:
        socket.send_fds(connection, [SOMETHING], [segment.descriptor])
