"""Views: what readers are given of a set, its own memory or copies that all who read a version share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType, narrowed
from optserve._errors import InvalidTensor, InvalidTransform, TensorMismatch
from optserve._results import Position
from optserve._rows import Indices
from optserve._specification import Holds, ParameterSetSpec, TensorSpec
from optserve_server.engine import snapshot
from optserve_server.engine.arena import Arena, Layout
from optserve_server.engine.buffers import Buffers
from optserve_server.engine.pipeline import Pipeline
from optserve_server.engine.push import check_present
from optserve_server.engine.rows import check_rows
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.threads import Threads

MOST_BYTES = 1 << 30  # of rows of a tensor that are pulled: they may be asked for again and again

Rows = Mapping[int, Indices]  # or keys, by the tensor's index


class Views:
    """Makes snapshots of one set. Called under the set's lock but for the checks and sizes.

    `present` are the tensors that can be read: all, or in a set that holds moments only those of the last push.
    """

    def __init__(
        self,
        spec: ParameterSetSpec,
        layout: Layout,
        buffers: Buffers,
        slots: Mapping[str, Arena],
        pipeline: Pipeline,
        threads: Threads,
    ) -> None:
        self.present = tuple(range(len(spec.tensors))) if spec.holds is Holds.PARAMETERS else ()
        self._spec = spec
        self._layout = layout
        self._buffers = buffers
        self._slots = slots
        self._evaluation = pipeline.evaluation
        self._tables = pipeline.tables
        self._threads = threads
        self._copies: WeakValueDictionary[tuple[DType | None, bool], Snapshot] = (
            WeakValueDictionary()
        )  # of this version

    def forget(self) -> None:
        """There is another version: copies are made anew."""
        self._copies.clear()

    def pin(self, position: Position) -> Snapshot | None:
        """The current version in the set's own memory, to be released; None if that can't be."""
        if self._tables:  # of which only a part is there
            return None
        buffer = self._buffers.pin()
        if buffer is None:
            return None
        tensors = self._spec.tensors
        dtypes = [tensor.dtype for tensor in tensors]
        if not buffer.encoded:
            halves = [index for index, dtype in enumerate(dtypes) if dtype.is_half]
            snapshot.encode(tensors, halves, self._layout, buffer.arena, buffer.data, dtypes, self._threads)
            buffer.encoded = True
        return Snapshot(position, self.present, dtypes, buffer.data, buffer)

    def copy(self, position: Position, dtype: DType | None, *, evaluation: bool = False) -> Snapshot:
        """The current version in memory of its own, in elements no wider than a dtype."""
        copied = self._copies.get((dtype, evaluation))
        if copied is None:
            tensors = self._sized()
            dtypes = [narrowed(tensor.dtype, dtype) for tensor in tensors]
            data = snapshot.room(tensors, dtypes)
            arena = self._arena(evaluation=evaluation)
            plain = [index for index in self.present if index not in self._tables]
            snapshot.encode(tensors, plain, self._layout, arena, data, dtypes, self._threads)
            keys = {index: np.array(table.keys, np.int64) for index, table in self._tables.items()}
            for index, each in keys.items():
                self._encode_rows(index, np.arange(len(each)), arena, data[index], dtypes[index])
            copied = self._copies[dtype, evaluation] = Snapshot(position, self.present, dtypes, data, keys=keys)
        return copied

    def rows(
        self, position: Position, whole: Sequence[int], rows: Rows, dtype: DType | None, *, evaluation: bool
    ) -> Snapshot:
        """A copy of some rows of tensors, by index or, of tables, by key; and of others whole, which come first."""
        arena = self._arena(evaluation=evaluation)
        dtypes = [narrowed(tensor.dtype, dtype) for tensor in self._spec.tensors]
        data = [np.empty(0, np.uint8)] * len(self._spec.tensors)
        keys = {index: np.array(self._tables[index].keys, np.int64) for index in whole if index in self._tables}
        plain = [index for index in whole if index not in keys]
        for index in plain:
            data[index] = np.empty(self._spec.tensors[index].size * dtypes[index].itemsize, np.uint8)
        snapshot.encode(self._spec.tensors, plain, self._layout, arena, data, dtypes, self._threads)
        for index, each in (keys | dict(rows)).items():
            data[index] = self._encoded_rows(index, each, arena, dtypes[index])
        return Snapshot(position, (*whole, *rows), dtypes, data, keys=keys)

    def check(
        self, indices: Mapping[str, int], names: Sequence[str], rows: Mapping[str, Indices], *, evaluation: bool
    ) -> Rows:
        """The rows that a pull asks for by the tensor's index; raises TensorMismatch or InvalidTransform if it can't be had."""
        set_id = self._spec.id
        if rows:
            everything = range(len(self._spec.tensors)) if self._spec.holds is Holds.PARAMETERS else ()
            check_present(self._spec, indices, everything, [*names, *rows])
        for name, each in rows.items():
            tensor = self._spec.tensors[indices[name]]
            if not tensor.shape:
                raise TensorMismatch(f"set {set_id!r}: expected rows of a tensor that has some; got {tensor}")
            check_rows(self._spec, tensor, each)
            if (nbytes := len(each) * self._width(indices[name]) * tensor.dtype.itemsize) > MOST_BYTES:
                raise InvalidTensor(
                    f"set {set_id!r}: expected at most {MOST_BYTES:,} bytes of rows of {tensor}; {len(each)} take {nbytes:,}. "
                    "Take them in several calls"
                )
        if evaluation and not self._evaluation:
            raise InvalidTransform(
                f"set {set_id!r} keeps no parameters to evaluate beside those to train: expected an average, such as "
                "Transforms(average=EMA(0.999)), or a rule with some, such as ScheduleFreeAdamW"
            )
        return {indices[name]: each for name, each in rows.items()}

    def nbytes(self, dtype: DType | None) -> int:
        """Size of a copy."""
        return sum(tensor.size * narrowed(tensor.dtype, dtype).itemsize for tensor in self._sized())

    def rows_nbytes(self, whole: Sequence[int], rows: Rows, dtype: DType | None) -> int:
        """Size of a copy of some rows, and of some tensors whole."""
        sizes, tensors = self._sized(), self._spec.tensors
        elements = {index: len(each) * self._width(index) for index, each in rows.items()}
        elements |= {index: sizes[index].size for index in whole}
        return sum(size * narrowed(tensors[index].dtype, dtype).itemsize for index, size in elements.items())

    def _arena(self, *, evaluation: bool) -> Arena:
        return self._slots[self._evaluation] if evaluation else self._buffers.current.arena

    def _encoded_rows(self, index: int, rows: Indices, arena: Arena, dtype: DType) -> NDArray[np.uint8]:
        table = self._tables.get(index)
        found = rows if table is None else table.find(rows)
        data = np.empty(len(rows) * self._width(index) * dtype.itemsize, np.uint8)
        self._encode_rows(index, found, arena, data, dtype)
        if table is not None and (missing := found < 0).any():
            initial = snapshot.encode_values(table.initial(rows[missing]), dtype)
            data.reshape(len(rows), -1)[missing] = initial.reshape(int(missing.sum()), -1)
        return data

    def _encode_rows(self, index: int, rows: Indices, arena: Arena, into: NDArray[np.uint8], dtype: DType) -> None:
        snapshot.encode_rows(self._layout.places[index], self._width(index), arena, rows, into, dtype, self._threads)

    def _width(self, index: int) -> int:
        """Elements of a row."""
        return math.prod(self._spec.tensors[index].shape[1:])

    def _sized(self) -> list[TensorSpec]:
        """The tensors with the rows that they have by now."""
        return [
            replace(tensor, shape=(len(self._tables[index].keys), *tensor.shape[1:]))
            if index in self._tables
            else tensor
            for index, tensor in enumerate(self._spec.tensors)
        ]
