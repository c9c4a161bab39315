"""Staging: whatever the chunks, the same tensor, norm and digest; what is wrong is refused."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve import InvalidChunk, NonFiniteValue, TensorSpec
from optserve._specification import BLOCK, Run
from optserve_server.engine.staging import Staging
from optserve_server.engine.threads import Threads

THREADS = Threads(1)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def stage(array: np.ndarray[Any, Any], cuts: list[int], order: list[int] | None = None) -> Staging:
    """An array of one dimension, staged in runs between the cuts, each run a chunk of its own."""
    staging = Staging([TensorSpec.of("x", array)], THREADS)
    edges = sorted({0, array.size, *(cut for cut in cuts if 0 < cut < array.size)})
    runs = [Run(0, begin, end - begin) for begin, end in itertools.pairwise(edges)]
    for index in order or range(len(runs)):
        run = runs[index % len(runs)]
        staging.add([run], array[run.offset : run.offset + run.size].view(np.uint8))
    return staging


def staged_elements(staging: Staging, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    (tensor,) = staging.tensors
    return np.concatenate([staging._gather(tensor, k) for k in range(-(-array.size // BLOCK))]).view(array.dtype)


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    size = draw(st.integers(1, 5 * BLOCK))
    dtype = draw(st.sampled_from(DTYPES))
    return np.random.default_rng(draw(st.integers(0, 1000))).normal(size=size).astype(dtype)


@given(tensors(), st.lists(st.integers(1, 5 * BLOCK), max_size=8), st.randoms())
def test_the_result_does_not_depend_on_chunks_or_their_order(array: Any, cuts: list[int], random: Any) -> None:
    pieces = len({0, array.size, *(cut for cut in cuts if 0 < cut < array.size)}) - 1
    order = list(range(pieces))
    random.shuffle(order)
    whole, cut = stage(array, []), stage(array, cuts, order)
    whole.finish()
    cut.finish()
    np.testing.assert_array_equal(staged_elements(cut, array).view(np.uint8), array.view(np.uint8))
    assert cut.norm(0) == whole.norm(0)
    assert cut.digest() == whole.digest()
    assert whole.norm(0) == pytest.approx(float(np.linalg.norm(array.astype(np.float64))), rel=1e-12)


@given(tensors(), st.data())
def test_the_digest_tells_one_flipped_bit(array: Any, data: st.DataObject) -> None:
    other = array.copy()
    words = other.view(np.uint8)
    words[data.draw(st.integers(0, words.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    one, two = stage(array, []), stage(other, [])
    try:
        one.finish()
        two.finish()
    except NonFiniteValue:
        return
    assert one.digest() != two.digest()


@given(tensors(), st.data())
def test_the_digest_tells_flipped_signs(array: Any, data: st.DataObject) -> None:
    flipped = data.draw(st.lists(st.integers(0, array.size - 1), min_size=1, max_size=6, unique=True))
    array[array == 0] = 1
    other = array.copy()
    other[flipped] = -other[flipped]
    one, two = stage(array, []), stage(other, [])
    one.finish()
    two.finish()
    assert one.digest() != two.digest()
    assert one.norm(0) == two.norm(0)


@given(tensors(), st.data())
def test_a_segment_may_be_replaced_explicitly(array: Any, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, array.size - 1))
    end = data.draw(st.integers(begin + 1, array.size))
    first = array.copy()
    first[begin:end] = 7
    staging = stage(first, [array.size // 3])
    staging.add([Run(0, begin, end - begin)], array[begin:end].view(np.uint8), replace=True)
    staging.finish()
    expected = stage(array, [])
    expected.finish()
    np.testing.assert_array_equal(staged_elements(staging, array).view(np.uint8), array.view(np.uint8))
    assert (staging.norm(0), staging.digest()) == (expected.norm(0), expected.digest())


@given(tensors(), st.data(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_value_that_is_not_finite_is_found_wherever_it_is(array: Any, data: st.DataObject, value: float) -> None:
    position = data.draw(st.integers(0, array.size - 1))
    array[position] = value
    staging = stage(array, data.draw(st.lists(st.integers(1, array.size), max_size=3)))
    with pytest.raises(NonFiniteValue, match=rf"'x'.*got {value} at index \[{position}\]"):
        staging.finish()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_tells_flipped_signs_whose_places_would_cancel(dtype: Any) -> None:
    """3 - 9 - 17 + 23 = 0: a sum of words times 2i + 1 would miss these four."""
    array = np.abs(np.random.default_rng(0).normal(size=12)).astype(dtype)
    array[[1, 11]] *= -1
    other = array.copy()
    other[[1, 4, 8, 11]] *= -1
    one, two = stage(array, []), stage(other, [])
    one.finish()
    two.finish()
    assert one.digest() != two.digest()


def test_large_float64_values_whose_squares_overflow_are_finite() -> None:
    staging = stage(np.array([1e200, -1e300, 3.0]), [])
    staging.finish()
    assert staging.norm(0) == np.inf


@pytest.mark.parametrize(
    ("runs", "nbytes", "message"),
    [
        ([Run(0, 0, 10)], 39, "expected 40 bytes.*got 39"),
        ([Run(0, 0, 10)], 41, "expected 40 bytes.*got 41"),
        ([Run(0, 5, 6)], 24, "elements 5 to 11"),
        ([Run(0, 0, 4), Run(0, 3, 2)], 24, "overlap"),
        ([Run(0, 0, 0)], 0, "at least one element"),
        ([Run(1, 0, 1)], 4, "got index 1"),
        ([Run(0, 2**64 - 1, 1)], 4, "within its 10"),
    ],
)
def test_runs_that_do_not_fit_are_refused(runs: list[Run], nbytes: int, message: str) -> None:
    staging = Staging([TensorSpec.of("x", np.zeros(10, np.float32))], THREADS)
    with pytest.raises(InvalidChunk, match=message):
        staging.add(runs, bytes(nbytes))


def test_a_transfer_with_missing_elements_is_refused() -> None:
    staging = Staging([TensorSpec.of("x", np.zeros(10, np.float32))], THREADS)
    staging.add([Run(0, 0, 4)], bytes(16))
    staging.add([Run(0, 5, 5)], bytes(20))
    with pytest.raises(InvalidChunk, match=r"all of its 10 elements.*got 9"):
        staging.finish()


def test_what_replaces_is_guarded_whatever_it_is_replaced_by_in_the_same_chunk() -> None:
    staging = Staging([TensorSpec.of("x", np.zeros(10, np.float32))], THREADS)
    data = np.concatenate([np.ones(10, np.float32), np.full(10, np.nan, np.float32)])
    staging.add([Run(0, 0, 10), Run(0, 0, 10)], data.view(np.uint8), replace=True)
    with pytest.raises(NonFiniteValue):
        staging.finish()


def test_elements_one_by_one_are_refused_before_their_bookkeeping_outgrows_them() -> None:
    staging = Staging([TensorSpec.of("x", np.zeros(100_000, np.float32))], THREADS)
    with pytest.raises(InvalidChunk, match=r"at most \d+ segments"):
        staging.add([Run(0, 2 * k, 1) for k in range(1000)], bytes(4000))


def test_replacing_without_end_is_refused() -> None:
    staging = Staging([TensorSpec.of("x", np.zeros(10, np.float32))], THREADS)
    with pytest.raises(InvalidChunk, match=r"4 times the size"):  # noqa: PT012 - which of them is the last does not matter
        for _ in range(5):
            staging.add([Run(0, 0, 10)], bytes(40), replace=True)
