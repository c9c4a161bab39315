"""Columns: the values that several pushes have for one element, as compiled loops take them, a block of columns at a time.

Each push lies in an array of its own; a loop has their addresses. It first copies what the pushes have for COLUMNS consecutive
elements into a block [pushes, COLUMNS], which stays in the cache, so that all that follows reads memory once, and runs along
rows, where it vectorises. The loops release the GIL and allocate nothing else.
"""

import functools
import typing
from typing import Any

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from optserve_server.engine.arena import ComputeType
from optserve_server.engine.loops import Loop
from optserve_server.engine.readers import pointer

COLUMNS = 256
TABLE_COLUMNS = 2  # first element and count


@functools.lru_cache(maxsize=16)
def comparators(size: int, first: int, last: int) -> NDArray[np.int64]:
    """Pairs of places, int64 [n, 2]: a column of `size` in which each pair in turn is put in order has the values `first`
    to `last` in the end that it had if it were sorted.

    Merge exchange (Batcher's odd-even merge sort for any size; Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M),
    without the comparators on which those places do not depend. It compares the same places whatever the values are, so that
    columns are sorted side by side, and in a time that no value changes.
    """
    pairs: list[tuple[int, int]] = []
    top = 1 << (size - 1).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    needed = set(range(first, last))
    kept = []
    for pair in reversed(pairs):
        if not needed.isdisjoint(pair):
            needed.update(pair)
            kept.append(pair)
    return np.array(kept[::-1], np.int64).reshape(-1, 2)


@functools.cache
def sorted_mean_loop(compute: ComputeType) -> Loop:
    """`mean(table, addresses, comparators, first, last, share, begun, target)`: `share` times the mean of a part of each
    column, once `comparators` have acted on it: of its values `first` to `last`. Written to the target, or once `begun` added.

    A row of `table`, int64 [n, TABLE_COLUMNS], is the first element and the count. What is compared is the order of all
    values that IEEE 754 has as `totalOrder`: −0 is below 0, and NaN beyond infinity, on the side of its sign. So equal
    values have equal bits, and the order of pushes changes no bit of what is sorted. Sums are in float64.
    """
    value, itemsize = compute.type, compute.itemsize
    integer = np.dtype(f"i{itemsize}").type
    sign, magnitude = integer(8 * itemsize - 1), integer(np.iinfo(integer).max)

    @njit(error_model="numpy")
    def flipped(bits: Any) -> Any:
        """An integer that orders as the value of these bits does; and back."""
        return integer(bits ^ integer((bits >> sign) & magnitude))

    @njit(error_model="numpy")
    def put_in_order(x: Any, y: Any) -> None:
        for i in range(x.size):
            left, right = x[i], y[i]
            x[i] = min(left, right)
            y[i] = max(left, right)

    def mean(
        table: Any, addresses: Any, comparators: Any, first: Any, last: Any, share: Any, begun: Any, target: Any
    ) -> None:
        block, sums = np.empty((len(addresses), COLUMNS), integer), np.empty(COLUMNS, np.float64)
        for r in range(len(table)):
            end = table[r, 0] + table[r, 1]
            for begin in range(table[r, 0], end, COLUMNS):
                count = min(COLUMNS, end - begin)
                for push in range(len(addresses)):
                    source = carray(pointer(addresses[push] + begin * itemsize, integer), count)
                    row = block[push]
                    for i in range(count):
                        row[i] = flipped(source[i])
                for c in range(len(comparators)):
                    put_in_order(block[comparators[c, 0], :count], block[comparators[c, 1], :count])
                sums[:] = 0
                for place in range(first, last):
                    row = block[place]
                    for i in range(count):
                        sums[i] += integer(flipped(row[i])).view(value)
                result = target[begin : begin + count]
                if begun:
                    for i in range(count):
                        result[i] += share * (sums[i] / (last - first))
                else:
                    for i in range(count):
                        result[i] = share * (sums[i] / (last - first))

    return typing.cast(Loop, njit(nogil=True, error_model="numpy")(mean))


@functools.cache
def distances_loop(compute: ComputeType) -> Loop:
    """`distances(units, bounds, table, addresses, sums)`: add up squared differences of every two pushes, in float64.

    Unit u has the rows `bounds[u]` to `bounds[u + 1]` of `table`, int64 [n, TABLE_COLUMNS], and row u of `sums`, float64
    [units, pairs], with the pairs (1, 0), (2, 0), (2, 1), (3, 0), ...; a row of `units`, int64 [n, 2], is a first unit and a
    count. The compiler may reassociate sums over COLUMNS elements; everything else is added in order.
    """
    value, itemsize = compute.type, compute.itemsize

    @njit(error_model="numpy", fastmath={"reassoc"})
    def distance(x: Any, y: Any) -> Any:
        total = 0.0
        for i in range(x.size):
            difference = x[i] - y[i]
            total += difference * difference
        return total

    def distances(units: Any, bounds: Any, table: Any, addresses: Any, sums: Any) -> None:
        block = np.empty((len(addresses), COLUMNS), np.float64)
        for part in range(len(units)):
            for unit in range(units[part, 0], units[part, 0] + units[part, 1]):
                for r in range(bounds[unit], bounds[unit + 1]):
                    end = table[r, 0] + table[r, 1]
                    for begin in range(table[r, 0], end, COLUMNS):
                        count = min(COLUMNS, end - begin)
                        for push in range(len(addresses)):
                            source = carray(pointer(addresses[push] + begin * itemsize, value), count)
                            row = block[push]
                            for i in range(count):
                                row[i] = source[i]
                        pair = 0
                        for i in range(len(addresses)):
                            for j in range(i):
                                sums[unit, pair] += distance(block[i, :count], block[j, :count])
                                pair += 1

    return typing.cast(Loop, njit(nogil=True, error_model="numpy")(distances))
