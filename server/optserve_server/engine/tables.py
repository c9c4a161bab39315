"""Tables: tensors whose rows come into being when a gradient for their key first comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._errors import TensorMismatch
from optserve._rows import Constant, Indices, Initial, Normal
from optserve._specification import TensorSpec
from optserve_server.engine.arena import Layout
from optserve_server.engine.threads import Threads
from optserve_server.engine.work import Arenas

_GOLDEN, _FIRST, _SECOND = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Table:
    """The keys of one table in the order of their rows, and what new rows begin as."""

    def __init__(self, tensor: TensorSpec, initial: Initial, keys: Sequence[int] = ()) -> None:
        self.tensor = tensor
        self.keys: list[int] = list(keys)
        self._initial = initial
        self._rows = {key: row for row, key in enumerate(self.keys)}

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.tensor.size // self.tensor.shape[0]

    def find(self, keys: Indices) -> Indices:
        """The rows of keys, -1 for those that there are none of."""
        rows = self._rows
        return np.fromiter((rows.get(key, -1) for key in keys.tolist()), np.int64, len(keys))

    def check_room(self, count: int) -> None:
        """Raises TensorMismatch if so many rows more would be too many."""
        if len(self.keys) + count > self.tensor.shape[0]:
            raise TensorMismatch(
                f"expected at most {self.tensor.shape[0]} rows in table {self.tensor.name!r}; it has {len(self.keys)}, and "
                f"{count} keys are new. Create a set whose table has a larger capacity"
            )

    def add(self, keys: Indices) -> None:
        """Let keys have the next rows."""
        for key in keys.tolist():
            self._rows[key] = len(self.keys)
            self.keys.append(key)

    def initial(self, keys: Indices) -> NDArray[np.floating]:
        """What the rows of keys begin as, in the compute dtype [keys, width]."""
        shape, compute = (len(keys), self.width), self.tensor.dtype.compute
        match self._initial:
            case Constant(value):
                return np.full(shape, value, compute)
            case Normal(std, seed):
                # Box and Muller's, of 1 - u, since the logarithm of 0 is none.
                radius = np.sqrt(-2.0 * np.log1p(-_uniform(keys, 2 * self.width, 0, seed)))
                angle = 2.0 * np.pi * _uniform(keys, 2 * self.width, 1, seed)
                return (std * radius * np.cos(angle)).astype(compute)
            case uniform:
                drawn = _uniform(keys, 2 * self.width, 0, uniform.seed)
                return (uniform.low + (uniform.high - uniform.low) * drawn).astype(compute)


Tables = Mapping[int, Table]


@dataclass(frozen=True, slots=True)
class NewRows:
    """Work that lets new keys have rows: of parameters as the table says, of slots as the rule does."""

    table: Table
    keys: Indices
    index: int
    layout: Layout
    slots: Mapping[str, Layout]
    fills: Mapping[str, float]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        first = len(self.table.keys)
        begin = self.layout.places[self.index].start + first * self.table.width
        rows = arenas.after[self.layout.places[self.index].compute][begin : begin + len(self.keys) * self.table.width]
        rows[:] = self.table.initial(self.keys).reshape(-1)
        for name, layout in self.slots.items():
            place, share = layout.places[self.index], layout.places[self.index].size // self.table.tensor.shape[0]
            begin = place.start + first * share
            arenas.slots[name][place.compute][begin : begin + len(self.keys) * share] = self.fills.get(name, 0.0)
        self.table.add(self.keys)


def _uniform(keys: Indices, stride: int, part: int, seed: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) [keys, stride / 2] that depend on their key, place, part and seed only (splitmix64)."""
    places = np.arange(part, stride, 2, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mixed(_mixed(np.uint64(seed % 2**64) + keys.astype(np.uint64)[:, None] * _GOLDEN) + places * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = bits + _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
