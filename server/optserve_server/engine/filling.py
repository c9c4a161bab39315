"""Filling: tensors that were staged, written to their places in an arena."""

from collections.abc import Mapping

import numpy as np

from optserve._dtypes import DType
from optserve_server.engine.arena import Arena, ComputeType, Layout
from optserve_server.engine.loops import decode_loop
from optserve_server.engine.staging import StagedTensor
from optserve_server.engine.threads import Threads


def fill(arena: Arena, layout: Layout, tensors: Mapping[int, StagedTensor], threads: Threads) -> None:
    """Write staged tensors, by index, to their places in an arena."""
    tables: dict[tuple[ComputeType, DType], list[list[int]]] = {}
    for index, tensor in tensors.items():
        place = layout.places[index]
        table = tables.setdefault((place.compute, tensor.spec.dtype), [])
        itemsize = tensor.spec.dtype.itemsize
        table += [
            [place.start + piece.offset, piece.size, piece.address + piece.skip * itemsize] for piece in tensor.pieces
        ]
    for (compute, dtype), table in tables.items():
        if table:
            rows = np.array(table, np.int64)
            threads.run(decode_loop(dtype), rows, {2: dtype.itemsize}, arena[compute])
