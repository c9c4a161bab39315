"""Decoding on arrival, of what loops can't read as it travels: top-k, compiled, without the GIL, and wary of what it reads."""

import functools
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from optserve._errors import InvalidChunk
from optserve._specification import BLOCK
from optserve.formats import TopK

_compile = functools.partial(njit, nogil=True, error_model="numpy")


def decode_top_k(format: TopK, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """`encoded_size(n)` bytes to float32 [n]; raises InvalidChunk for what can't be decoded."""
    out.fill(0)
    wrong = _top_k_loop()(data, out, format.kept(BLOCK), format.kept(out.size % BLOCK))
    if wrong >= 0:
        raise InvalidChunk(
            f"expected ascending indices within each run of {BLOCK} elements; run {wrong} of this segment has others"
        )


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
