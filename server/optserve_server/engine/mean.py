"""Means: the gradients of several pushes made one, planned before anything changes and run before the update."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._specification import TensorSpec
from optserve_server.engine.arena import Layout
from optserve_server.engine.loops import MEAN_COLUMNS, mean_loop
from optserve_server.engine.rows import SparseGradient
from optserve_server.engine.staging import Piece, StagedTensor
from optserve_server.engine.threads import Ranges, Threads
from optserve_server.engine.work import COMPUTED, Arenas, check_computable

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
class Part:
    """What gradients of one dtype contribute, in an order that depends on nothing but their pushes and dtypes."""

    dtype: DType
    table: Ranges
    weights: NDArray[np.floating]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        target = arenas.gradient[self.dtype.compute]
        threads.run_in_order(mean_loop(self.dtype), self.table, {SKIP: 1}, self.weights, target)


class Mean:
    """Memory for the mean gradient of a set."""

    def __init__(self, tensors: Sequence[TensorSpec], layout: Layout) -> None:
        self.arena = layout.allocate()
        self._tensors = tensors
        self._layout = layout

    def plan(
        self, gradients: Sequence[Gradients], weights: Sequence[float], *, begun: bool = False
    ) -> tuple[Gradients, list[Part]]:
        """The weighted sum of gradients of the same tensors, by the tensor's index in the set, and the work of making it.

        If it was `begun` before, they are added to what is there. Raises InvalidHyperparameter for weights that overflow.
        """
        tables: dict[DType, list[list[int]]] = {}
        for index in gradients[0]:
            start = self._layout.places[index].start
            pushed = sorted(enumerate(each[index] for each in gradients), key=_dtype_name)
            for place, (push, gradient) in enumerate(pushed):
                table = tables.setdefault(gradient.spec.dtype, [])
                table += [
                    [start + piece.offset, piece.size, piece.address, piece.skip, push, int(place == 0 and not begun)]
                    for piece in gradient.pieces
                ]
        parts = []
        for dtype in sorted(tables, key=lambda dtype: dtype.name):
            rows = np.array(tables[dtype], np.int64).reshape(-1, MEAN_COLUMNS)
            check_computable(weights, dtype.compute)
            parts.append(Part(dtype, rows, np.array(weights, dtype.compute)))
        return self.at(gradients[0]), parts

    def at(self, indices: Iterable[int]) -> Gradients:
        """Where the mean of tensors lies."""
        return {index: self._at(index) for index in indices}

    def compile(self, dtype: DType) -> None:
        """Compile the loop for gradients of a dtype now, by running it on nothing."""
        compute = dtype.compute
        mean_loop(dtype)(np.empty((0, MEAN_COLUMNS), np.int64), np.empty(0, compute), self.arena[compute])

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


def _dtype_name(pushed: tuple[int, StagedTensor]) -> str:
    return pushed[1].spec.dtype.name
