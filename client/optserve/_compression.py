"""Compression of pushes: encoded once, sent again unchanged, and with error feedback where the format loses much."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._codecs import codec
from optserve._specification import BLOCK, Run
from optserve._wire import CHUNK_BYTES, Payload
from optserve.formats import Format

Arrays = Mapping[str, np.ndarray[Any, Any]]
Floats = NDArray[np.float32]


class Compressor:
    """One handle's format, and what its pushes left unsaid so far: `residuals`, float32 [elements], by tensor.

    Two arrays for each tensor serve in turn, one to read and one to write, since a push may be refused.
    """

    def __init__(self, format: Format) -> None:
        self.format = format
        self.residuals: dict[str, Floats] = {}
        self.spares: dict[str, Floats] = {}

    def begin(self, gradients: Arrays) -> "CompressedPush":
        """A push of these gradients."""
        return CompressedPush(self, gradients)


@dataclass(eq=False)
class CompressedPush:
    """The payloads of one push, made when they are first sent; what it leaves unsaid counts once it is taken in."""

    compressor: Compressor
    gradients: Arrays
    _made: list[Payload] = field(default_factory=list)
    _residuals: dict[str, Floats] = field(default_factory=dict)
    _making: Iterator[Payload] | None = None

    def payloads(self) -> Iterator[Payload]:
        """All payloads, in the order of the gradients."""
        self._making = self._making or self._make()
        sent = 0
        while True:
            if sent == len(self._made):
                if (payload := next(self._making, None)) is None:
                    return
                self._made.append(payload)
            yield self._made[sent]
            sent += 1

    @property
    def nbytes(self) -> int:
        """Size of all payloads, until the push is `decided`."""
        size = self.compressor.format.encoded_size
        return sum(
            size(piece.stop - piece.start) for each in self.gradients.values() for piece in self._pieces(each.size)
        )

    def decided(self, *, taken: bool) -> None:
        """The server has all of the push, and took it in or refused it; the gradients are not needed any more."""
        for name, residual in self._residuals.items() if taken else ():
            self.compressor.spares[name] = self.compressor.residuals[name]
            self.compressor.residuals[name] = residual
        self._residuals = {}
        self.gradients = {}

    def _make(self) -> Iterator[Payload]:
        runs: list[Run] = []
        data: list[memoryview] = []
        room = CHUNK_BYTES
        for index, (name, gradient) in enumerate(self.gradients.items()):
            for run, encoded in self._encode(index, name, gradient.reshape(-1).astype(np.float32, copy=False)):
                if runs and encoded.nbytes > room:
                    yield Payload(runs, data)
                    runs, data, room = [], [], CHUNK_BYTES
                runs.append(run)
                data.append(encoded)
                room -= encoded.nbytes
        if runs:
            yield Payload(runs, data)

    def _encode(self, index: int, name: str, values: Floats) -> Iterator[tuple[Run, memoryview]]:
        """A tensor in pieces of whole blocks that fit a chunk."""
        encoder = codec(self.compressor.format)
        size = encoder.format.encoded_size
        old = new = None
        if encoder.format.error_feedback:
            old = _kept(self.compressor.residuals, name, values.size)
            new = self._residuals[name] = _kept(self.compressor.spares, name, values.size)
        for piece in self._pieces(values.size):
            out = np.empty(size(piece.stop - piece.start), np.uint8)
            encoder.encode(values[piece], None if old is None else old[piece], None if new is None else new[piece], out)
            yield Run(index, piece.start, piece.stop - piece.start), out.data

    def _pieces(self, count: int) -> Iterator[slice]:
        """Elements in whole blocks that fit a chunk."""
        step = max(1, CHUNK_BYTES // self.compressor.format.encoded_size(BLOCK)) * BLOCK
        return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


def _kept(arrays: dict[str, Floats], name: str, size: int) -> Floats:
    """The array of that name, zeros if it is new."""
    if name not in arrays:
        arrays[name] = np.zeros(size, np.float32)
    return arrays[name]
