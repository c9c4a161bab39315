"""Robust aggregation: the gradients of several pushes made one that few of them can't move far."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optserve.aggregation import Aggregation, Krum, Median, TrimmedMean
from optserve_server.engine.arena import Arena, ComputeType, Layout
from optserve_server.engine.columns import TABLE_COLUMNS, comparators, distances_loop, sorted_mean_loop
from optserve_server.engine.threads import COUNT, STRIP, Ranges, Threads, split
from optserve_server.engine.work import Arenas

AS_THEY_ARE = np.empty((0, 2), np.int64)  # no comparators

Tables = Mapping[ComputeType, Ranges]  # a row for each run of elements: the first one and the count


@dataclass(frozen=True, slots=True)
class Robust:
    """The aggregate of pushes, each decoded into an arena of its own: `share` times it is written to the gathered gradient
    over ranges of it, or, once `begun`, added to what is there.

    Over those of `values`, which are no gradients, it is taken as well, but they have no part in distances. The pushes are at
    least `aggregation.least`. One of their arenas may be the gathered gradient's. Beside them an aggregate
    needs blocks of a few kilobytes a push, and Krum n(n − 1)/2 sums for every 32 768 elements.
    """

    aggregation: Aggregation
    pushes: Sequence[Arena]
    tables: Tables
    share: float = 1.0
    begun: bool = False
    values: Tables = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.pushes) >= self.aggregation.least, (len(self.pushes), self.aggregation)

    def run(self, arenas: Arenas, threads: Threads) -> None:
        size = len(self.pushes)
        match self.aggregation:
            case Krum() as krum:
                chosen = selected(krum, squared_distances(self.pushes, self.tables, threads))
                self._average([self.pushes[push] for push in chosen], AS_THEY_ARE, 0, arenas, threads)
            case TrimmedMean(trimmed):
                self._average(self.pushes, comparators(size, trimmed, size - trimmed), trimmed, arenas, threads)
            case Median():  # what is left once as many as possible are trimmed: the middle one or two
                trimmed = (size - 1) // 2
                self._average(self.pushes, comparators(size, trimmed, size - trimmed), trimmed, arenas, threads)

    def _average(
        self, pushes: Sequence[Arena], order: NDArray[np.int64], trimmed: int, arenas: Arenas, threads: Threads
    ) -> None:
        first, last = trimmed, len(pushes) - trimmed
        for compute, table in (*self.tables.items(), *self.values.items()):
            addresses, target = _addresses(pushes, compute), arenas.gradient[compute]
            loop = sorted_mean_loop(compute)
            threads.run(loop, table, {}, addresses, order, first, last, self.share, self.begun, target)


def tables_of(layout: Layout, tensors: Iterable[int]) -> Tables:
    """The ranges of some tensors, by their indices."""
    tables: dict[ComputeType, list[tuple[int, int]]] = {}
    for index in tensors:
        place = layout.places[index]
        if place.size:
            tables.setdefault(place.compute, []).append((place.start, place.size))
    return {compute: np.array(rows, np.int64) for compute, rows in tables.items()}


def squared_distances(pushes: Sequence[Arena], tables: Tables, threads: Threads) -> NDArray[np.float64]:
    """Squared Euclidean distances between pushes over all ranges, float64 [n, n]; what can't be told is NaN.

    Added up in units of about STRIP elements, which depend on the ranges alone, and then unit by unit.
    """
    size = len(pushes)
    pairs = np.zeros(size * (size - 1) // 2)
    for compute in sorted(tables, key=lambda compute: compute.name):
        table = tables[compute]
        units = split(table, {}, -(-int(table[:, COUNT].sum()) // STRIP))
        bounds = np.cumsum([0, *map(len, units)])
        sums = np.zeros((len(units), len(pairs)))
        every, rows, addresses = np.array([[0, len(units)]]), np.concatenate(units), _addresses(pushes, compute)
        threads.run(distances_loop(compute), every, {}, bounds, rows, addresses, sums, grain=1, inline=2)
        with np.errstate(over="ignore"):  # an outlier may be beyond any distance
            pairs += sums.sum(axis=0)
    distances = np.zeros((size, size))
    distances[np.tril_indices(size, -1)] = pairs
    return distances + distances.T


def selected(krum: Krum, distances: NDArray[np.float64]) -> list[int]:
    """The pushes that Krum selects, the lowest score first; see `optserve.aggregation.Krum`.

    What has no score, for want of distances, comes after all others: NaN is sorted last.
    """
    size = len(distances)
    others = distances[~np.eye(size, dtype=bool)].reshape(size, size - 1)
    with np.errstate(over="ignore"):
        scores = np.sort(others, axis=1)[:, : size - krum.byzantine - 2].sum(axis=1)
    return [int(push) for push in np.argsort(scores, kind="stable")[: krum.selected]]


def compile(layout: Layout, aggregation: Aggregation) -> None:
    """Compile the loops now, by running them on nothing."""
    nothing, nowhere = np.empty((0, TABLE_COLUMNS), np.int64), np.empty(0, np.int64)
    for compute in layout.sizes:
        sorted_mean_loop(compute)(nothing, nowhere, AS_THEY_ARE, 0, 0, 1.0, False, np.empty(0, compute))
        if isinstance(aggregation, Krum):
            distances_loop(compute)(nothing, nowhere, nothing, nowhere, np.empty((0, 0)))


def _addresses(pushes: Sequence[Arena], compute: ComputeType) -> NDArray[np.int64]:
    return np.array([push[compute].ctypes.data for push in pushes], np.int64)
