"""Carriers: how the tensors of one stream travel, in its messages or through memory shared with the server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from optserve._buffers import Buffers
from optserve._codecs import Codec, codec
from optserve._compression import CompressedPush
from optserve._copy import address, copy_array
from optserve._dtypes import BFLOAT16, FLOAT16, FLOAT32, narrowed
from optserve._errors import InvalidChunk, TensorMismatch
from optserve._messages import encode_dtype
from optserve._rows import Indices, RowSparse
from optserve._shared_memory import Mappings
from optserve._specification import Run, TensorSpec
from optserve._wire import Frame, Payload, bytes_of, pack
from optserve.formats import BFloat16, Float16
from optserve.v1 import step_pb2

Array = np.ndarray[Any, Any]
KEY_BYTES = 8
PIECE = 8 << 20  # elements: what is copied into shared memory before the server is told, so that both work at once

_DTYPES = {BFloat16: BFLOAT16, Float16: FLOAT16}


Part = Mapping[str, tuple[int, Array]]  # gradients by name, each with its place in the push


class Sent(Protocol):
    """What a carrier needs to know of a push: arrays by name, and the payloads instead, if they are compressed."""

    @property
    def gradients(self) -> dict[str, Array]: ...
    @property
    def parameters(self) -> dict[str, Array]: ...
    @property
    def compressed(self) -> CompressedPush | None: ...
    @property
    def rows(self) -> Mapping[str, Indices]: ...


class Chunks:
    """Tensors in the messages of the stream. `tensors` are the registered ones; `pull_format` makes answers smaller."""

    def __init__(
        self, tensors: Sequence[TensorSpec], buffers: Buffers, pull_format: BFloat16 | Float16 | None = None
    ) -> None:
        self._tensors = tensors
        self._buffers = buffers
        self._dtype = _DTYPES[type(pull_format)] if pull_format is not None else None
        self._codec = codec(pull_format) if pull_format is not None else None
        self.gradients: list[Array] | None = None  # arrays that are sent without a copy

    def payloads(self, push: Sent) -> Iterator[Payload]:
        """The tensors of a push, in the order in which they were declared."""
        if push.compressed is not None:
            yield from push.compressed.payloads()
        else:
            yield from self.part({name: (k, array) for k, (name, array) in enumerate(push.gradients.items())})
        first = len(push.gradients)
        yield from pack((first + k, bytes_of(each), each.itemsize) for k, each in enumerate(push.parameters.values()))

    def part(self, gradients: Part) -> Iterator[Payload]:
        """Some gradients of a push."""
        yield from pack((place, bytes_of(array), array.itemsize) for place, array in gradients.values())

    def ask(self, pull: step_pb2.Pull) -> None:
        """Say how the answer should come."""
        if self._dtype is not None:
            pull.dtype = encode_dtype(self._dtype)

    def receive(
        self,
        header: step_pb2.Parameters,
        answers: Iterator[Frame[Any]],
        rows: Mapping[str, Indices],
        *,
        copy: bool,
        arrived: Callable[[int, Array], None] | None = None,
    ) -> list[Array | RowSparse]:
        """The tensors that a header announced, from the messages that begin with it, or the rows of them that were asked for.

        `arrived` is called with the index of each that comes in messages, whole, once it is there. Raises InvalidChunk.
        """
        counts = {table.tensor: table.count for table in header.tables}
        specs = [self._tensors[index] for index in header.tensors]
        for place, spec in enumerate(specs):
            if place in counts or spec.name in rows:
                count = counts[place] if place in counts else len(rows[spec.name])
                specs[place] = replace(spec, shape=(count, *spec.shape[1:]))
        arrays = self._buffers.arrays(specs)
        keys = [np.empty(count, np.int64) for count in counts.values()]
        targets = [*arrays, *keys]
        remaining = [each.size for each in targets]
        for answer in answers:
            for place, size in self._take(answer.payload, specs, targets) if answer.payload is not None else ():
                remaining[place] -= size
                if arrived is not None and not remaining[place] and place < len(specs):
                    arrived(header.tensors[place], targets[place])
        if any(remaining):
            raise InvalidChunk(f"expected every element of the pulled tensors; {sum(remaining)} did not come")
        tables = {place: RowSparse(each, arrays[place]) for place, each in zip(counts, keys, strict=True)}
        return [tables.get(place, array) for place, array in enumerate(arrays)]

    def _take(
        self, payload: Payload, specs: Sequence[TensorSpec], arrays: Sequence[Array]
    ) -> Iterator[tuple[int, int]]:
        """Put a chunk's elements into the arrays, and say of which how many."""
        source = np.frombuffer(payload.buffer, np.uint8)
        begin = 0
        for run in payload.runs:
            if run.tensor >= len(arrays) or run.offset + run.size > arrays[run.tensor].size:
                raise TensorMismatch(f"the server sent elements outside of the pulled tensors: {run}")
            target = arrays[run.tensor].reshape(-1)[run.offset : run.offset + run.size]
            own = specs[run.tensor].dtype if run.tensor < len(specs) else None  # None: keys
            dtype = narrowed(own, self._dtype) if own is not None else None
            size = run.size * (dtype.itemsize if dtype is not None else KEY_BYTES)
            if dtype is own:
                target.view(np.uint8)[:] = source[begin : begin + size]
            else:
                assert self._codec is not None
                _decode(self._codec, source[begin : begin + size], target)
            begin += size
            yield run.tensor, run.size


class Segments(Chunks):
    """Tensors in shared memory, with messages that say where; what does not fit there goes in messages."""

    def __init__(
        self, tensors: Sequence[TensorSpec], buffers: Buffers, mappings: Mappings, release: Callable[[], None]
    ) -> None:
        super().__init__(tensors, buffers)
        self._mappings = mappings
        self._release = release
        self._indices = {spec.name: index for index, spec in enumerate(tensors)}
        self.gradients = mappings.gradients

    def payloads(self, push: Sent) -> Iterator[Payload]:
        if push.rows:
            return Chunks(self._tensors, self._buffers).payloads(push)
        return super().payloads(push)

    def part(self, gradients: Part) -> Iterator[Payload]:
        if not all(self._registered(name, array) for name, (_, array) in gradients.items()):
            yield from super().part(gradients)  # the server says what is wrong with it, if anything is
            return
        runs: list[Run] = []
        for run in self._laid(gradients):
            runs.append(run)
            if run.size == PIECE:
                yield Payload(runs, (), in_shared_memory=True)
                runs = []
        if runs:
            yield Payload(runs, (), in_shared_memory=True)

    def _registered(self, name: str, array: Array) -> bool:
        return name in self._indices and self._tensors[self._indices[name]] == TensorSpec.of(name, array)

    def _laid(self, gradients: Part) -> Iterator[Run]:
        """Put gradients into shared memory, unless they lie there, a piece at a time."""
        memories = [self._mappings.gradients[self._indices[name]] for name in gradients]
        arrays = [
            self._readable(array, memory) for (_, array), memory in zip(gradients.values(), memories, strict=True)
        ]
        for (place, _), array, memory in zip(gradients.values(), arrays, memories, strict=True):
            if address(array) == address(memory):
                if array.size:
                    yield Run(place, 0, array.size)
                continue
            for begin in range(0, array.size, PIECE):
                piece = slice(begin, min(begin + PIECE, array.size))
                copy_array(memory.reshape(-1)[piece], array.reshape(-1)[piece])
                yield Run(place, begin, piece.stop - begin)

    def _readable(self, array: Array, memory: Array) -> Array:
        """A gradient, copied if it lies where another tensor's is about to be written."""
        misplaced = self._mappings.contains(array) and address(array) != address(memory)
        return array.copy() if misplaced else array

    def ask(self, pull: step_pb2.Pull) -> None:
        pull.in_shared_memory = True

    def receive(
        self,
        header: step_pb2.Parameters,
        answers: Iterator[Frame[Any]],
        rows: Mapping[str, Indices],
        *,
        copy: bool,
        arrived: Callable[[int, Array], None] | None = None,
    ) -> list[Array | RowSparse]:
        if not header.segment:
            return super().receive(header, answers, rows, copy=copy, arrived=arrived)
        for _ in answers:
            pass
        mapped = self._mappings.parameters(header.segment)
        views = [mapped[index] for index in header.tensors]
        if not copy:
            return list(views)
        arrays = self._buffers.arrays([self._tensors[index] for index in header.tensors])
        for array, view in zip(arrays, views, strict=True):
            copy_array(array, view)
        self._release()
        return list(arrays)


def _decode(decoder: Codec, data: Array, target: Array) -> None:
    if target.dtype == FLOAT32.storage:
        decoder.decode(data, target)
    else:
        elements = np.empty(target.size, np.float32)
        decoder.decode(data, elements)
        target[:] = elements
