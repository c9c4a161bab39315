"""Snapshots: one version of a set's tensors in wire format, shared by everyone who pulls that version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._results import Position
from optserve._specification import ParameterSetSpec, TensorSpec
from optserve_server.engine.arena import Arena, ComputeType, Layout, aligned
from optserve_server.engine.loops import encode_loop
from optserve_server.engine.push import check_present
from optserve_server.engine.threads import Threads


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Tensors at a position: `tensors` are indices into the set; `data` gives the wire bytes of each."""

    position: Position
    tensors: tuple[int, ...]
    data: dict[int, NDArray[np.uint8]]

    def select(self, spec: ParameterSetSpec, indices: Mapping[str, int], names: Sequence[str]) -> Sequence[int]:
        """Indices of the named tensors in that order, or of all; raises TensorMismatch for one that is not here."""
        if not names:
            return self.tensors
        check_present(spec, indices, self.tensors, names)
        return [indices[name] for name in names]


def take(
    position: Position,
    specs: Sequence[TensorSpec],
    indices: Sequence[int],
    layout: Layout,
    arena: Arena,
    threads: Threads,
) -> Snapshot:
    """Encode some tensors of an arena; the caller keeps the arena from changing meanwhile."""
    buffer = aligned(sum(specs[index].nbytes for index in indices), zeroed=False)
    data: dict[int, NDArray[np.uint8]] = {}
    tables: dict[tuple[ComputeType, DType], list[list[int]]] = {}
    begin, address = 0, buffer.ctypes.data
    for index in indices:
        spec, place = specs[index], layout.places[index]
        data[index] = buffer[begin : begin + spec.nbytes]
        if spec.size:
            tables.setdefault((place.compute, spec.dtype), []).append([place.start, place.size, address + begin])
        begin += spec.nbytes
    for (compute, dtype), table in tables.items():
        threads.run(encode_loop(dtype), np.array(table, np.int64), {2: dtype.itemsize}, arena[compute])
    return Snapshot(position, tuple(indices), data)
