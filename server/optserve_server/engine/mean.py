"""Means: the gradients of several pushes made one, planned before anything changes and run before the update."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._specification import TensorSpec
from optserve._treatments import Treatment
from optserve.aggregation import Aggregation
from optserve_server.engine.aggregation import Robust, Tables, tables_of
from optserve_server.engine.arena import Arena, ComputeType, Layout, assign
from optserve_server.engine.loops import MEAN_COLUMNS, Compensation, compensated_mean_loop, mean_loop, scale_loop
from optserve_server.engine.rows import SparseGradient
from optserve_server.engine.staging import Piece, StagedTensor
from optserve_server.engine.threads import Ranges, Threads
from optserve_server.engine.work import COMPUTED, Arenas, Work, check_computable

SKIP = 3  # column of a mean's table, which advances with the elements

Gradients = Mapping[int, StagedTensor]


@dataclass(frozen=True, slots=True)
class Gathered:
    """What makes an update, by the tensor's index: gradients of whole tensors, of some rows of others, and the caller's
    parameters, in sets that hold moments only. Rows of tables are keys."""

    gradients: Gradients
    sparse: Mapping[int, SparseGradient]
    parameters: Gradients


@dataclass(frozen=True, slots=True)
class Term:
    """What one push adds to a mean: its gradients, multiplied by `factor`, compensated, and multiplied by `weight`.

    Values of buffers are only multiplied by `share`. `base` are the parameters that the gradients were computed at, None if
    they are those of now, or if that is of no matter.
    """

    gradients: Gradients
    weight: float
    share: float
    factor: float = 1.0
    base: Arena | None = None


@dataclass(frozen=True, slots=True)
class Compensated:
    """What is done to gradients before they are added up, with a number for each dtype's loop, and steps for gaps.

    With `differences`, what was pushed are parameters.
    """

    kind: Compensation
    scale: float
    squares: Arena | None = None
    differences: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What gradients of one dtype contribute, in an order that depends on nothing but their pushes and dtypes."""

    dtype: DType
    table: Ranges
    weights: NDArray[np.floating]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        target = arenas.gradient[self.dtype.compute]
        threads.run_in_order(mean_loop(self.dtype), self.table, {SKIP: 1}, self.weights, target)


@dataclass(frozen=True, slots=True)
class CompensatedPart:
    """What gradients of one push and dtype contribute, compensated."""

    dtype: DType
    table: Ranges
    scalars: NDArray[np.floating]
    compensated: Compensated
    base: Arena | None

    def run(self, arenas: Arenas, threads: Threads) -> None:
        compute, kind = self.dtype.compute, self.compensated.kind if self.base is not None else Compensation.NONE
        now = arenas.before[compute]
        base = now if self.base is None else self.base[compute]
        squares = now if self.compensated.squares is None else self.compensated.squares[compute]
        loop = compensated_mean_loop(self.dtype, kind, differences=self.compensated.differences)
        threads.run(loop, self.table, {SKIP: 1}, self.scalars, arenas.gradient[compute], now, base, squares)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Work that multiplies what was added up by a number."""

    factor: float
    tables: Mapping[ComputeType, Ranges]
    sparse: Mapping[int, SparseGradient]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        for compute, table in self.tables.items():
            threads.run(scale_loop(), table, {}, np.array([self.factor], compute), arenas.gradient[compute])
        for gradient in self.sparse.values():
            np.multiply(gradient.values, gradient.values.dtype.type(self.factor), out=gradient.values)


@dataclass(frozen=True, slots=True)
class Replaced:
    """Work that lets tensors be what was gathered for them, in the parameters and in slots that follow those."""

    tensors: Sequence[int]
    layout: Layout
    slots: Sequence[str]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        places = [self.layout.places[index] for index in self.tensors]
        for arena in (arenas.after, *(arenas.slots[name] for name in self.slots)):
            assign(arena, arenas.gradient, places)


@dataclass(frozen=True, slots=True)
class Apart:
    """Work that gathers each push by itself, in memory for all of them, and then makes one of these."""

    pushes: Sequence[Sequence[Part | CompensatedPart]]
    aggregation: Aggregation
    tables: Tables
    values: Tables
    layout: Layout
    share: float
    begun: bool

    def run(self, arenas: Arenas, threads: Threads) -> None:
        gathered = []
        for parts in self.pushes:
            own = self.layout.allocate()
            for part in parts:
                part.run(arenas._replace(gradient=own), threads)
            gathered.append(own)
        Robust(self.aggregation, gathered, self.tables, self.share, self.begun, self.values).run(arenas, threads)


class Mean:
    """Memory for the mean gradient of a set, and for values of the buffers among its tensors."""

    def __init__(self, tensors: Sequence[TensorSpec], layout: Layout, treatments: Mapping[int, Treatment]) -> None:
        self.arena = layout.allocate()
        self._tensors = tensors
        self._layout = layout
        self._treatments = treatments

    def plan(
        self, terms: Sequence[Term], *, begun: bool = False, compensated: Compensated | None = None
    ) -> tuple[Gradients, list[Work]]:
        """The sum of terms of the same tensors, by the tensor's index in the set, and the work of making it.

        If it was `begun` before, they are added to what is there. Raises InvalidHyperparameter for weights that overflow.
        """
        present, optimized, rest = self._present(terms)
        if compensated is None:
            return self.at(present), list(self._plain(terms, present, begun))
        works: list[Work] = []
        for place, term in enumerate(terms):
            works += self._compensated(term, optimized, place == 0 and not begun, compensated)
        return self.at(present), [*works, *self._plain(terms, rest, begun)]

    def plan_apart(
        self,
        terms: Sequence[Term],
        aggregation: Aggregation,
        share: float,
        *,
        begun: bool = False,
        compensated: Compensated | None = None,
    ) -> tuple[Gradients, list[Work]]:
        """As `plan`, for an aggregate that takes the place of the sum, times a share; what replaces others is the last."""
        present, optimized, rest = self._present(terms)
        values = [index for index in rest if self._treatments[index] is Treatment.AVERAGE]
        pushes: list[Sequence[Part | CompensatedPart]] = []
        for term in terms:
            alone = replace(term, weight=term.weight / term.share, share=1.0)
            parts: list[Part | CompensatedPart] = list(self._plain([alone], values, begun=False))
            if compensated is None:
                parts += self._plain([alone], optimized, begun=False)
            else:
                parts += self._compensated(alone, optimized, True, compensated)
            pushes.append(parts)
        tables = [tables_of(self._layout, indices) for indices in (optimized, values)]
        apart = Apart(pushes, aggregation, tables[0], tables[1], self._layout, share, begun)
        return self.at(present), [apart, *self._plain(terms, [index for index in rest if index not in values], begun)]

    def _present(self, terms: Sequence[Term]) -> tuple[list[int], list[int], list[int]]:
        """The tensors that are gathered: all, those that a rule will see, and the rest."""
        present = [index for index in terms[0].gradients if self._treatments.get(index) is not Treatment.FREEZE]
        rest = [index for index in present if index in self._treatments]
        return present, [index for index in present if index not in rest], rest

    def scaled(self, indices: Iterable[int], factor: float, sparse: Mapping[int, SparseGradient]) -> Scaled:
        """The work of multiplying what was added up of tensors; values that replace others stay as they are."""
        means = [index for index in indices if self._treatments.get(index) is not Treatment.REPLACE]
        return Scaled(factor, tables_of(self._layout, means), sparse)

    def _plain(self, terms: Sequence[Term], indices: Iterable[int], begun: bool) -> Iterator[Part]:
        tables: dict[DType, list[list[int]]] = {}
        for index in indices:
            start, treatment = self._layout.places[index].start, self._treatments.get(index)
            kind = {None: 0, Treatment.AVERAGE: 1, Treatment.REPLACE: 2}[treatment]
            pushed = sorted(enumerate(term.gradients[index] for term in terms), key=_dtype_name)
            for place, (push, gradient) in enumerate(pushed):
                first = int((place == 0 and not begun) or treatment is Treatment.REPLACE)
                tables.setdefault(gradient.spec.dtype, []).extend(_rows(start, gradient, 3 * push + kind, first))
        weights = [value for term in terms for value in (term.weight * term.factor, term.share, 1.0)]
        for dtype, rows in _ordered(tables):
            check_computable(weights, dtype.compute)
            yield Part(dtype, rows, np.array(weights, dtype.compute))

    def _compensated(
        self, term: Term, indices: Iterable[int], first: bool, compensated: Compensated
    ) -> Iterator[CompensatedPart]:
        tables: dict[DType, list[list[int]]] = {}
        for index in indices:
            start, gradient = self._layout.places[index].start, term.gradients[index]
            tables.setdefault(gradient.spec.dtype, []).extend(_rows(start, gradient, 0, int(first)))
        scalars = (term.weight, term.factor, compensated.scale)
        for dtype, rows in _ordered(tables):
            check_computable(scalars, dtype.compute)
            yield CompensatedPart(dtype, rows, np.array([scalars], dtype.compute), compensated, term.base)

    def at(self, indices: Iterable[int]) -> Gradients:
        """Where the mean of tensors lies."""
        return {index: self._at(index) for index in indices}

    def compile(self, dtype: DType) -> None:
        """Compile the loop for gradients of a dtype now, by running it on nothing."""
        compute = dtype.compute
        mean_loop(dtype)(np.empty((0, MEAN_COLUMNS), np.int64), np.empty(0, compute), self.arena[compute])
        scale_loop()(np.empty((0, 2), np.int64), np.empty(1, compute), self.arena[compute])

    def compile_compensated(self, dtype: DType, compensated: Compensated) -> None:
        """As `compile`, for gradients that are compensated."""
        scalars = np.empty((0, 3), dtype.compute)
        nothing, arena = np.empty((0, MEAN_COLUMNS), np.int64), self.arena[dtype.compute]
        for kind in {Compensation.NONE, compensated.kind}:
            loop = compensated_mean_loop(dtype, kind, differences=compensated.differences)
            loop(nothing, scalars, arena, arena, arena, arena)

    def _at(self, index: int) -> StagedTensor:
        """Where the mean of a tensor will be."""
        place = self._layout.places[index]
        mean = StagedTensor(replace(self._tensors[index], dtype=COMPUTED[place.compute]), 0)
        if place.size:
            address = self.arena[place.compute][place.start :].ctypes.data
            mean.add(Piece(0, place.size, address), replace=False)
        return mean


def dtype_of(dtype: DType) -> DType:
    """What the mean of gradients of a dtype is."""
    return COMPUTED[dtype.compute]


def _rows(start: int, gradient: StagedTensor, weight: int, first: int) -> Iterator[list[int]]:
    """Rows of a mean's table for a tensor that starts at an element of the arena."""
    for piece in gradient.pieces:
        yield [start + piece.offset, piece.size, piece.address, piece.skip, weight, first]


def _ordered(tables: Mapping[DType, list[list[int]]]) -> Iterator[tuple[DType, Ranges]]:
    """The tables as arrays, by their dtypes' names."""
    for dtype in sorted(tables, key=lambda dtype: dtype.name):
        yield dtype, np.array(tables[dtype], np.int64).reshape(-1, MEAN_COLUMNS)


def _dtype_name(pushed: tuple[int, StagedTensor]) -> str:
    return pushed[1].spec.dtype.name
