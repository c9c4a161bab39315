"""Work is cut without losing, doubling or reordering an element."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optserve_server.engine.threads import Ranges, Threads, split

ITEMSIZE = 4


def table_of(counts: list[int]) -> Ranges:
    starts = np.cumsum([0, *counts])[:-1]
    rows = [[start, count, 1000 + start * ITEMSIZE] for start, count in zip(starts, counts, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 3)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20), st.integers(1, 8), st.sampled_from([64, 4096]))
def test_a_split_keeps_every_element_in_order_with_its_address(counts: list[int], parts: int, grain: int) -> None:
    pieces = split(table_of(counts), {2: ITEMSIZE}, parts, grain)
    rows = [row for piece in pieces for row in piece.tolist()]
    position = 0
    for start, count, address in rows:
        assert count > 0
        assert start == position
        assert address == 1000 + start * ITEMSIZE
        position += count
    assert position == sum(counts)
    ends = {int(end) for end in np.cumsum(counts)}
    begins = {0, *ends}
    for start, count, _ in rows:  # every cut within a row is at a multiple of the grain from the row's begin
        if start + count not in ends:
            assert (start + count - max(begin for begin in begins if begin <= start)) % grain == 0


@given(st.integers(1, 200_000), st.integers(1, 4))
def test_running_in_parallel_touches_every_element_once(count: int, threads: int) -> None:
    touched = np.zeros(count, np.int64)

    def loop(table: Ranges, target: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        for start, size, _ in table.tolist():
            target[start : start + size] += 1

    pool = Threads(threads)
    pool.run(loop, table_of([count]), {2: ITEMSIZE}, touched, inline=1)
    pool.close()
    assert (touched == 1).all()
