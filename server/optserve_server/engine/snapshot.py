"""Snapshots: one version of a set's tensors in wire format, shared by all who read that version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._results import Position
from optserve._rows import Indices
from optserve._specification import ParameterSetSpec, TensorSpec
from optserve_server.engine.arena import Arena, Layout, Place, padded
from optserve_server.engine.buffers import Buffer
from optserve_server.engine.loops import encode_loop
from optserve_server.engine.push import check_present
from optserve_server.engine.threads import Threads


@dataclass(eq=False, slots=True, weakref_slot=True)
class Snapshot:
    """Tensors at a position: `tensors` are indices into the set, `dtypes` and `data` their elements as they travel.

    `buffer` is the set's own memory, pinned until `ParameterSet.release`; None if the snapshot has memory of its own. `keys`
    are those of the rows of tables that are here whole.
    """

    position: Position
    tensors: tuple[int, ...]
    dtypes: Sequence[DType]
    data: Sequence[NDArray[np.uint8]]
    buffer: Buffer | None = None
    keys: Mapping[int, Indices] = field(default_factory=dict)

    def select(self, spec: ParameterSetSpec, indices: Mapping[str, int], names: Sequence[str]) -> Sequence[int]:
        """Indices of the named tensors in that order, or of all; raises TensorMismatch for one that is not here."""
        if not names:
            return self.tensors
        check_present(spec, indices, self.tensors, names)
        return [indices[name] for name in names]


def encode(
    specs: Sequence[TensorSpec], indices: Sequence[int], layout: Layout, arena: Arena, into: Sequence[NDArray[np.uint8]],
    dtypes: Sequence[DType], threads: Threads,
) -> None:  # fmt: skip
    """Write some tensors of an arena, as elements of the given dtypes, into memory; all lists are by the tensor's index."""
    tables: dict[tuple[DType, DType], list[list[int]]] = {}
    for index in indices:
        place = layout.places[index]
        if place.size:
            table = tables.setdefault((specs[index].dtype, dtypes[index]), [])
            table.append([place.start, place.size, into[index].ctypes.data])
    for (dtype, target), table in tables.items():
        rows = np.array(table, np.int64)
        threads.run(encode_loop(target), rows, {2: target.itemsize}, arena[dtype.compute])


def encode_rows(
    place: Place, width: int, arena: Arena, rows: Indices, into: NDArray[np.uint8], dtype: DType, threads: Threads
) -> None:
    """Write some rows of a tensor, one after the other; none for a negative one."""
    table = np.empty((len(rows), 3), np.int64)
    table[:, 0], table[:, 1] = place.start + rows * width, width
    table[:, 2] = into.ctypes.data + np.arange(len(rows)) * width * dtype.itemsize
    table = table[rows >= 0]
    if len(table) and width:
        threads.run(encode_loop(dtype), table, {2: dtype.itemsize}, arena[place.compute])


def encode_values(values: NDArray[np.floating], dtype: DType) -> NDArray[np.uint8]:
    """Elements as bytes of a dtype."""
    flat = np.ascontiguousarray(values).reshape(-1)
    encoded = np.empty(flat.size * dtype.itemsize, np.uint8)
    encode_loop(dtype)(np.array([[0, flat.size, encoded.ctypes.data]], np.int64), flat)
    return encoded


def room(specs: Sequence[TensorSpec], dtypes: Sequence[DType]) -> list[NDArray[np.uint8]]:
    """New memory for tensors, each padded to an aligned size."""
    sizes = [spec.size * dtype.itemsize for spec, dtype in zip(specs, dtypes, strict=True)]
    memory = np.empty(sum(map(padded, sizes)), np.uint8)
    parts, begin = [], 0
    for size in sizes:
        parts.append(memory[begin : begin + size])
        begin += padded(size)
    return parts
