"""Shared memory with a server on this host: its segments, mapped into this process."""

import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._errors import NoSharedMemory, OptserveError, ServerUnavailable
from optserve._specification import MOST_BUFFERS, TensorSpec
from optserve.v1 import step_pb2

TOKEN_BYTES = 16
NUMBER_BYTES = 8
SOMETHING, NOTHING = b"\0", b"\1"  # answers to a request
WORTHWHILE = 64 << 10  # bytes of tensors: below this, a message costs no more
ANSWER_SECONDS = 10.0

Array = NDArray[Any]


class Mappings:
    """The segments of one stream.

    Raises NoSharedMemory if the server's cannot be had, as from another host, and ServerUnavailable if the stream has ended.
    """

    def __init__(self, offer: step_pb2.SharedMemory, tensors: Sequence[TensorSpec]) -> None:
        self._offer = offer
        self._tensors = tensors
        self._parameters: dict[int, list[Array]] = {}
        self._memory = self._map(offer.gradient_segment, writable=True)
        self.gradients = self._arrays(self._memory, offer.gradient_offsets)

    def contains(self, array: Array) -> bool:
        """Whether an array lies in the memory of the gradients."""
        return np.may_share_memory(array, self._memory)

    def parameters(self, segment: int) -> list[Array]:
        """Read-only arrays of every registered tensor in a segment."""
        if segment not in self._parameters:
            memory = self._map(segment, writable=False)
            if len(self._parameters) == MOST_BUFFERS:  # one of them, the server has given up
                del self._parameters[min(self._parameters)]
            self._parameters[segment] = self._arrays(memory, self._offer.parameter_offsets)
        return self._parameters[segment]

    def _arrays(self, memory: NDArray[np.uint8], offsets: Sequence[int]) -> list[Array]:
        return [
            memory[offset : offset + spec.nbytes].view(spec.dtype.array_dtype).reshape(spec.shape)
            for spec, offset in zip(self._tensors, offsets, strict=True)
        ]

    def _map(self, segment: int, *, writable: bool) -> NDArray[np.uint8]:
        try:
            descriptor = self._receive(segment)
        except OptserveError:
            raise
        except ConnectionError as error:
            raise ServerUnavailable(f"{self._offer.socket}: {error}") from None
        except OSError as error:
            raise NoSharedMemory(f"no shared memory with the server: {self._offer.socket}: {error}") from None
        try:
            if not _sealed(descriptor):  # reading it could end this process
                raise NoSharedMemory("expected a segment that is sealed against shrinking")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, access)
        finally:
            os.close(descriptor)
        return np.frombuffer(mapped, np.uint8)

    def _receive(self, segment: int) -> int:
        with connected(self._offer, segment) as connection:
            answer, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if answer == NOTHING:
                raise NoSharedMemory(f"the server has no segment {segment} to share, or no room for it")
            if not descriptors:
                raise ServerUnavailable(f"{self._offer.socket} closed the connection: this stream has ended")
            return descriptors[0]


def _sealed(descriptor: int) -> bool:
    """Whether a file can't shrink."""
    import fcntl  # where there are segments, on Linux, there is this

    return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)


def connected(offer: step_pb2.SharedMemory, number: int) -> socket.socket:
    """A connection that has asked for a number; raises NoSharedMemory, or ServerUnavailable if the server has died since."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(offer.socket)
        connection.sendall(offer.token + number.to_bytes(NUMBER_BYTES, "little"))
    except ConnectionError as error:  # the socket is there, and nobody listens
        connection.close()
        raise ServerUnavailable(f"{offer.socket}: {error}") from None
    except OSError as error:
        connection.close()
        raise NoSharedMemory(f"no shared memory with the server: {offer.socket}: {error}") from None
    return connection
