"""Means: the gradients of several workers made one, planned before anything changes and run before the update."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import FLOAT32, FLOAT64, DType
from optserve._specification import TensorSpec
from optserve_server.engine.arena import Layout
from optserve_server.engine.loops import MEAN_COLUMNS, mean_loop
from optserve_server.engine.staging import Piece, StagedTensor
from optserve_server.engine.threads import Table, Threads

SKIP = 3  # column of a mean's table, which advances with the elements

_COMPUTE = {dtype.compute: dtype for dtype in (FLOAT32, FLOAT64)}

Gradients = Mapping[int, StagedTensor]


@dataclass(frozen=True, slots=True)
class Part:
    """What gradients of one dtype contribute."""

    dtype: DType
    table: Table
    weight: np.floating
    mean: NDArray[np.floating]


class Mean:
    """Memory for the mean gradient of a set."""

    def __init__(self, tensors: Sequence[TensorSpec], layout: Layout) -> None:
        self._tensors = tensors
        self._layout = layout
        self._arena = layout.allocate()

    def plan(self, gradients: Sequence[Gradients]) -> tuple[Gradients, list[Part]]:
        """The mean of gradients of the same tensors, by the tensor's index in the set, and the work of making it."""
        tables: dict[DType, list[list[int]]] = {}
        for index in gradients[0]:
            start = self._layout.places[index].start
            for k, gradient in enumerate(sorted((each[index] for each in gradients), key=_dtype_name)):
                table = tables.setdefault(gradient.spec.dtype, [])
                table += [
                    [start + piece.offset, piece.size, piece.address, piece.skip, int(k == 0)]
                    for piece in gradient.pieces
                ]
        parts = []
        for dtype in sorted(tables, key=lambda dtype: dtype.name):
            rows = np.array(tables[dtype], np.int64).reshape(-1, MEAN_COLUMNS)
            parts.append(Part(dtype, rows, dtype.compute.type(1 / len(gradients)), self._arena[dtype.compute]))
        return {index: self._at(index) for index in gradients[0]}, parts

    def compile(self, dtype: DType) -> None:
        """Compile the loop for gradients of a dtype now, by running it on nothing."""
        compute = dtype.compute
        mean_loop(dtype)(np.empty((0, MEAN_COLUMNS), np.int64), compute.type(1), self._arena[compute])

    def _at(self, index: int) -> StagedTensor:
        """Where the mean of a tensor will be."""
        place = self._layout.places[index]
        mean = StagedTensor(replace(self._tensors[index], dtype=_COMPUTE[place.compute]), 0)
        if place.size:
            address = self._arena[place.compute][place.start :].ctypes.data
            mean.add(Piece(0, place.size, address), replace=False)
        return mean


def dtype_of(dtype: DType) -> DType:
    """What the mean of gradients of a dtype is."""
    return _COMPUTE[dtype.compute]


def run(parts: Iterable[Part], threads: Threads) -> None:
    """Make the mean: gradients are added in an order that depends on nothing but their workers and dtypes."""
    for part in parts:
        threads.run_in_order(mean_loop(part.dtype), part.table, {SKIP: 1}, part.weight, part.mean)


def _dtype_name(gradient: StagedTensor) -> str:
    return gradient.spec.dtype.name
