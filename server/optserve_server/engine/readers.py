"""Readers: elements where they were received, as compiled loops see them, at most BLOCK at a time.

`read(address, skip, count, buffer)` gives `count` elements of those at an address, after the first `skip`, as an array of
`bits(dtype)`, for which `decoder(dtype)` is meant. Most are seen where they lie; int8, whose scales lie between them, is
decoded into the buffer, `buffer()`, which stays in the cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from optserve._dtypes import DType
from optserve._specification import BLOCK
from optserve.formats import Int8
from optserve_server.engine.formats import INT8, bits

_INT8_BLOCK = Int8.block
_RECORD = Int8().record_size(Int8.block)  # bytes: a scale, and the elements of a block
_SCALE = Int8().record_size(0)

Read = Callable[..., Any]


@intrinsic
def pointer(typing_context: Any, address: Any, dtype: Any) -> Any:
    """An integer address as a typed pointer, inside compiled code."""
    target = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(target))

    return target(address, dtype), generate


def reader(dtype: DType) -> tuple[Read, Callable[[], Any]]:
    """`read` and `buffer` for a dtype, to be called in compiled code."""
    if dtype is INT8:
        return _read_int8, _block
    element = bits(dtype).type
    itemsize = dtype.itemsize

    @njit(error_model="numpy")
    def read(address: Any, skip: Any, count: Any, buffer: Any) -> Any:
        return carray(pointer(address + skip * itemsize, element), count)

    return read, _nothing


@njit(error_model="numpy")
def _read_int8(address: Any, skip: Any, count: Any, buffer: Any) -> Any:
    done = 0
    while done < count:
        record = address + (skip + done) // _INT8_BLOCK * _RECORD
        begin = (skip + done) % _INT8_BLOCK
        size = min(_INT8_BLOCK - begin, count - done)
        scale = carray(pointer(record, np.float32), 1)[0]
        source = carray(pointer(record + _SCALE + begin, np.int8), size)
        target = buffer[done : done + size]
        for i in range(size):
            target[i] = np.float32(source[i]) * scale
        done += size
    return buffer[:count]


@njit(error_model="numpy")
def _block() -> Any:
    return np.empty(BLOCK, np.float32)


@njit(error_model="numpy")
def _nothing() -> Any:
    return None
