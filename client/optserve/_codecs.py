"""Encoding into wire formats and back, with NumPy alone; `codec` prefers the compiled loops, which write the same bits.

The formats and their records are defined in `optserve.formats`.
"""

import abc
import functools
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from optserve.formats import BFloat16, Float16, Format, Int8, TopK

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NAN = np.float32(np.nan)  # the quiet one, 0x7FC00000; arithmetic may give others, which differ between machines

# Of Int8. The inverse of a smaller scale overflows, as does 127 times a larger one.
SMALLEST_SCALE = np.float32(2.0**-126)
LARGEST_SCALE = np.float32(float.fromhex("0x1.020406p+121"))


class Codec(abc.ABC):
    """Writes and reads the records of a format, for pieces of a tensor that start at a multiple of BLOCK elements."""

    def __init__(self, format: Format) -> None:
        self.format = format

    def encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        """Write `values`, plus `residual` if given, as `encoded_size(n)` bytes; what they lack goes to `new_residual` if given.

        Floats are float32 [n], all arrays C-contiguous; the two residuals may be one array. Formats without error feedback
        use neither.
        """
        for elements, records, rows in self._rows(values.size):
            self._encode(
                values[elements].reshape(rows, -1),
                None if residual is None else residual[elements].reshape(rows, -1),
                None if new_residual is None else new_residual[elements].reshape(rows, -1),
                out[records].reshape(rows, -1),
            )

    def decode(self, data: Bytes, out: Floats) -> None:
        """Read `encoded_size(n)` bytes into `out`, float32 [n]; both C-contiguous."""
        for elements, records, rows in self._rows(out.size):
            self._decode(data[records].reshape(rows, -1), out[elements].reshape(rows, -1))

    def _rows(self, count: int) -> Iterator[tuple[slice, slice, int]]:
        """The whole blocks, then the shorter last one: where their elements and records lie, and how many they are."""
        blocks, rest = divmod(count, self.format.block)
        whole, size = count - rest, self.format.encoded_size
        if blocks:
            yield slice(0, whole), slice(0, size(whole)), blocks
        if rest:
            yield slice(whole, count), slice(size(whole), size(count)), 1

    @abc.abstractmethod
    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        """As `encode`, with one block in each row: floats are [rows, n], `out` is [rows, record_size(n)]."""

    @abc.abstractmethod
    def _decode(self, data: Bytes, out: Floats) -> None:
        """As `decode`, with one block in each row."""


class BFloat16Codec(Codec):
    """The upper 16 bits, rounded."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded[np.isnan(values)] = 0x7FC0
        out.view("<u2")[...] = rounded

    def _decode(self, data: Bytes, out: Floats) -> None:
        np.left_shift(data.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


class Float16Codec(Codec):
    """NumPy's own conversion."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            half = values.astype("<f2")
        half[np.isnan(half)] = NAN
        out.view("<f2")[...] = half

    def _decode(self, data: Bytes, out: Floats) -> None:
        with np.errstate(invalid="ignore"):
            out[...] = data.view("<f2")
        out[np.isnan(out)] = NAN


class Int8Codec(Codec):
    """A record is the scale, float32, then the elements, int8."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        x = _corrected(values, residual)
        largest = np.abs(x).max(axis=1, keepdims=True)
        finite = np.isfinite(largest)
        with np.errstate(all="ignore"):
            scale = np.clip(largest / 127, SMALLEST_SCALE, LARGEST_SCALE)
            scale[largest == 0], scale[~finite] = 0, NAN
            steps = np.rint(x * np.minimum(127 / largest, 1 / SMALLEST_SCALE))
            quantized = np.where(finite, steps, 0).astype(np.int8)
            lost = x - quantized * scale
        out[:, :4].view("<f4")[...] = scale
        out[:, 4:].view(np.int8)[...] = quantized
        if new_residual is not None:
            new_residual[...] = np.where(finite, lost, NAN)

    def _decode(self, data: Bytes, out: Floats) -> None:
        np.multiply(data[:, 4:].view(np.int8), data[:, :4].view("<f4"), out=out)


class TopKCodec(Codec):
    """A record is the indices, uint16, then the values, float32: 6 bytes for each element that is kept."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        kept = out.shape[1] // 6
        corrected = _corrected(values, residual)
        for row, x in enumerate(np.where(np.isnan(corrected), NAN, corrected)):
            chosen = _largest(x, kept)
            out[row, : 2 * kept].view("<u2")[...] = chosen
            out[row, 2 * kept :].view("<f4")[...] = x[chosen]
            if new_residual is not None:
                new_residual[row] = x
                new_residual[row, chosen] = 0

    def _decode(self, data: Bytes, out: Floats) -> None:
        kept = data.shape[1] // 6
        out[...] = 0
        for row, record in enumerate(data):
            out[row, record[: 2 * kept].view("<u2")] = record[2 * kept :].view("<f4")


def _corrected(values: Floats, residual: Floats | None) -> Floats:
    """What is to be encoded, overflow included."""
    if residual is None:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return values + residual


def _largest(x: Floats, kept: int) -> NDArray[np.int64]:
    """Ascending indices of the `kept` largest magnitudes of float32 [n], the first ones among equals."""
    magnitudes = (x.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
    last = x.size - 1
    keys = magnitudes * x.size + np.arange(last, -1, -1)  # no two are equal, and among equals the first is the largest
    return np.sort(last - np.partition(keys, -kept)[-kept:] % x.size)


Codecs = Mapping[type[Format], type[Codec]]

CODECS: Codecs = {BFloat16: BFloat16Codec, Float16: Float16Codec, Int8: Int8Codec, TopK: TopKCodec}


def codec(format: Format) -> Codec:
    """The codec of a format: compiled if Numba is installed (`optserve[fast]`)."""
    return _fastest()[type(format)](format)


@functools.cache
def _fastest() -> Codecs:
    try:
        from optserve import _codecs_compiled
    except ImportError:
        return CODECS
    return _codecs_compiled.CODECS
