"""The codecs as compiled loops: one pass over memory, without the GIL, and the same bits as those of `_codecs`.

Numba widens integer expressions to 64 bits; each is narrowed back to keep the loops at 32 bits a lane. Arithmetic follows
IEEE 754 to the letter (no fastmath, no contraction). Records are written where they lie; x86-64 and ARM64 load and store
unaligned elements.
"""

import functools
from typing import Any

import numpy as np
from numba import njit

from optserve import _codecs
from optserve._codecs import LARGEST_SCALE, NAN, SMALLEST_SCALE, Bytes, Codecs, Floats
from optserve.formats import BFloat16, Float16, Int8, TopK

_compile = functools.partial(njit, nogil=True, error_model="numpy")

# The parts of a binary32, and what separates it from a binary16.
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_QUIET_NAN = np.uint32(0x7FC00000)
_HALF_INFINITY = np.uint32(0x0F800000)  # a binary16 infinity moved to binary32's mantissa position
_REBIAS = np.float32(2.0**112)  # 127 - 15 binades
_HALF_BIAS = np.uint32(0x37FFF001)  # 112 binades, less what rounds to nearest when 13 bits are cut off
_HALF_OVERFLOW = np.uint32(0x47800000)  # 65536, past the largest binary16
_HALF_NORMAL = np.uint32(0x38800000)  # 2^-14, the smallest normal binary16
_DENORMAL_MAGIC = np.float32(0.5)  # adding it leaves a denormal binary16 in the low mantissa bits
_DENORMAL_MAGIC_BITS = np.uint32(0x3F000000)

_LARGEST_INVERSE = np.float32(1 / SMALLEST_SCALE)


class BFloat16Codec(_codecs.BFloat16Codec):
    """The upper 16 bits, rounded."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        _encode_bfloat16(values, out)

    def _decode(self, data: Bytes, out: Floats) -> None:
        _decode_bfloat16(data, out)


class Float16Codec(_codecs.Float16Codec):
    """Bit operations, since Numba has no half precision on the CPU."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        _encode_float16(values, out)

    def _decode(self, data: Bytes, out: Floats) -> None:
        _decode_float16(data, out)


class Int8Codec(_codecs.Int8Codec):
    """Each block is read, scaled and rounded while it is in the cache."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        _encode_int8(values, residual, new_residual, out)


class TopKCodec(_codecs.TopKCodec):
    """Each block is searched for the smallest magnitude to keep, bit by bit."""

    def _encode(self, values: Floats, residual: Floats | None, new_residual: Floats | None, out: Bytes) -> None:
        _encode_top_k(values, residual, new_residual, out)


CODECS: Codecs = {BFloat16: BFloat16Codec, Float16: Float16Codec, Int8: Int8Codec, TopK: TopKCodec}


@_compile
def _bits(x: Any) -> Any:
    return np.float32(x).view(np.uint32)


@_compile
def _value(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@_compile
def _magnitude(x: Any) -> Any:
    """The bits of |x|, which are ordered as the magnitudes are, NaN above infinity."""
    return np.uint32(_bits(x) & ~_SIGN)


@_compile
def _encode_bfloat16(values: Any, out: Any) -> None:
    source, target = values.reshape(-1), out.reshape(-1).view(np.uint16)
    for i in range(source.size):
        bits = _bits(source[i])
        odd = np.uint32(np.uint32(bits >> 16) & np.uint32(1))
        rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
        if _magnitude(source[i]) > _INFINITY:
            rounded = _QUIET_NAN
        target[i] = np.uint16(rounded >> 16)


@_compile
def _decode_bfloat16(data: Any, out: Any) -> None:
    source, target = data.reshape(-1).view(np.uint16), out.reshape(-1)
    for i in range(target.size):
        target[i] = _value(np.uint32(source[i]) << 16)


@_compile
def _encode_float16(values: Any, out: Any) -> None:
    source, target = values.reshape(-1), out.reshape(-1).view(np.uint16)
    for i in range(source.size):
        sign = np.uint32(np.uint32(_bits(source[i]) >> 16) & np.uint32(0x8000))
        magnitude = _magnitude(source[i])
        odd = np.uint32(np.uint32(magnitude >> 13) & np.uint32(1))
        half = np.uint32(np.uint32(magnitude - _HALF_BIAS + odd) >> 13)
        if magnitude < _HALF_NORMAL:
            half = np.uint32(_bits(_value(magnitude) + _DENORMAL_MAGIC) - _DENORMAL_MAGIC_BITS)
        if magnitude >= _HALF_OVERFLOW:
            half = np.uint32(0x7C00)
        target[i] = np.uint16(0x7E00 if magnitude > _INFINITY else sign | half)


@_compile
def _decode_float16(data: Any, out: Any) -> None:
    source, target = data.reshape(-1).view(np.uint16), out.reshape(-1)
    for i in range(target.size):
        bits = np.uint32(source[i])
        sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << 16)
        magnitude = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << 13)
        scaled = _bits(_value(magnitude) * _REBIAS)
        if magnitude >= _HALF_INFINITY:
            scaled = _INFINITY
        target[i] = NAN if magnitude > _HALF_INFINITY else _value(sign | scaled)


@_compile
def _encode_int8(values: Any, residual: Any, new_residual: Any, out: Any) -> None:
    rows, size = values.shape
    x = np.empty(size, np.float32)
    for row in range(rows):
        largest = np.uint32(0)
        for i in range(size):
            x[i] = values[row, i] if residual is None else values[row, i] + residual[row, i]
            largest = max(largest, _magnitude(x[i]))
        scale, inverse = _scale(largest)
        if np.isnan(scale):
            x[:] = 0
        out[row, :4].view(np.float32)[0] = scale
        for i in range(size):
            quantized = np.int32(np.rint(x[i] * inverse))
            out[row, 4 + i] = np.uint8(quantized)
            if new_residual is not None:
                new_residual[row, i] = x[i] - np.float32(quantized) * scale


@_compile
def _scale(largest: Any) -> Any:
    """Scale, and what to multiply by, of a block whose largest magnitude has these bits."""
    if largest == 0:
        return np.float32(0), np.float32(0)
    if largest >= _INFINITY:
        return NAN, np.float32(0)
    m = _value(largest)
    scale = min(max(m / np.float32(127), SMALLEST_SCALE), LARGEST_SCALE)
    return scale, min(np.float32(127) / m, _LARGEST_INVERSE)


@_compile
def _encode_top_k(values: Any, residual: Any, new_residual: Any, out: Any) -> None:
    (rows, size), kept = values.shape, out.shape[1] // 6
    x = np.empty(size, np.float32)
    magnitudes = np.empty(size, np.int32)
    chosen = np.empty(size, np.uint16)
    for row in range(rows):
        for i in range(size):
            value = values[row, i] if residual is None else values[row, i] + residual[row, i]
            x[i] = NAN if np.isnan(value) else value
            magnitudes[i] = np.int32(_magnitude(x[i]))
            if new_residual is not None:
                new_residual[row, i] = x[i]
        _choose(magnitudes, kept, chosen)
        indices = out[row, : 2 * kept].view(np.uint16)
        elements = out[row, 2 * kept :].view(np.float32)
        for j in range(kept):
            indices[j] = chosen[j]
            elements[j] = x[chosen[j]]
            if new_residual is not None:
                new_residual[row, chosen[j]] = 0


@_compile
def _choose(magnitudes: Any, kept: Any, chosen: Any) -> None:
    """Write the ascending indices of the `kept` largest to the front of `chosen`; changes the magnitudes."""
    threshold = _threshold(magnitudes, kept)
    surplus = _at_least(threshold, magnitudes) - kept
    i = magnitudes.size
    while surplus > 0:  # of equal magnitudes the last ones stay behind
        i -= 1
        if magnitudes[i] == threshold:
            magnitudes[i] = -1
            surplus -= 1
    j = 0
    for i in range(magnitudes.size):
        chosen[j] = i  # without a branch, which would be mispredicted; overwritten unless i is chosen
        j += magnitudes[i] >= threshold


@_compile
def _threshold(magnitudes: Any, kept: Any) -> Any:
    """The largest number that at least `kept` magnitudes reach, or a smaller one that no more reach."""
    threshold = np.int32(0)
    for bit in range(30, -1, -1):
        candidate = np.int32(threshold | np.int32(1 << bit))
        reached = _at_least(candidate, magnitudes)
        if reached >= kept:
            threshold = candidate
        if reached == kept:
            break
    return threshold


@_compile
def _at_least(threshold: Any, magnitudes: Any) -> Any:
    count = np.int32(0)
    for i in range(magnitudes.size):
        count = np.int32(count + np.int32(magnitudes[i] >= threshold))
    return count
