"""Shared memory with a server on this host: its segments, mapped into this process."""

import fcntl
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._errors import NoSharedMemory
from optserve._specification import TensorSpec
from optserve.v1 import step_pb2

TOKEN_BYTES = 16
NUMBER_BYTES = 8
WORTHWHILE = 64 << 10  # bytes of tensors: below this, a message costs no more
ANSWER_SECONDS = 10.0

Array = NDArray[Any]


class Mappings:
    """The segments of one stream; raises NoSharedMemory if the server's cannot be had, as from another host."""

    def __init__(self, offer: step_pb2.SharedMemory, tensors: Sequence[TensorSpec]) -> None:
        self._offer = offer
        self._tensors = tensors
        self._parameters: dict[int, list[Array]] = {}
        memory = self._map(offer.gradient_segment, writable=True)
        self.gradients = self._arrays(memory, offer.gradient_offsets)

    def parameters(self, segment: int) -> list[Array]:
        """Read-only arrays of every registered tensor in a segment."""
        if segment not in self._parameters:
            memory = self._map(segment, writable=False)
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
        except OSError as error:
            raise NoSharedMemory(f"no shared memory with the server: {self._offer.socket}: {error}") from None
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK:  # else reading it could end this process
                raise NoSharedMemory("expected a segment that is sealed against shrinking")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, access)
        finally:
            os.close(descriptor)
        return np.frombuffer(mapped, np.uint8)

    def _receive(self, segment: int) -> int:
        with connected(self._offer, segment) as connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not descriptors:
                raise ConnectionError(f"it has no segment {segment}")
            return descriptors[0]


def connected(offer: step_pb2.SharedMemory, number: int) -> socket.socket:
    """A connection that has asked for a number; raises NoSharedMemory."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(offer.socket)
        connection.sendall(offer.token + number.to_bytes(NUMBER_BYTES, "little"))
    except OSError as error:
        connection.close()
        raise NoSharedMemory(f"no shared memory with the server: {offer.socket}: {error}") from None
    return connection
