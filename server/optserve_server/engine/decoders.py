"""Decoders of what pushed elements may travel as: compiled, without the GIL, and wary of what they read.

The formats are defined in `optserve.formats`; those that updates can read as they travel need no decoder.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from optserve._errors import InvalidChunk
from optserve._specification import BLOCK
from optserve.formats import Format, Int8, TopK

Decode = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]

_compile = functools.partial(njit, nogil=True, error_model="numpy")


def decoder_of(format: Format) -> Decode:
    """`decode(data, out)`: `encoded_size(n)` bytes to float32 [n]; raises InvalidChunk for what cannot be decoded."""
    if isinstance(format, Int8):
        return _decode_int8
    assert isinstance(format, TopK)
    return functools.partial(_decode_top_k, format)


def _decode_int8(data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    blocks = -(-out.size // Int8.block)
    scales = np.empty(blocks, np.float32)
    for k in range(4):  # records are not aligned
        scales.view(np.uint8).reshape(-1, 4)[:, k] = data[k :: Int8.block + 4][:blocks]
    _int8_loop()(data.view(np.int8), scales, out)


def _decode_top_k(format: TopK, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    out.fill(0)
    wrong = _top_k_loop()(data, out, format.kept(BLOCK), format.kept(out.size % BLOCK))
    if wrong >= 0:
        raise InvalidChunk(
            f"expected ascending indices within each run of {BLOCK} elements; run {wrong} of this segment has others"
        )


@functools.cache
def _int8_loop() -> Any:
    block = Int8.block

    def decode(data: Any, scales: Any, out: Any) -> None:
        for b in range(scales.size):
            begin, scale = b * block, scales[b]
            count = min(block, out.size - begin)
            source = data[begin + 4 * (b + 1) : begin + 4 * (b + 1) + count]
            target = out[begin : begin + count]
            for i in range(count):
                target[i] = np.float32(source[i]) * scale

    return _compile(decode)


@functools.cache
def _top_k_loop() -> Any:
    def decode(data: Any, out: Any, kept: Any, kept_of_last: Any) -> Any:
        bits = out.view(np.uint32)
        position = block = 0
        for begin in range(0, out.size, BLOCK):
            count = min(BLOCK, out.size - begin)
            k = kept if count == BLOCK else kept_of_last
            before = np.int64(-1)
            for j in range(k):
                low, high = data[position + 2 * j], data[position + 2 * j + 1]
                index = np.int64(low) | np.int64(high) << 8
                if index <= before or index >= count:
                    return block
                before = index
                value = np.uint32(0)
                for b in range(4):
                    value |= np.uint32(data[position + 2 * k + 4 * j + b]) << np.uint32(8 * b)
                bits[begin + index] = value
            position, block = position + 6 * k, block + 1
        return -1

    return _compile(decode)
