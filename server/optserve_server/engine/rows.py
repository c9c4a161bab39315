"""Row-sparse gradients: what was pushed for some rows of a tensor, each row once and in ascending order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._errors import InvalidTransform, NonFiniteValue, TensorMismatch
from optserve._rows import Indices
from optserve._specification import ParameterSetSpec, StateFormat, TensorSpec
from optserve_server.engine.arena import Layout, assign
from optserve_server.engine.loops import decode_loop
from optserve_server.engine.staging import StagedTensor
from optserve_server.engine.threads import Threads
from optserve_server.engine.work import Arenas, check_computable


@dataclass(slots=True)
class SparseGradient:
    """Rows, int64 [k], and their gradients [k, width] in the compute dtype. Of a table, rows are keys until they are found."""

    rows: Indices
    values: NDArray[np.floating]

    @property
    def norm(self) -> float:
        """Euclidean norm."""
        return math.sqrt(float(np.square(self.values, dtype=np.float64).sum()))

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(self.values.shape[1])


def gathered(rows: Indices, staged: StagedTensor) -> SparseGradient:
    """The gradient that a push staged for rows; those that came more than once are added up, in the order of the push."""
    dtype = staged.spec.dtype
    values = np.empty(staged.spec.size, dtype.compute)
    table = [[piece.offset, piece.size, piece.address + piece.skip * dtype.itemsize] for piece in staged.pieces]
    decode_loop(dtype)(np.array(table, np.int64).reshape(-1, 3), values)
    return combined([rows], [values.reshape(len(rows), math.prod(staged.spec.shape[1:]))])


def merged(gradients: Sequence[SparseGradient], weights: Sequence[float]) -> SparseGradient:
    """The weighted sum of several; rows that are not in one are zero there.

    Raises InvalidHyperparameter for weights that overflow, NonFiniteValue for sums that do.
    """
    check_computable(weights, gradients[0].values.dtype)
    scaled = [each.values * each.values.dtype.type(weight) for each, weight in zip(gradients, weights, strict=True)]
    return combined([each.rows for each in gradients], scaled)


def combined(rows: Sequence[Indices], values: Sequence[NDArray[np.floating]]) -> SparseGradient:
    """All of these rows, each once; raises NonFiniteValue if a sum overflows."""
    every_row = np.concatenate(rows)
    every_value = np.concatenate(values) if len(values) > 1 else values[0]
    if np.all(every_row[1:] > every_row[:-1]):
        return SparseGradient(every_row, every_value)
    order = np.argsort(every_row, kind="stable")
    ordered = every_row[order]
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    with np.errstate(over="ignore"):
        sums = np.add.reduceat(every_value[order], first, axis=0)
    if not np.isfinite(sums).all() and np.isfinite(every_value).all():
        raise NonFiniteValue("expected rows that come more than once to have a finite sum; some overflow")
    return SparseGradient(ordered[first], sums)


def compile(dtype: DType) -> None:
    """Compile the loop that `gathered` needs, by running it on nothing."""
    decode_loop(dtype)(np.empty((0, 3), np.int64), np.empty(0, dtype.compute))


def check_transforms(spec: ParameterSetSpec) -> None:
    """Raises InvalidTransform where a transform would have to visit every row."""
    if spec.transforms.reads_parameters or spec.transforms.accumulate > 1:
        raise InvalidTransform(
            f"set {spec.id!r} averages, accumulates or clips adaptively, which reads all rows: expected dense gradients; got "
            "row-sparse ones. Push all rows, or create a set without these transforms"
        )
    if spec.state is StateFormat.INT8:
        raise InvalidTransform(
            f"set {spec.id!r} keeps its state in blocks of 8 bits, which are updated as a whole: expected dense gradients; got "
            "row-sparse ones. Push all rows, or create a set with state='bfloat16'"
        )


def check_rows(spec: ParameterSetSpec, tensor: TensorSpec, rows: Indices) -> None:
    """Raises TensorMismatch for rows that a tensor does not have; a table has any."""
    if tensor.name in spec.tables or not rows.size:
        return
    least, largest = int(rows.min()), int(rows.max())
    if least < 0 or largest >= tensor.shape[0]:
        wrong = least if least < 0 else largest
        raise TensorMismatch(f"set {spec.id!r}: expected rows 0 to {tensor.shape[0] - 1} of {tensor}; got row {wrong}")


@dataclass(frozen=True, slots=True)
class Carried:
    """Work that brings tensors over from the version before, whole, where an update of some of their rows writes elsewhere."""

    tensors: Sequence[int]
    layout: Layout

    def run(self, arenas: Arenas, threads: Threads) -> None:
        if arenas.before is arenas.after:
            return
        assign(arenas.after, arenas.before, [self.layout.places[index] for index in self.tensors])
