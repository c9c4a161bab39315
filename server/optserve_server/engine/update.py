"""An update: the loops that advance the pushed tensors by one step, planned before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._errors import InvalidHyperparameter
from optserve_server.engine.arena import Arena, ComputeType, Layout
from optserve_server.engine.groups import TensorGroup
from optserve_server.engine.loops import UPDATE_COLUMNS, Loop, update_loop
from optserve_server.engine.rules import Memory, Rule, preparation
from optserve_server.engine.staging import Piece, StagedTensor
from optserve_server.engine.threads import Table, Threads


@dataclass(frozen=True, slots=True)
class Work:
    """One loop over one table of ranges, on gradients of one dtype."""

    loop: Loop
    dtype: DType
    table: Table
    arguments: tuple[NDArray[Any], ...]

    def run(self, threads: Threads) -> None:
        """Run it; the addresses of gradients and parameters advance with the elements."""
        size = self.dtype.itemsize
        threads.run(self.loop, self.table, {3: size, 4: size}, *self.arguments)


@dataclass(frozen=True, slots=True)
class Update:
    """All the work of an update, and the memory that each updated tensor has after it."""

    work: list[Work]
    memories: dict[int, Memory]


class Planner:
    """Plans updates of one set: it knows the rule, the layout and the arenas."""

    def __init__(
        self, rule: Rule, layout: Layout, parameters: Arena, slots: Sequence[Arena], *, moments_only: bool
    ) -> None:
        self._rule = rule
        self._layout = layout
        self._arenas = [parameters, *slots]
        self._moments_only = moments_only

    def plan(
        self,
        groups: Sequence[TensorGroup],
        gradients: Mapping[int, StagedTensor],
        parameters: Mapping[int, StagedTensor],
        steps: NDArray[np.int64],
        memory: Sequence[Memory],
    ) -> Update:
        """The update that these gradients make, by the tensor's index in the set; changes nothing.

        Raises InvalidHyperparameter for values that overflow the type that the update is computed in.
        """
        rows: dict[tuple[int, int, Memory], int] = {}
        scalars: list[tuple[float, ...]] = []
        memories: dict[int, Memory] = {}
        ranges: dict[tuple[ComputeType, DType], list[list[int]]] = {}
        for number, group in enumerate(groups):
            for index in group.members:
                if index not in gradients:
                    continue
                t = int(steps[index]) + 1
                memories[index] = self._rule.remember(group.optimizer, t, memory[index])
                row = rows.setdefault((number, t, memories[index]), len(rows))
                if row == len(scalars):
                    own = self._rule.scalars(group.optimizer, t, memories[index])
                    scalars.append((*preparation(group.optimizer), *own))
                dtype = gradients[index].spec.dtype
                table = ranges.setdefault((dtype.compute, dtype), [])
                table += _ranges(self._layout.places[index].start, row, gradients[index], parameters.get(index))
        return Update([self._work(dtype, table, scalars) for (_, dtype), table in ranges.items()], memories)

    def compile(self, dtypes: set[DType], group: TensorGroup) -> None:
        """Compile the loops for gradients of these dtypes now rather than at the first push, by running them on nothing."""
        memory = self._rule.remember(group.optimizer, 1, tuple(self._rule.memory.values()))
        scalars = [(*preparation(group.optimizer), *self._rule.scalars(group.optimizer, 1, memory))]
        for dtype in dtypes:
            work = self._work(dtype, [], scalars)
            work.loop(work.table, *work.arguments)

    def _work(self, dtype: DType, ranges: list[list[int]], scalars: list[tuple[float, ...]]) -> Work:
        with np.errstate(over="ignore"):
            values = np.array(scalars, dtype.compute)
        if not np.isfinite(values).all():
            raise InvalidHyperparameter(
                f"expected hyperparameters whose update can be computed in {dtype.compute.name}; some overflow: {scalars[0]}"
            )
        return Work(
            update_loop(self._rule, dtype, moments_only=self._moments_only),
            dtype,
            np.array(ranges, np.int64).reshape(-1, UPDATE_COLUMNS),
            (values, *(arena[dtype.compute] for arena in self._arenas)),
        )


def _ranges(start: int, row: int, gradient: StagedTensor, parameter: StagedTensor | None) -> list[list[int]]:
    """Rows of an update's table for one tensor that starts at an element of the arena."""
    size = gradient.spec.dtype.itemsize
    if parameter is None:  # any readable memory: what is read there is multiplied by zero, and gradients are finite
        return [[start + piece.offset, piece.size, row, piece.address, piece.address] for piece in gradient.pieces]
    return [
        [start + begin, end - begin, row, left.address + (begin - left.offset) * size,
         right.address + (begin - right.offset) * size]
        for begin, end, left, right in _common(gradient.pieces, parameter.pieces)
    ]  # fmt: skip


def _common(left: list[Piece], right: list[Piece]) -> list[tuple[int, int, Piece, Piece]]:
    """The runs on which two coverings of one tensor both have a single piece: begin, end, and the two."""
    runs = []
    i = j = 0
    while i < len(left) and j < len(right):
        left_end, right_end = left[i].offset + left[i].size, right[j].offset + right[j].size
        runs.append((max(left[i].offset, right[j].offset), min(left_end, right_end), left[i], right[j]))
        i, j = i + (left_end <= right_end), j + (right_end <= left_end)
    return runs
