"""Staging: tensors that arrive in pieces, checked as they come and read where they lie.

Nothing here touches a parameter set. A staged transfer holds on to the received messages; loops read them in place
through `Piece.address`. What is wrong with a transfer is an exception at the call that saw it.
"""

import ctypes
import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optserve._codecs import codec
from optserve._dtypes import FLOAT32, DType
from optserve._errors import InvalidChunk, NonFiniteValue
from optserve._specification import BLOCK, Run, TensorSpec
from optserve.formats import Format, Int8, TopK
from optserve_server.engine.decoders import decode_top_k
from optserve_server.engine.formats import INT8, bits, decoder
from optserve_server.engine.loops import guard_loop
from optserve_server.engine.threads import Threads

INLINE = 1 << 20  # elements: chunks from the wire are guarded by the thread that received them
MOST_PIECES = 64  # for each tensor, and two for each of its blocks: bookkeeping stays small beside the elements
SKIP = 3  # column of the guard's table, which advances with the elements
REPLACEMENTS = 4  # a transfer may carry this many times its tensors' bytes, replaced segments included

_INT8 = Int8()


class Piece(NamedTuple):
    """Consecutive elements of one tensor in received memory: after the first `skip` of those at an address."""

    offset: int
    size: int
    address: int
    skip: int = 0


class Received(NamedTuple):
    """A chunk as it came: runs, and bytes-like objects with their elements, which last as long as it does."""

    runs: Sequence[Run]
    data: Sequence[Any]
    replace: bool


GuardRow = tuple[DType, int, int, int, int]  # dtype, first element from the transfer's first block, size, address, skip


class StagedTensor:
    """One tensor's pieces, ordered by offset and free of overlap."""

    def __init__(self, spec: TensorSpec, first_block: int) -> None:
        self.spec = spec
        self.first_block = first_block
        self._most_pieces = MOST_PIECES + 2 * (-(-spec.size // BLOCK))
        self.pieces: list[Piece] = []
        self.received = 0

    def add(self, piece: Piece, *, replace: bool) -> None:
        """Take a piece in; raises InvalidChunk if it lies outside the tensor or, without `replace`, overlaps."""
        end = piece.offset + piece.size
        if piece.size < 1 or end > self.spec.size:
            raise InvalidChunk(
                f"tensor {self.spec}: expected segments of at least one element within its {self.spec.size}; "
                f"got elements {piece.offset} to {end}"
            )
        first = bisect_right(self.pieces, piece.offset, key=lambda other: other.offset + other.size)
        last = bisect_left(self.pieces, end, lo=first, key=lambda other: other.offset)
        overlapped = self.pieces[first:last]
        if overlapped and not replace:
            raise InvalidChunk(
                f"tensor {self.spec}: elements {piece.offset} to {end} overlap elements that came before; "
                "send each element once, or set Chunk.replace"
            )
        remains = [part for other in overlapped for part in self._outside(other, piece.offset, end)]
        merged = sorted([piece, *remains])
        if len(self.pieces) + len(merged) - len(overlapped) > self._most_pieces:
            raise InvalidChunk(
                f"tensor {self.spec}: expected at most {self._most_pieces} segments; send longer ones (chunks of 2 MiB)"
            )
        self.received += sum(part.size for part in merged) - sum(other.size for other in overlapped)
        self.pieces[first:last] = merged

    def _outside(self, piece: Piece, begin: int, end: int) -> Iterable[Piece]:
        if piece.offset < begin:
            yield piece._replace(size=begin - piece.offset)
        if piece.offset + piece.size > end:
            yield Piece(end, piece.offset + piece.size - end, piece.address, piece.skip + end - piece.offset)


class Staging:
    """A transfer of the given tensors: `add` chunks, then `finish`."""

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        threads: Threads,
        formats: Sequence[Format | None] = (),
        *,
        guard: bool = True,
    ) -> None:
        self._threads = threads
        self._guards = guard
        self._formats = formats or [None] * len(tensors)
        blocks = 0
        self.tensors: list[StagedTensor] = []
        for spec in tensors:
            self.tensors.append(StagedTensor(spec, blocks))
            blocks += -(-spec.size // BLOCK)
        self._sums = np.zeros(blocks)
        self._digests = np.zeros(blocks, np.uint32)
        self._guarded = np.zeros(blocks, bool)
        self.received: list[Received] = []
        self._messages: list[NDArray[Any]] = []  # keeps the pieces' memory alive
        self._budget = REPLACEMENTS * sum(spec.nbytes for spec in tensors)

    def add(self, runs: Sequence[Run], data: Any, *, replace: bool = False) -> None:
        """Take a chunk in, without copying; raises InvalidChunk."""
        message = np.frombuffer(data, np.uint8)
        sizes = [self._encoded_size(run) for run in runs]
        if not runs:
            raise InvalidChunk(f"expected at least one segment in a chunk; got none, and {message.size} bytes")
        if message.size != sum(sizes):
            raise InvalidChunk(f"expected {sum(sizes)} bytes for the segments of this chunk; got {message.size}")
        self._spend(runs)
        self._messages.append(message)
        pieces, begin = [], 0
        for run, size in zip(runs, sizes, strict=True):
            pieces.append(Piece(run.offset, run.size, self._decoded(run, message[begin : begin + size])))
            begin += size
        self._stage(runs, pieces, replace=replace)
        self.received.append(Received(runs, [message], replace))

    def add_shared(
        self, runs: Sequence[Run], memory: NDArray[np.uint8], starts: Sequence[int], *, replace: bool = False
    ) -> None:
        """Take runs in that lie in memory shared with the sender, their tensors at these starts; raises InvalidChunk."""
        self._spend(runs)
        self._messages.append(memory)
        address = memory.ctypes.data
        pieces, data = [], []
        for run, start in zip(runs, starts, strict=True):
            itemsize = self._tensor(run).spec.dtype.itemsize
            begin = start + run.offset * itemsize
            pieces.append(Piece(run.offset, run.size, address + begin))
            data.append(memory[begin : begin + run.size * itemsize])
        self._stage(runs, pieces, replace=replace)
        self.received.append(Received(runs, data, replace))

    def _stage(self, runs: Sequence[Run], pieces: Sequence[Piece], *, replace: bool) -> None:
        rows = []
        for run, piece in zip(runs, pieces, strict=True):
            tensor = self._tensor(run)
            tensor.add(piece, replace=replace)
            if row := self._whole_blocks(tensor, piece):
                rows.append(row)
        # What is replaced may be replaced again in this very chunk: it waits for `finish`.
        if self._guards and not replace:
            self._guard(rows)

    def _tensor(self, run: Run) -> StagedTensor:
        if run.tensor >= len(self.tensors):
            raise InvalidChunk(f"expected segments of {len(self.tensors)} tensors; got index {run.tensor}")
        return self.tensors[run.tensor]

    def _spend(self, runs: Sequence[Run]) -> None:
        self._budget -= sum(run.size * self._tensor(run).spec.dtype.itemsize for run in runs)
        if self._budget < 0:
            raise InvalidChunk(
                f"expected replaced segments to stay within {REPLACEMENTS} times the size of the tensors"
            )

    def _encoded_size(self, run: Run) -> int:
        spec, format = self._tensor(run).spec, self._formats[run.tensor]
        if format is None:
            return run.size * spec.dtype.itemsize
        end = run.offset + run.size
        if run.offset % BLOCK or (end % BLOCK and end != spec.size):
            raise InvalidChunk(
                f"tensor {spec}: expected segments of encoded elements to begin and end at multiples of {BLOCK}, or at the "
                f"tensor's end; got elements {run.offset} to {end}"
            )
        return format.encoded_size(run.size)

    def _decoded(self, run: Run, data: NDArray[np.uint8]) -> int:
        """Address of a run's elements as they will be read."""
        format = self._formats[run.tensor]
        if not isinstance(format, TopK):
            return data.ctypes.data
        elements = np.empty(run.size, np.float32)
        decode_top_k(format, data, elements)
        self._messages.append(elements)
        return elements.ctypes.data

    def finish(self) -> None:
        """Check that every element has come and is finite; raises InvalidChunk or NonFiniteValue."""
        for tensor in self.tensors:
            if tensor.received != tensor.spec.size:
                raise InvalidChunk(
                    f"tensor {tensor.spec}: expected all of its {tensor.spec.size} elements before the commit; "
                    f"got {tensor.received}"
                )
        if not self._guards:
            return
        if not self._guarded.all():
            for tensor in self.tensors:
                self._guard_remaining(tensor)
        if not np.isfinite(self._sums).all():
            for tensor in self.tensors:
                self._check_finite(tensor)

    def align(self) -> None:
        """Let no block lie in several pieces, after `finish`: copy those that do."""
        for tensor in self.tensors:
            for block in sorted({piece.offset // BLOCK for piece in tensor.pieces if piece.offset % BLOCK}):
                elements = self._gather(tensor, block)
                self._messages.append(elements)
                tensor.add(Piece(block * BLOCK, elements.size, elements.ctypes.data), replace=True)

    def norm(self, tensor: int) -> float:
        """Euclidean norm of one of the tensors, after `finish`; block sums are added in order."""
        return math.sqrt(float(self._sums[self._blocks(self.tensors[tensor])].sum()))

    def digest(self, more: str = "") -> bytes:
        """8 bytes that tell this transfer's content, and `more`, from another's, after `finish`; whatever the chunks."""
        names = "\n".join([*(str(tensor.spec) for tensor in self.tensors), more]).encode()
        return hashlib.blake2b(names + self._digests.tobytes(), digest_size=8).digest()

    def _blocks(self, tensor: StagedTensor) -> slice:
        return slice(tensor.first_block, tensor.first_block - (-tensor.spec.size // BLOCK))

    def _whole_blocks(self, tensor: StagedTensor, piece: Piece) -> GuardRow | None:
        """What of a piece can be guarded now, while it is in the cache; its parts of blocks wait for `finish`."""
        end = piece.offset + piece.size
        self._guarded[tensor.first_block + piece.offset // BLOCK : tensor.first_block - (-end // BLOCK)] = False
        begin = -(-piece.offset // BLOCK) * BLOCK
        whole = end if end == tensor.spec.size else end // BLOCK * BLOCK
        if whole <= begin:
            return None
        skip = piece.skip + begin - piece.offset
        return tensor.spec.dtype, tensor.first_block * BLOCK + begin, whole - begin, piece.address, skip

    def _guard(self, rows: Iterable[GuardRow]) -> None:
        tables: dict[DType, list[tuple[int, int, int, int]]] = {}
        for dtype, start, size, address, skip in rows:
            tables.setdefault(dtype, []).append((start, size, address, skip))
            self._guarded[start // BLOCK : -(-(start + size) // BLOCK)] = True
        for dtype, rows_of_dtype in tables.items():
            table, results = np.array(rows_of_dtype, np.int64), (self._sums, self._digests)
            self._threads.run(guard_loop(dtype), table, {SKIP: 1}, *results, grain=BLOCK, inline=INLINE)

    def _guard_remaining(self, tensor: StagedTensor) -> None:
        blocks = self._blocks(tensor)
        for index in np.flatnonzero(~self._guarded[blocks]):
            elements = self._gather(tensor, int(index))
            start = (blocks.start + int(index)) * BLOCK
            self._guard([(_gathered(tensor.spec.dtype), start, elements.size, elements.ctypes.data, 0)])

    def _gather(self, tensor: StagedTensor, block: int) -> NDArray[Any]:
        begin, end = block * BLOCK, min((block + 1) * BLOCK, tensor.spec.size)
        dtype = tensor.spec.dtype
        elements = np.empty(end - begin, bits(dtype))
        first = bisect_right(tensor.pieces, begin, key=lambda piece: piece.offset + piece.size)
        for piece in tensor.pieces[first:]:
            if piece.offset >= end:
                break
            low, high = max(begin, piece.offset), min(end, piece.offset + piece.size)
            skip, target = piece.skip + low - piece.offset, elements[low - begin : high - begin]
            if dtype is INT8:  # its pieces are whole blocks
                data = memory(piece.address + _INT8.encoded_size(skip), _INT8.encoded_size(target.size))
                codec(_INT8).decode(data, target)
            else:
                np.copyto(target.view(np.uint8), memory(piece.address + skip * dtype.itemsize, target.nbytes))
        return elements

    def _check_finite(self, tensor: StagedTensor) -> None:
        blocks = self._blocks(tensor)
        for index in np.flatnonzero(~np.isfinite(self._sums[blocks])):
            elements = self._gather(tensor, int(index))
            decode = decoder(tensor.spec.dtype)
            for position, element in enumerate(elements):
                value = float(decode(element))
                if not math.isfinite(value):
                    where = (
                        np.unravel_index(int(index) * BLOCK + position, tensor.spec.shape) if tensor.spec.shape else ()
                    )
                    raise NonFiniteValue(
                        f"tensor {tensor.spec}: expected finite values; got {value} at index {[int(k) for k in where]}"
                    )


def _gathered(dtype: DType) -> DType:
    """What gathered elements are."""
    return FLOAT32 if dtype is INT8 else dtype


def memory(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Bytes at an address that something else keeps alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
