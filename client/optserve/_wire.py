"""Frames: protobuf messages whose tensor bytes are never copied into a protobuf object.

A frame serializes to exactly the bytes that the generated code would write, and parses what the generated code writes in any
language; only the payload, `Chunk.data`, is spliced in and cut out by hand, because protobuf copies it twice each way.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from optserve._errors import InvalidChunk
from optserve._specification import BLOCK, Run
from optserve.v1.optimizer_service_pb2 import CreateParameterSetRequest, ExportParameterSetResponse
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve.v1.tensor_pb2 import Chunk, Segment

SMALL = 16 << 10  # bytes: protobuf's own copies of a payload cost less than doing without them
LARGEST_MESSAGE = 16 << 20  # bytes; our chunks are far smaller: room for others' choice
CHUNK_BYTES = 2 << 20  # payload of a chunk that we send; measured, see docs/architecture.md

M = TypeVar("M", CreateParameterSetRequest, ExportParameterSetResponse, StepRequest, StepResponse)
Buffer = bytes | memoryview
Progress = Callable[[int], object]  # called with the number of bytes so far

_CHUNK_FIELD = {
    message: message.DESCRIPTOR.fields_by_name["chunk"].number
    for message in (CreateParameterSetRequest, ExportParameterSetResponse, StepRequest, StepResponse)
}
_DATA_FIELD = Chunk.DESCRIPTOR.fields_by_name["data"].number
_LENGTH_DELIMITED = 2  # wire type


@dataclass(slots=True)
class Payload:
    """A chunk: runs of elements, and their bytes back to back in one or several buffers, or none: in shared memory."""

    runs: Sequence[Run]
    data: Sequence[Buffer]
    replace: bool = False
    in_shared_memory: bool = False

    @property
    def buffer(self) -> Buffer:
        """The bytes as one buffer, joined if there are several."""
        return self.data[0] if len(self.data) == 1 else b"".join(self.data)

    @property
    def nbytes(self) -> int:
        """Size of the bytes."""
        return sum(len(buffer) for buffer in self.data)


@dataclass(slots=True)
class Frame(Generic[M]):
    """A message without its `chunk` field, and that field's content, if it has one."""

    message: M
    payload: Payload | None = None

    def to_bytes(self) -> bytes:
        """Serialize; the payload is copied once."""
        payload = self.payload
        if payload is None:
            return self.message.SerializeToString()
        if payload.nbytes > SMALL:
            return _splice(self.message.SerializeToString(), _CHUNK_FIELD[type(self.message)], payload)
        self.message.chunk.CopyFrom(_chunk(payload, payload.buffer))
        serialized = self.message.SerializeToString()
        self.message.ClearField("chunk")
        return serialized

    @classmethod
    def from_bytes(cls, kind: type[M], data: bytes) -> "Frame[M]":
        """Parse; the payload stays where it is. Raises InvalidChunk for what is not such a message."""
        try:
            chunk = _only(data, _CHUNK_FIELD[kind]) if len(data) > SMALL else None
            if chunk is None:
                return cls._parse_whole(kind, data)
            outer, begin, end = chunk
            view = memoryview(data)
            body = view[begin:end]
            payload = _only(body, _DATA_FIELD)
            if payload is None:
                return cls._parse_whole(kind, data)
            head, first, last = payload
            message = kind.FromString(b"".join((view[:outer], view[end:])))
            parsed = Chunk.FromString(b"".join((body[:head], body[last:])))
            content = body[first:last]
            if 2 * len(content) < len(data):  # a view would keep alive what is mostly not payload
                return cls(message, _payload(parsed, bytes(content)))
            return cls(message, _payload(parsed, content))
        except (DecodeError, _MalformedError) as error:
            raise InvalidChunk(
                f"expected a serialized {kind.DESCRIPTOR.full_name}; got {len(data)} other bytes ({error})"
            ) from None

    @classmethod
    def _parse_whole(cls, kind: type[M], data: bytes) -> "Frame[M]":
        """Let protobuf parse it all: no payload, or one in pieces that its merging rules put together."""
        message = kind.FromString(data)
        if not message.HasField("chunk"):
            return cls(message)
        payload = _payload(message.chunk, message.chunk.data)
        message.ClearField("chunk")
        return cls(message, payload)


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def pack(tensors: Iterable[tuple[int, Buffer, int]], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Payload]:
    """Cut tensors, given as (index, bytes, item size), into chunks: small ones share a chunk, large ones span several.

    Cuts are at multiples of the server's unit of reduction, so that it can guard every piece as it arrives.
    """
    runs: list[Run] = []
    data: list[Buffer] = []
    room = chunk_bytes
    for index, buffer, itemsize in tensors:
        view = memoryview(buffer).cast("B")
        offset, remaining = 0, view.nbytes // itemsize
        while remaining:
            count = min(remaining, room // itemsize)
            if count < remaining:
                count -= count % BLOCK
            if count == 0:
                yield Payload(runs, data)
                runs, data, room = [], [], chunk_bytes
                continue
            runs.append(Run(index, offset, count))
            data.append(view[offset * itemsize : (offset + count) * itemsize])
            offset, remaining, room = offset + count, remaining - count, room - count * itemsize
    if runs:
        yield Payload(runs, data)


def spread(frame: Frame[M], payloads: Iterable[Payload]) -> Generator[Frame[M], None, Frame[M]]:
    """Frames with one payload each, the first of them in `frame`; returns the last, for more to ride with it."""
    for payload in payloads:
        if frame.payload is not None:
            yield frame
            frame = Frame(type(frame.message)())
        frame.payload = payload
    return frame


def noted(frames: Iterator[Frame[M]], progress: Progress | None) -> Iterator[Frame[M]]:
    """The frames, with the bytes of their payloads counted as they go by."""
    nbytes = 0
    for frame in frames:
        yield frame
        nbytes += frame.payload.nbytes if frame.payload is not None else 0
        if progress is not None:
            progress(nbytes)


class _MalformedError(ValueError):
    """Bytes that are no protobuf message."""


def _splice(plain: bytes, field: int, payload: Payload) -> bytes:
    """A serialized message with its chunk put in where protobuf would: fields go by number; `data`, if any, ends a chunk."""
    head = _chunk(payload).SerializeToString()
    if size := payload.nbytes:
        head += _prefix(_DATA_FIELD, size)
    cut = next((begin for number, begin, _, _ in _fields(plain) if number > field), len(plain))
    return b"".join((plain[:cut], _prefix(field, len(head) + size), head, *payload.data, plain[cut:]))


def _chunk(payload: Payload, data: Buffer = b"") -> Chunk:
    segments = [Segment(tensor=run.tensor, offset=run.offset, count=run.size) for run in payload.runs]
    return Chunk(
        segments=segments, replace=payload.replace, in_shared_memory=payload.in_shared_memory, data=bytes(data)
    )


def _payload(chunk: Chunk, data: Buffer) -> Payload:
    runs = [Run(each.tensor, each.offset, each.count) for each in chunk.segments]
    return Payload(runs, [data], chunk.replace, chunk.in_shared_memory)


def _prefix(field: int, size: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: Buffer, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = int(data[position])
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError("a truncated number")


def _fields(data: Buffer) -> Iterator[tuple[int, int, int, int]]:
    """Number, begin of the tag, begin and end of the content of every top-level field."""
    position = 0
    while position < len(data):
        tag_begin = position
        tag, position = _read_varint(data, position)
        match tag & 7:
            case 0:
                begin, (_, position) = position, _read_varint(data, position)
            case 1:
                begin, position = position, position + 8
            case 2:
                size, begin = _read_varint(data, position)
                position = begin + size
            case 5:
                begin, position = position, position + 4
            case wire_type:
                raise _MalformedError(f"wire type {wire_type}")
        if position > len(data):
            raise _MalformedError("a field past the end")
        yield tag >> 3, tag_begin, begin, position


def _only(data: Buffer, field: int) -> tuple[int, int, int] | None:
    """Begin of the tag, begin and end of the content of a field that occurs exactly once, else None."""
    found = [(tag, begin, end) for number, tag, begin, end in _fields(data) if number == field]
    return found[0] if len(found) == 1 else None
