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
    """The payloads of one push, made when they are first sent; what it leaves unsaid counts once it is `applied`."""

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

    def applied(self) -> None:
        """The server has taken the push in."""
        for name, residual in self._residuals.items():
            self.compressor.spares[name] = self.compressor.residuals[name]
            self.compressor.residuals[name] = residual
        self._residuals = {}

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
        step = max(1, CHUNK_BYTES // size(BLOCK)) * BLOCK
        for begin in range(0, values.size, step):
            piece = slice(begin, min(begin + step, values.size))
            out = np.empty(size(piece.stop - begin), np.uint8)
            encoder.encode(values[piece], None if old is None else old[piece], None if new is None else new[piece], out)
            yield Run(index, begin, piece.stop - begin), out.data


def _kept(arrays: dict[str, Floats], name: str, size: int) -> Floats:
    """The array of that name, zeros if it is new."""
    if name not in arrays:
        arrays[name] = np.zeros(size, np.float32)
    return arrays[name]
