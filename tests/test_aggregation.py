"""Robust aggregates are what the papers say, to the bit whatever the order and the threads; outliers are counted exactly."""

import itertools
import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

import optserve
from optserve._dtypes import BFLOAT16, FLOAT32, FLOAT64, DType, dtype_named
from optserve._specification import TensorSpec
from optserve.aggregation import Aggregation, Krum, Median, Quarantine, TrimmedMean
from optserve_server.engine import aggregation as engine
from optserve_server.engine import quarantine
from optserve_server.engine.aggregation import Robust, tables_of
from optserve_server.engine.arena import Arena, Layout
from optserve_server.engine.columns import COLUMNS, comparators
from optserve_server.engine.loops import decode_loop
from optserve_server.engine.quarantine import Standing, Watch
from optserve_server.engine.threads import Threads
from optserve_server.engine.work import Arenas

Array = NDArray[Any]

ALONE = Threads(1)
ANYTHING = (0.0, -0.0, 1e38, -1e38, math.inf, -math.inf, math.nan)
TIED = st.integers(-3, 3).map(float)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def set_of(sizes: Sequence[int], dtype: str = "float32") -> Layout:
    return Layout([TensorSpec(f"t{k}", dtype_named(dtype), (size,)) for k, size in enumerate(sizes)])


def arena_of(values: Array, layout: Layout) -> Arena:
    """Values one after the other in the tensors of a set, and NaN between these."""
    arena = layout.allocate()
    for array in arena.values():
        array.fill(math.nan)
    done = 0
    for index, place in enumerate(layout.places):
        layout.elements(arena, index)[:] = values[done : done + place.size]
        done += place.size
    return arena


def values_of(arena: Arena, layout: Layout) -> Array:
    return np.concatenate([layout.elements(arena, index) for index in range(len(layout.places))])


def aggregate(
    aggregation: Aggregation, pushes: Array, *, sizes: Sequence[int] | None = None, threads: Threads = ALONE
) -> Array:
    """The aggregate of pushes, [n, elements], that lie in arenas of a set with tensors of some sizes."""
    layout = set_of(sizes or [pushes.shape[1]], pushes.dtype.name)
    target = layout.allocate()
    work = Robust(
        aggregation, [arena_of(push, layout) for push in pushes], tables_of(layout, range(len(layout.places)))
    )
    work.run(Arenas({}, {}, {}, target), threads)
    return values_of(target, layout)


def pushes_of(
    elements: st.SearchStrategy[float], *, least: int = 3, dtypes: Sequence[str] = ("float32", "float64")
) -> Any:
    """Arrays [pushes, elements]."""
    shapes = st.tuples(st.integers(least, 10), st.integers(1, 40))
    return st.sampled_from(dtypes).flatmap(
        lambda dtype: shapes.flatmap(lambda shape: arrays(dtype, shape, elements=elements))
    )


def trimmed_mean(pushes: Array, trimmed: int) -> Array:
    """Definition 2 of Yin et al. (2018), with a number of pushes in place of a share, rounded once."""
    kept = [sorted(map(float, column))[trimmed : len(column) - trimmed] for column in pushes.T]
    return np.array([math.fsum(values) / len(values) for values in kept], pushes.dtype)


def krum(pushes: Array, byzantine: int, selected: int) -> Array:
    """Section 4 of Blanchard et al. (2017), and Multi-Krum of its section 6."""
    exact = pushes.astype(np.float64)
    scores = []
    for i, own in enumerate(exact):
        distances = sorted(float(((own - other) ** 2).sum()) for j, other in enumerate(exact) if j != i)
        scores.append(sum(distances[: len(pushes) - byzantine - 2]))
    best = sorted(range(len(pushes)), key=lambda i: (scores[i], i))[:selected]
    return exact[best].mean(axis=0).astype(pushes.dtype)


def bits(array: Array) -> bytes:
    return array.tobytes()


# --- What the aggregates are.


@given(pushes_of(st.one_of(TIED, FLOATS)))
def test_the_median_is_that_of_numpy(pushes: Array) -> None:
    np.testing.assert_array_equal(aggregate(Median(), pushes), np.median(pushes, axis=0))


@given(pushes_of(st.one_of(TIED, FLOATS)), st.data())
def test_the_trimmed_mean_is_that_of_the_paper(pushes: Array, data: st.DataObject) -> None:
    trimmed = data.draw(st.integers(1, (len(pushes) - 1) // 2))
    rounding = 2 * np.finfo(np.float64).eps * len(pushes) * np.abs(pushes).max()
    np.testing.assert_allclose(
        aggregate(TrimmedMean(trimmed), pushes), trimmed_mean(pushes, trimmed), np.finfo(pushes.dtype).eps, rounding
    )


@given(pushes_of(TIED), st.data())
def test_krum_is_that_of_the_paper_with_ties_by_order(pushes: Array, data: st.DataObject) -> None:
    byzantine = data.draw(st.integers(0, (len(pushes) - 3) // 2))
    selected = data.draw(st.integers(1, len(pushes) - byzantine - 2))
    np.testing.assert_allclose(
        aggregate(Krum(byzantine, selected), pushes), krum(pushes, byzantine, selected), np.finfo(pushes.dtype).eps
    )


@given(arrays(np.uint16, (5, 33), elements=st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)))
def test_half_precision_is_aggregated_as_it_was_decoded(encoded: Array) -> None:
    """bfloat16 is the upper half of a float32."""
    decoded = (encoded.astype(np.uint32) << 16).view(np.float32)
    layout = set_of([33], "bfloat16")
    pushes = [layout.allocate() for _ in encoded]
    for arena, push in zip(pushes, encoded, strict=True):
        decode_loop(BFLOAT16)(np.array([[0, 33, push.ctypes.data]]), arena[BFLOAT16.compute])
    target = layout.allocate()
    Robust(Median(), pushes, tables_of(layout, [0])).run(Arenas({}, {}, {}, target), ALONE)
    np.testing.assert_array_equal(values_of(target, layout), np.median(decoded, axis=0))


@pytest.mark.parametrize("size", range(1, 11))
def test_comparators_put_every_column_in_order(size: int) -> None:
    """They do if they do for all columns of zeros and ones (Knuth 5.3.4, theorem Z); places that are asked for suffice."""
    columns = np.array(list(itertools.product([0, 1], repeat=size))).T
    for first, last in itertools.combinations(range(size + 1), 2):
        values = columns.copy()
        for i, j in comparators(size, first, last):
            values[[i, j]] = np.sort(values[[i, j]], axis=0)
        np.testing.assert_array_equal(values[first:last], np.sort(columns, axis=0)[first:last])


def test_only_what_the_median_depends_on_is_compared() -> None:
    assert len(comparators(8, 0, 8)) == 19  # Batcher's number
    assert len(comparators(8, 3, 5)) < 19
    assert len(comparators(1, 0, 1)) == 0


# --- What changes no bit, and what does.

AGGREGATIONS = [Median(), TrimmedMean(1), TrimmedMean(2), Krum(1), Krum(1, selected=4)]  # for 7 pushes and more
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)


@each_aggregation
@given(pushes=pushes_of(st.one_of(TIED, FLOATS), least=7), data=st.data())
def test_the_order_of_pushes_changes_no_bit(aggregation: Aggregation, pushes: Array, data: st.DataObject) -> None:
    if isinstance(aggregation, Krum):  # whose ties are decided by order
        assume(_scores_differ(pushes, aggregation.byzantine))
    shuffled = pushes[data.draw(st.permutations(range(len(pushes))))]
    assert bits(aggregate(aggregation, shuffled)) == bits(aggregate(aggregation, pushes))


def _scores_differ(pushes: Array, byzantine: int) -> bool:
    distances = ((pushes[:, None].astype(np.float64) - pushes) ** 2).sum(axis=2)
    scores = np.sort(distances, axis=1)[:, : len(pushes) - byzantine - 1].sum(axis=1)
    return bool((np.diff(np.sort(scores)) > 1e-9 * scores.max()).all())


@each_aggregation
@given(pushes=pushes_of(TIED, least=7), data=st.data())
def test_the_order_of_elements_changes_no_bit_of_each(
    aggregation: Aggregation, pushes: Array, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(pushes.shape[1])))
    assert bits(aggregate(aggregation, pushes[:, order])) == bits(aggregate(aggregation, pushes)[order])


@each_aggregation
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_change_no_bit(aggregation: Aggregation, dtype: str) -> None:
    sizes = [100_003, 1, COLUMNS - 1, COLUMNS + 1, 65_536, 7]
    pushes = np.random.default_rng(0).normal(size=(7, sum(sizes))).astype(dtype)
    expected = aggregate(aggregation, pushes, sizes=sizes)
    for count in (2, 3):
        threads = Threads(count)
        assert bits(aggregate(aggregation, pushes, sizes=sizes, threads=threads)) == bits(expected)
        threads.close()


def test_threads_and_the_order_of_pushes_change_no_bit_of_their_distances() -> None:
    sizes = [100_003, 1, 65_536, 7]
    layout = set_of(sizes)
    random = np.random.default_rng(0)
    pushes = [arena_of(push, layout) for push in random.normal(size=(7, sum(sizes))).astype(np.float32)]
    tables, order = tables_of(layout, range(len(sizes))), random.permutation(7)
    expected = engine.squared_distances(pushes, tables, ALONE)
    for count in (2, 3):
        threads = Threads(count)
        shuffled = engine.squared_distances([pushes[push] for push in order], tables, threads)
        assert bits(shuffled) == bits(expected[order][:, order])
        threads.close()
    values = np.array([values_of(push, layout) for push in pushes], np.float64)
    np.testing.assert_allclose(expected, [((values - own) ** 2).sum(axis=1) for own in values], rtol=1e-12)


@pytest.mark.parametrize("dtypes", [(FLOAT32, FLOAT32), (FLOAT32, FLOAT64)])
def test_krum_looks_at_all_tensors_together(dtypes: tuple[DType, DType]) -> None:
    """In each of two tensors alone another push would be selected than in both."""
    pushes = np.array([[0, 8], [0, 0], [8, 0], [1, 2], [3, 4]], np.float32)
    assert krum(pushes[:, :1], 1, 1) != krum(pushes, 1, 1)[0] != krum(pushes[:, 1:], 1, 1)
    layout = Layout([TensorSpec(f"t{k}", dtype, (1,)) for k, dtype in enumerate(dtypes)])
    target = layout.allocate()
    work = Robust(Krum(1), [arena_of(push, layout) for push in pushes], tables_of(layout, [0, 1]))
    work.run(Arenas({}, {}, {}, target), ALONE)
    np.testing.assert_array_equal(values_of(target, layout), krum(pushes, 1, 1))


@each_aggregation
def test_tensors_that_are_not_named_and_what_lies_between_tensors_stay_as_they_are(aggregation: Aggregation) -> None:
    layout = set_of([5, 3, 0, 4])
    pushes = [arena_of(np.arange(12, dtype=np.float32) + k, layout) for k in range(7)]
    target = {compute: np.full_like(array, -1) for compute, array in layout.allocate().items()}
    Robust(aggregation, pushes, tables_of(layout, [0, 2, 3])).run(Arenas({}, {}, {}, target), ALONE)
    for index in (0, 3):
        assert (layout.elements(target, index) >= 0).all()
        layout.elements(target, index)[:] = -1
    assert all((array == -1).all() for array in target.values())


@each_aggregation
def test_rounds_are_averaged_as_shares_that_are_added(aggregation: Aggregation) -> None:
    random = np.random.default_rng(0)
    layout = set_of([300])
    rounds = random.normal(size=(2, 7, 300)).astype(np.float32)
    target = arena_of(np.full(300, math.nan, np.float32), layout)
    for begun, pushes in enumerate(rounds):
        arenas = [arena_of(push, layout) for push in pushes]
        work = Robust(aggregation, arenas, tables_of(layout, [0]), share=0.5, begun=bool(begun))
        work.run(Arenas({}, {}, {}, target), ALONE)
    expected = np.mean([aggregate(aggregation, pushes) for pushes in rounds], axis=0)
    np.testing.assert_allclose(values_of(target, layout), expected, rtol=1e-6, atol=1e-7)


@each_aggregation
def test_a_push_may_lie_where_the_aggregate_goes(aggregation: Aggregation) -> None:
    pushes = np.random.default_rng(0).normal(size=(7, 1000)).astype(np.float32)
    layout = set_of([1000])
    arenas = [arena_of(push, layout) for push in pushes]
    Robust(aggregation, arenas, tables_of(layout, [0])).run(Arenas({}, {}, {}, arenas[3]), ALONE)
    assert bits(values_of(arenas[3], layout)) == bits(aggregate(aggregation, pushes))


@each_aggregation
def test_next_to_no_memory_is_needed_beside_the_pushes(aggregation: Aggregation) -> None:
    layout = set_of([1_000_000])
    pushes, target = [layout.allocate() for _ in range(8)], layout.allocate()
    engine.compile(layout, aggregation)
    tracemalloc.start()
    Robust(aggregation, pushes, tables_of(layout, [0])).run(Arenas({}, {}, {}, target), ALONE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < layout.nbytes / 10


@pytest.mark.parametrize(
    ("aggregation", "least"),
    [(Median(), 3), (TrimmedMean(2), 5), (Krum(0), 3), (Krum(2), 7), (Krum(2, 3), 7), (Krum(2, 5), 9)],
    ids=str,
)
def test_an_aggregate_needs_some_pushes(aggregation: Aggregation, least: int) -> None:
    assert aggregation.least == least
    pushes = np.ones((least, 4), np.float32)
    np.testing.assert_array_equal(aggregate(aggregation, pushes), 1)
    with pytest.raises(AssertionError):
        aggregate(aggregation, pushes[1:])


# --- What they protect from, and what not.

HONEST = arrays(np.float32, st.tuples(st.integers(4, 7), st.integers(1, 20)), elements=st.floats(-100, 100, width=32))


def attacked(honest: Array, byzantine: int, data: st.DataObject) -> Array:
    """Honest pushes among any others, in any order."""
    values = st.one_of(st.sampled_from(ANYTHING), st.floats(width=32, allow_nan=True))
    others = data.draw(arrays(np.float32, (byzantine, honest.shape[1]), elements=values))
    pushes = np.concatenate([honest, others])
    return pushes[data.draw(st.permutations(range(len(pushes))))]


@given(HONEST, st.data())
def test_the_median_stays_among_the_honest_if_they_are_the_majority(honest: Array, data: st.DataObject) -> None:
    byzantine = data.draw(st.integers(0, len(honest) - 1))
    result = aggregate(Median(), attacked(honest, byzantine, data))
    assert (result >= honest.min(axis=0)).all()
    assert (result <= honest.max(axis=0)).all()


@given(HONEST, st.data())
def test_the_trimmed_mean_stays_among_the_honest_if_as_many_are_trimmed_as_are_not(
    honest: Array, data: st.DataObject
) -> None:
    trimmed = data.draw(st.integers(1, len(honest) - 1))
    result = aggregate(TrimmedMean(trimmed), attacked(honest, trimmed, data))
    assert (result >= honest.min(axis=0)).all()
    assert (result <= honest.max(axis=0)).all()


@given(HONEST, st.floats(1e4, 1e38), st.data())
def test_krum_keeps_to_the_honest_whatever_the_size_of_outliers_that_agree(
    honest: Array, size: float, data: st.DataObject
) -> None:
    byzantine = data.draw(st.integers(0, len(honest) - 3))
    outlier = np.full((1, honest.shape[1]), data.draw(st.sampled_from([-1, 1])) * size, np.float32)
    pushes = np.concatenate([np.repeat(outlier, byzantine, axis=0), honest])
    selected = data.draw(st.integers(1, len(honest) - 2))
    result = aggregate(Krum(byzantine, selected), pushes)
    assert (np.abs(result) <= 100).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_krum_selects_no_push_that_is_not_finite(value: float) -> None:
    pushes = np.random.default_rng(0).normal(size=(9, 50)).astype(np.float32)
    pushes[:3, 7] = value
    assert np.isfinite(aggregate(Krum(3, selected=4), pushes)).all()


HONEST_WORKERS, BYZANTINE_WORKERS, STEPS = 7, 2, 100


def attack(kind: str, honest: Array, random: np.random.Generator) -> Array:
    """What each Byzantine worker pushes, who all know what the honest ones do."""
    mean, deviation = honest.mean(axis=0), honest.std(axis=0)
    match kind:
        case "sign flip":
            return -10 * mean
        case "scale":
            return 1e6 * mean
        case "random":
            return random.normal(scale=1e3, size=mean.shape)
        case _:  # Baruch et al.: so little that it hides among the honest
            return mean - 0.3 * deviation


def distance_after(aggregation: Aggregation | None, kind: str) -> float:
    """How far from the least of ½‖x‖² gradient descent ends, with noisy gradients and some workers that attack."""
    random = np.random.default_rng(0)
    x = np.full(20, 5.0)
    for _ in range(STEPS):
        honest = x + random.normal(scale=0.1, size=(HONEST_WORKERS, 20))
        pushes = np.concatenate([honest, np.tile(attack(kind, honest, random), (BYZANTINE_WORKERS, 1))])
        x = x - 0.1 * (pushes.mean(axis=0) if aggregation is None else aggregate(aggregation, pushes))
        if np.linalg.norm(x) > 1e3:
            return math.inf
    return float(np.linalg.norm(x))


@pytest.mark.parametrize("aggregation", [Median(), TrimmedMean(2), Krum(2), Krum(2, selected=5)], ids=str)
@pytest.mark.parametrize("kind", ["sign flip", "scale", "random"])
def test_training_gets_there_in_spite_of_a_minority(aggregation: Aggregation, kind: str) -> None:
    assert distance_after(aggregation, kind) < 0.5
    assert distance_after(None, kind) > 2


@pytest.mark.parametrize("aggregation", [Median(), TrimmedMean(2), Krum(2, selected=5)], ids=str)
def test_colluders_just_inside_the_bound_are_not_told_apart(aggregation: Aggregation) -> None:
    """The documentation says so: a little is enough to move every element the same way."""
    random = np.random.default_rng(0)
    moved = []
    for _ in range(20):
        honest = random.normal(size=(HONEST_WORKERS, 500))
        pushes = np.concatenate([honest, np.tile(attack("little", honest, random), (BYZANTINE_WORKERS, 1))])
        moved.append(float((aggregate(aggregation, pushes) - honest.mean(axis=0)).mean()))
    assert max(moved) < -0.02


# --- Values.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrimmedMean(0), "expected trimmed to be a whole number from 1 to 524287; got 0"),
        (lambda: TrimmedMean(1.5), "expected trimmed to be a whole number from 1 to 524287; got 1.5"),  # type: ignore[arg-type]
        (lambda: TrimmedMean(True), "expected trimmed to be a whole number from 1 to 524287; got True"),
        (lambda: Krum(-1), "expected byzantine to be a whole number from 0 to 524286; got -1"),
        (lambda: Krum("1"), "expected byzantine to be a whole number from 0 to 524286; got '1'"),  # type: ignore[arg-type]
        (lambda: Krum(1, 0), "expected selected to be a whole number from 1 to 1048573; got 0"),
        (lambda: Quarantine(factor=1.0), "expected factor to be a number above 1; got 1.0"),
        (lambda: Quarantine(factor=math.inf), "expected factor to be a number above 1; got inf"),
        (lambda: Quarantine(factor=math.nan), "expected factor to be a number above 1; got nan"),
        (lambda: Quarantine(factor="2"), "expected factor to be a number above 1; got '2'"),  # type: ignore[arg-type]
        (lambda: Quarantine(strikes=0), "expected strikes to be a whole number from 1 to 1048576; got 0"),
        (lambda: Quarantine(updates=0), "expected updates to be a whole number from 1 to 9007199254740991; got 0"),
    ],
)
def test_values_are_checked_where_they_are_built(build: Any, message: str) -> None:
    with pytest.raises(optserve.InvalidPolicy, match=f"^{message}$"):
        build()


def test_values_that_say_the_same_are_equal() -> None:
    assert Krum(2) == Krum(2, selected=1) != Krum(1)
    assert Quarantine(factor=10) == Quarantine()
    assert isinstance(Quarantine(factor=10).factor, float)


# --- Quarantine.

RULE = Quarantine(factor=2.0, strikes=3, updates=100)


def watch_of(norms: Sequence[float], rule: Quarantine = RULE) -> Watch:
    watch = Watch(rule)
    watch.accept(norms)
    return watch


def test_nothing_finite_is_an_outlier_before_there_are_enough_norms() -> None:
    watch = watch_of([1.0] * 9)
    assert watch.judge("a", 1e30, 0) is None
    watch.accept([1.0])
    assert watch.judge("a", 1e30, 0) is not None


@pytest.mark.parametrize("norms", [[], [1.0] * 10])
@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_always_one(norms: list[float], norm: float) -> None:
    assert "expected a gradient norm that is" in (watch_of(norms).judge("a", norm, 0) or "")


def test_a_norm_is_an_outlier_above_the_factor_times_the_median() -> None:
    watch = watch_of([1.0, 3.0] * 5)  # median 2
    assert watch.judge("a", 4.0, 0) is None
    assert watch.judge("a", math.nextafter(4.0, 5.0), 0) is not None
    assert watch.judge("a", 0.0, 0) is None


def test_the_reason_says_what_was_expected_and_what_came() -> None:
    watch = watch_of([1.0] * 10)
    assert watch.judge("a", 7.5, 4) == (
        "expected a gradient norm that is at most 2, 2 times the median of those accepted last; got 7.5, outlier 1 in a row"
    )
    watch.judge("a", 7.5, 5)
    assert (watch.judge("a", 7.5, 6) or "").endswith(
        "outlier 3 in a row; client 'a' is in quarantine until version 106"
    )
    assert watch.judge("a", 1.0, 7) == (
        "client 'a' is in quarantine until version 106, after 3 outliers in a row; the set is at version 7"
    )


def test_where_the_median_is_zero_nothing_is_an_outlier() -> None:
    assert watch_of([0.0] * 6 + [1.0] * 4).judge("a", 1e30, 0) is None


def test_outliers_do_not_move_the_median() -> None:
    watch = watch_of([1.0] * 10, Quarantine(factor=2.0, strikes=1000))
    for version in range(500):
        assert watch.judge("a", 2.1, version) is not None
    assert watch.limit == 2.0


def test_what_is_accepted_moves_the_median_of_the_last_hundred() -> None:
    watch = watch_of([1.0] * 100)
    watch.accept([2.0] * 50)
    assert watch.limit == 3.0
    watch.accept([2.0])
    assert watch.limit == 4.0
    assert len(watch.norms) == Quarantine.window == 100


def test_a_slow_drift_is_not_told_apart() -> None:
    """The documentation says so: whoever makes most of the pushes decides what is usual."""
    watch, norm = watch_of([1.0] * 100), 1.0
    for version in range(4000):
        norm *= 1.01
        assert watch.judge("a", norm, version) is None
        watch.accept([norm])
    assert norm > 1e17


def test_strikes_count_outliers_in_a_row_of_one_client() -> None:
    watch = watch_of([1.0] * 10)
    for norm in (9, 9, 1, 9, 9):
        watch.judge("a", norm, 0)
        watch.judge("b", 9 if norm == 1 else 1, 0)
    assert watch.standings == {"a": Standing(2, 0)}
    assert watch.quarantined(0) == {}
    watch.judge("a", 9, 0)
    assert watch.quarantined(0) == {"a": 100}


def test_a_quarantine_lasts_as_many_updates_as_it_says_and_ends_without_strikes() -> None:
    watch = watch_of([1.0] * 10)
    for version in (5, 5, 6):
        watch.judge("a", 9.0, version)
    assert watch.quarantined(105) == {"a": 106}
    assert all(watch.judge("a", 1.0, version) is not None for version in range(6, 106))
    assert watch.quarantined(106) == {}
    assert watch.judge("b", 1.0, 50) is None
    assert watch.judge("a", 9.0, 106) is not None
    assert watch.standings == {"a": Standing(1, 0)}
    assert watch.judge("a", 1.0, 106) is None
    assert watch.standings == {}


def test_one_strike_may_be_enough() -> None:
    watch = watch_of([1.0] * 10, Quarantine(factor=2.0, strikes=1, updates=1))
    watch.judge("a", 9.0, 3)
    assert watch.quarantined(3) == {"a": 4}


def test_clients_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "MOST_STANDINGS", 3)
    watch = watch_of([1.0] * 10)
    for client in ("a", "b", "c", "a", "d"):
        watch.judge(client, 9.0, 0)
    assert watch.standings == {"c": Standing(1, 0), "a": Standing(2, 0), "d": Standing(1, 0)}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.booleans()), max_size=80))
def test_the_same_pushes_lead_to_the_same_standings(pushes: list[tuple[str, float, bool]]) -> None:
    """Also from a copy, which goes on by itself."""
    ours = watch_of([1.0] * 10, Quarantine(factor=2.0, strikes=2, updates=3))
    theirs, reasons = ours.copy(), []
    for watch in (ours, theirs):
        version, said = 0, []
        for client, norm, updates in pushes:
            said.append(watch.judge(client, norm, version))
            if said[-1] is None:
                watch.accept([norm])
                version += updates
        reasons.append(said)
    assert reasons[0] == reasons[1]
    assert ours == theirs
