"""Threads over ranges: one table of work, cut into equal parts."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ranges = NDArray[np.int64]

COUNT = 1  # column of a table that holds the number of elements
CACHE_LINE = 64  # elements: parts begin at cache lines where tensors do
SHARES = 8  # parts for each thread
STRIP = 1 << 15  # elements: of each array that a loop visits, this many at a time stay in the cache
MANY_ROWS = 1 << 12  # of a table: beyond, it is cut between rows, if none is longer than a part
INLINE = 1 << 18  # elements: below this a hand-over to another thread costs more than it saves


class Threads:
    """A pool for compiled loops, shared by all parameter sets. Elementwise loops give the same bits for any split."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self.count - 1, "optserve-loop") if self.count > 1 else None

    def run(
        self,
        loop: Callable[..., Any],
        table: Ranges,
        addresses: dict[int, int],
        *arguments: Any,
        grain: int = CACHE_LINE,
        inline: int | None = None,
    ) -> None:
        """Run `loop(part, *arguments)` over the table, in parallel unless it has fewer than `inline` elements (INLINE).

        Column 0 of a row is its first element, column 1 its number of elements. `addresses` says which columns advance
        along a row that is cut, and by how many bytes an element. Cuts are at multiples of `grain` elements.
        """
        if self._pool is None or _size(table) < (INLINE if inline is None else inline):
            loop(table, *arguments)
        else:
            self._share(loop, split(table, addresses, self.count * SHARES, grain), arguments)

    def run_in_order(
        self,
        loop: Callable[..., Any],
        table: Ranges,
        addresses: dict[int, int],
        *arguments: Any,
        inline: int | None = None,
    ) -> None:
        """As `run`, for a table whose rows may name an element several times: its rows then act on it in their order."""
        if self._pool is None or _size(table) < (INLINE if inline is None else inline):
            loop(table, *arguments)
        else:
            self._share(loop, split_in_order(table, addresses, self.count * SHARES), arguments)

    def _share(self, loop: Callable[..., Any], parts: Sequence[Ranges], arguments: tuple[Any, ...]) -> None:
        """Every thread takes the next part until none is left, so that one that starts late holds nobody up."""
        assert self._pool is not None
        left = iter(parts)

        def take() -> None:
            for part in left:
                loop(part, *arguments)

        futures = [self._pool.submit(take) for _ in range(self.count - 1)]
        try:
            take()
        finally:
            running = [future for future in futures if not future.cancel()]
            wait(running)
        for future in running:
            future.result()

    def close(self) -> None:
        """Wait for the running loops and end the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _size(table: Ranges) -> int:
    return int(table[0, COUNT]) if len(table) == 1 else int(table[:, COUNT].sum())


def split(table: Ranges, addresses: dict[int, int], parts: int, grain: int = CACHE_LINE) -> list[Ranges]:
    """Cut a table's rows into at most about `parts` tables of equally many elements; see `Threads.run`."""
    share = -(-_size(table) // (parts * grain)) * grain
    if len(table) > MANY_ROWS and int(table[:, COUNT].max()) <= share:  # such as the rows of an embedding
        return np.array_split(table, parts)
    pieces: list[list[list[int]]] = [[]]
    room = share
    for row in table.tolist():
        while row[COUNT] > room:
            if room := room // grain * grain:
                pieces[-1].append([*row[:COUNT], room, *row[COUNT + 1 :]])
                row[0] += room
                row[COUNT] -= room
                for column, itemsize in addresses.items():
                    row[column] += room * itemsize
            pieces.append([])
            room = share
        pieces[-1].append(row)
        room -= row[COUNT]
    return [np.array(rows, np.int64) for rows in pieces if rows]


def split_in_order(table: Ranges, addresses: dict[int, int], parts: int) -> list[Ranges]:
    """Cut a table at every STRIP elements of the arena, and gather the rows of each strip, in order, in one part."""
    starts, ends = table[:, 0], table[:, 0] + table[:, COUNT]
    first_strips = starts // STRIP
    counts = -(-ends // STRIP) - first_strips
    row = np.repeat(np.arange(len(table)), counts)
    strip = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + first_strips[row]
    pieces = table[row]
    pieces[:, 0] = np.maximum(starts[row], strip * STRIP)
    pieces[:, COUNT] = np.minimum(ends[row], (strip + 1) * STRIP) - pieces[:, 0]
    for column, itemsize in addresses.items():
        pieces[:, column] += (pieces[:, 0] - starts[row]) * itemsize
    order = np.argsort(strip, kind="stable")
    pieces, strip = pieces[order], strip[order]
    done = np.cumsum(pieces[:, COUNT])
    cuts = np.searchsorted(done, done[-1] * np.arange(1, parts) / parts)
    cuts = np.searchsorted(strip, strip[cuts])  # back to where that strip begins
    return [part for part in np.split(pieces, cuts) if len(part)]
