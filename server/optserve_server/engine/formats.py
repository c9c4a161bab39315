"""Element formats in memory and on the wire, as compiled scalar functions: decoded and encoded inside the loops.

Numba has no half-precision arithmetic on the CPU, so bfloat16 and float16 are taken apart as bits. Numba widens integer
expressions to 64 bits; each is narrowed back to keep the loops at 32 bits a lane.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import njit

from optserve._dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType

# What Int8 (`optserve.formats`) travels as: float32 to those who read it (`readers`).
INT8 = DType("int8", np.dtype(np.int8), FLOAT32.compute)

Scalar = Callable[[Any], Any]

# The three parts of a binary32, and what separates it from a binary16.
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_QUIET_NAN = np.uint32(0x7FC00000)
_HALF_INFINITY = np.uint32(0x0F800000)  # a binary16 infinity moved to binary32's mantissa position
_REBIAS = np.uint32(112 << 23)  # 127 - 15 binades
_HALF_LEAST_NORMAL = np.uint32(0x0400)  # as a binary16
_HALF_SPACING = np.float32(2.0**-24)  # of denormal binary16s
_HALF_OVERFLOW = np.uint32(0x47800000)  # 65536, past the largest binary16
_HALF_NORMAL = np.uint32(0x38800000)  # 2^-14, the smallest normal binary16
_DENORMAL_MAGIC = np.float32(0.5)  # adding it leaves a denormal binary16 in the low mantissa bits
_DENORMAL_MAGIC_BITS = np.uint32(0x3F000000)


@njit(error_model="numpy")
def _same(x: Any) -> Any:
    return x


@njit(error_model="numpy")
def _decode_bfloat16(x: Any) -> Any:
    return np.uint32(np.uint32(x) << 16).view(np.float32)


@njit(error_model="numpy")
def _encode_bfloat16(x: Any) -> Any:
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> 16) & np.uint32(1)))
    if np.uint32(bits & ~_SIGN) > _INFINITY:
        rounded = np.uint32(bits | _QUIET_NAN)
    return np.uint16(rounded >> 16)


@njit(error_model="numpy")
def _decode_float16(x: Any) -> Any:
    bits = np.uint32(x)
    half = np.uint32(bits & np.uint32(0x7FFF))
    magnitude = np.uint32(half << 13)
    scaled = np.uint32(magnitude + _REBIAS)
    if half < _HALF_LEAST_NORMAL:  # by no denormal binary32, which updates would take for zero
        scaled = np.float32(np.float32(np.int32(half)) * _HALF_SPACING).view(np.uint32)
    if magnitude >= _HALF_INFINITY:
        scaled = np.uint32(magnitude | _INFINITY)
    return np.uint32(scaled | np.uint32(np.uint32(bits & np.uint32(0x8000)) << 16)).view(np.float32)


@njit(error_model="numpy")
def _encode_float16(x: Any) -> Any:
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & ~_SIGN)
    odd = np.uint32(np.uint32(magnitude >> 13) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude - np.uint32(0x37FFF001) + odd) >> 13)  # rebias by -112 binades, add 0xFFF
    denormal = np.uint32(
        np.float32(magnitude.view(np.float32) + _DENORMAL_MAGIC).view(np.uint32) - _DENORMAL_MAGIC_BITS
    )
    half = denormal if magnitude < _HALF_NORMAL else normal
    if magnitude >= _HALF_OVERFLOW:
        half = np.uint32(0x7E00) if magnitude > _INFINITY else np.uint32(0x7C00)
    return np.uint16(half | np.uint32(np.uint32(bits >> 16) & np.uint32(0x8000)))


_DECODERS = {INT8: _same, FLOAT32: _same, FLOAT64: _same, BFLOAT16: _decode_bfloat16, FLOAT16: _decode_float16}
_ENCODERS = {FLOAT32: _same, FLOAT64: _same, BFLOAT16: _encode_bfloat16, FLOAT16: _encode_float16}


def decoder(dtype: DType) -> Scalar:
    """Compiled function from an element's bits (see `bits`) to its value in the dtype's compute type."""
    return cast(Scalar, _DECODERS[dtype])


def encoder(dtype: DType) -> Scalar:
    """Compiled function from a value to its element's bits, rounded to nearest even."""
    return cast(Scalar, _ENCODERS[dtype])


def bits(dtype: DType) -> np.dtype[Any]:
    """The NumPy type through which loops see an element's memory: unsigned integers for half precision."""
    if dtype is INT8:
        return dtype.compute
    return np.dtype(np.uint16) if dtype.itemsize == 2 else dtype.storage
