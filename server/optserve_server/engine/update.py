"""Updates: the work that advances the pushed tensors, planned before anything changes and run in one pass."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._errors import InvalidHyperparameter
from optserve_server.engine.arena import ComputeType, Layout
from optserve_server.engine.groups import TensorGroup
from optserve_server.engine.loops import UPDATE_COLUMNS, Loop, update_loop
from optserve_server.engine.rows import SparseGradient
from optserve_server.engine.rules import Memory, Preparation, Rule, preparation
from optserve_server.engine.slot_formats import GRAIN, SlotFormat
from optserve_server.engine.staging import Piece, StagedTensor
from optserve_server.engine.threads import Ranges, Threads
from optserve_server.engine.work import COMPUTED, Arenas, Update, Work, check_computable

ROW_OF_SCALARS = 2  # column of an update's table
SKIPS = {4: 1, 6: 1}  # columns that advance with the elements
START_FROM_BEFORE = 7

# Dtypes that a loop reads: of gradients, and of the caller's parameters in sets of moments.
Read = tuple[DType, DType | None]

Factors = Mapping[int, float]  # what gradients are multiplied by, by the tensor's index

Scalars = tuple[Preparation, Any]  # of an update: what happens before every rule, and the rule's own NamedTuple


@dataclass(frozen=True, slots=True)
class LoopWork:
    """One loop over one table of ranges, on gradients of one dtype (and parameters of one), into arenas of one.

    `keeps` are gradients that the table has addresses of, and that nothing else may hold on to.
    """

    loop: Loop
    compute: ComputeType
    slots: Sequence[str]
    table: Ranges
    scalars: NDArray[np.floating]
    keeps: Sequence[SparseGradient] = ()

    def run(self, arenas: Arenas, threads: Threads) -> None:
        threads.run(self.loop, self.table, SKIPS, self.scalars, *self.arrays(arenas), grain=GRAIN)

    def arrays(self, arenas: Arenas) -> Iterable[NDArray[Any]]:
        """What the loop reads and writes."""
        chosen = (arenas.before, arenas.after, *(arenas.slots[name] for name in self.slots))
        return (arena[self.compute] for arena in chosen)


@dataclass(slots=True)
class Reads:
    """What a loop will have to read: ranges of whole gradients, and gradients of some rows with their ranges."""

    ranges: list[list[int]] = field(default_factory=list)
    rows: list[Ranges] = field(default_factory=list)
    sparse: list[SparseGradient] = field(default_factory=list)

    @property
    def table(self) -> Ranges:
        """All ranges."""
        return np.concatenate([np.array(self.ranges, np.int64).reshape(-1, UPDATE_COLUMNS), *self.rows])


class Planner:
    """Plans updates of one set by a rule for single elements: it knows the rule and the layout.

    `bound` is of gradients that are clipped by value, 0 if they are not; `formats` are of the slots that are kept in fewer
    bits, by name.
    """

    def __init__(
        self,
        rule: Rule,
        layout: Layout,
        *,
        moments_only: bool,
        bound: float,
        formats: Mapping[str, SlotFormat],
    ) -> None:
        self._rule = rule
        self._layout = layout
        self._moments_only = moments_only
        self._bound = bound
        self._formats = tuple(formats.get(name) for name in rule.slots)

    def plan(
        self,
        groups: Sequence[TensorGroup],
        gradients: Mapping[int, StagedTensor],
        parameters: Mapping[int, StagedTensor],
        steps: NDArray[np.int64],
        memory: Sequence[Memory],
        factors: Factors,
        updated: Collection[int],
        sparse: Mapping[int, SparseGradient],
    ) -> Update:
        """The update that these gradients make, each times its factor, by the tensor's index in the set; changes nothing.

        Of tensors that are `sparse`, only some rows change. Tensors that are not among those `updated` before in the same run
        start from the version before. Raises InvalidHyperparameter for values that overflow the type that the update is
        computed in.
        """
        rows: dict[tuple[int, int, Memory, float], int] = {}
        scalars: list[Scalars] = []
        memories: dict[int, Memory] = {}
        reads: dict[Read, Reads] = {}
        for number, group in enumerate(groups):
            for index in group.members:
                if index not in gradients and index not in sparse:
                    continue
                t = int(steps[index]) + 1
                memories[index], own = self._scalars(group, t, memory[index])
                row = rows.setdefault((number, t, memories[index], factors[index]), len(rows))
                if row == len(scalars):
                    scalars.append((preparation(group.optimizer, factors[index], self._bound), own))
                place, carry = self._layout.places[index], int(index not in updated)
                if index in sparse:
                    part = reads.setdefault((COMPUTED[place.compute], None), Reads())
                    part.rows.append(_rows(place.start, row, sparse[index], t))
                    part.sparse.append(sparse[index])
                    continue
                gradient, parameter = gradients[index], parameters.get(index)
                part = reads.setdefault(self.read(gradient, parameter), Reads())
                part.ranges += _ranges(place.start, row, gradient, parameter or gradient, carry, t)
        return Update([self._work(read, part, scalars) for read, part in reads.items()], memories)

    def _scalars(self, group: TensorGroup, t: int, memory: Memory) -> tuple[Memory, Any]:
        """What a tensor remembers at its update t, and the rule's scalars; raises InvalidHyperparameter if there are none."""
        try:
            remembered = self._rule.remember(group.optimizer, t, memory)
            return remembered, self._rule.scalars(group.optimizer, t, remembered)
        except ArithmeticError as error:
            raise InvalidHyperparameter(
                f"expected hyperparameters that update {t} can be computed with; got {group.optimizer} ({error})"
            ) from None

    def read(self, gradient: StagedTensor, parameter: StagedTensor | None) -> Read:
        """What the loop reads that updates a tensor."""
        return gradient.spec.dtype, (parameter or gradient).spec.dtype if self._moments_only else None

    def compile(self, read: Read, group: TensorGroup, arenas: Arenas, threads: Threads) -> None:
        """Compile the loop that reads these dtypes now rather than at the first push, by running it on nothing."""
        _, own = self._scalars(group, 1, tuple(self._rule.memory.values()))
        self._work(read, Reads(), [(preparation(group.optimizer, 1.0, self._bound), own)]).run(arenas, threads)

    def _work(self, read: Read, part: Reads, scalars: list[Scalars]) -> LoopWork:
        compute = read[0].compute
        rows = [(*prepared, *own) for prepared, own in scalars]
        for row in rows:
            check_computable(row, compute)
        kind: Any = type(scalars[0][1])
        loop = update_loop(self._rule, kind, *read, clips=self._bound > 0, formats=self._formats)
        return LoopWork(loop, compute, self._rule.slots, part.table, np.array(rows, compute), part.sparse)


def run(updates: Iterable[Update], arenas: Arenas, threads: Threads) -> None:
    """Run updates as if one after the other, from one version's parameters to another's; what can share a pass over memory
    does."""
    for works in _passes(updates):
        first = works[0]
        if not isinstance(first, LoopWork):
            first.run(arenas, threads)
            continue
        loops = [work for work in works if isinstance(work, LoopWork)]
        if arenas.before is arenas.after:
            for work in loops:
                work.table[:, START_FROM_BEFORE] = 0
        if len(loops) == 1:
            first.run(arenas, threads)
        else:
            table, scalars = _joined(loops)
            threads.run_in_order(first.loop, table, SKIPS, scalars, *first.arrays(arenas))


def _passes(updates: Iterable[Update]) -> Iterable[list[Work]]:
    """Work of one loop that may run together; different loops on one arena take turns in the updates' order."""
    passes: list[list[Work]] = []
    last: dict[ComputeType, list[Work]] = {}
    for update in updates:
        for work in update.work:
            if not isinstance(work, LoopWork):
                last.clear()
                passes.append([work])
                continue
            together = last.get(work.compute)
            if together is None or not isinstance(together[0], LoopWork) or together[0].loop is not work.loop:
                together = last[work.compute] = []
                passes.append(together)
            together.append(work)
    return passes


def _joined(works: Sequence[LoopWork]) -> tuple[Ranges, NDArray[np.floating]]:
    tables, rows = [], 0
    for work in works:
        table = work.table.copy()
        table[:, ROW_OF_SCALARS] += rows
        tables.append(table)
        rows += len(work.scalars)
    return np.concatenate(tables), np.concatenate([work.scalars for work in works])


def _ranges(
    start: int, row: int, gradient: StagedTensor, parameter: StagedTensor, carry: int, t: int
) -> list[list[int]]:
    """Rows of an update's table for one tensor that starts at an element of the arena.

    Where there are no parameters, the gradient stands for them: what is read there is multiplied by zero, and it is finite.
    """
    return [
        [start + begin, end - begin, row, left.address, left.skip + begin - left.offset,
         right.address, right.skip + begin - right.offset, carry, t]
        for begin, end, left, right in _common(gradient.pieces, parameter.pieces)
    ]  # fmt: skip


def _rows(start: int, row: int, gradient: SparseGradient, t: int) -> Ranges:
    """Rows of an update's table for some rows of a tensor that starts at an element of the arena, in which they stay."""
    table = np.zeros((len(gradient.rows), UPDATE_COLUMNS), np.int64)
    width = gradient.width
    table[:, 0], table[:, 1], table[:, ROW_OF_SCALARS] = start + gradient.rows * width, width, row
    table[:, 3] = table[:, 5] = gradient.values.ctypes.data
    table[:, 4] = table[:, 6] = np.arange(len(gradient.rows)) * width
    table[:, 8] = t
    return table


def _common(left: list[Piece], right: list[Piece]) -> list[tuple[int, int, Piece, Piece]]:
    """The runs on which two coverings of one tensor both have a single piece: begin, end, and the two."""
    runs = []
    i = j = 0
    while i < len(left) and j < len(right):
        left_end, right_end = left[i].offset + left[i].size, right[j].offset + right[j].size
        runs.append((max(left[i].offset, right[j].offset), min(left_end, right_end), left[i], right[j]))
        i, j = i + (left_end <= right_end), j + (right_end <= left_end)
    return runs
