"""Arenas: every tensor of a set, one after the other, in contiguous 64-byte-aligned memory."""

import itertools
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._specification import TensorSpec

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
HUGE_PAGE = 2 << 20  # bytes

ComputeType = np.dtype[Any]
Arena = dict[ComputeType, NDArray[Any]]  # one array for each compute type; most sets have one


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: the array of its compute type, and its first element there."""

    compute: ComputeType
    start: int
    size: int


class Layout:
    """Places of a set's tensors, the same in every arena of the set; half precision is laid out as float32.

    Tensors begin at multiples of `alignment` bytes.
    """

    def __init__(self, tensors: Sequence[TensorSpec], alignment: int = ALIGNMENT) -> None:
        self.sizes: dict[ComputeType, int] = {}
        self.places: list[Place] = []
        for tensor in tensors:
            compute = tensor.dtype.compute
            start = self.sizes.get(compute, 0)
            self.places.append(Place(compute, start, tensor.size))
            self.sizes[compute] = start + padded(tensor.size * compute.itemsize, alignment) // compute.itemsize

    @property
    def nbytes(self) -> int:
        """Size of one arena in bytes."""
        return sum(size * compute.itemsize for compute, size in self.sizes.items())

    def allocate(self) -> Arena:
        """A new arena of zeros."""
        return self.view(aligned(self.nbytes))

    def view(self, memory: NDArray[np.uint8]) -> Arena:
        """An arena in memory that is there already."""
        return {
            compute: memory[start : start + self.sizes[compute] * compute.itemsize].view(compute)
            for compute, start in self._starts().items()
        }

    def elements(self, arena: Arena, index: int) -> NDArray[Any]:
        """A tensor's elements in an arena, where they lie."""
        place = self.places[index]
        return arena[place.compute][place.start : place.start + place.size]

    def offset(self, index: int) -> int:
        """Where a tensor begins in an arena's memory, in bytes."""
        place = self.places[index]
        return self._starts()[place.compute] + place.start * place.compute.itemsize

    def _starts(self) -> dict[ComputeType, int]:
        ends = itertools.accumulate((size * compute.itemsize for compute, size in self.sizes.items()), initial=0)
        return dict(zip(self.sizes, ends, strict=False))


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Bytes up to the next boundary of alignment."""
    return -(-nbytes // alignment) * alignment


def copy(arena: Arena, places: Iterable[Place] | None = None) -> Arena:
    """The same values in new memory; those at some places only, and zeros elsewhere, which take no room."""
    if places is None:
        return {compute: array.copy() for compute, array in arena.items()}
    copied = {compute: aligned(array.nbytes).view(array.dtype) for compute, array in arena.items()}
    assign(copied, arena, places)
    return copied


def assign(target: Arena, source: Arena, places: Iterable[Place] | None = None) -> None:
    """Let an arena have the values of another, all or those at some places."""
    if places is None:
        for compute, array in target.items():
            np.copyto(array, source[compute])
    else:
        for place in places:
            elements = slice(place.start, place.start + place.size)
            target[place.compute][elements] = source[place.compute][elements]


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes at a cache line's boundary, to be kept for long: on huge pages, and apart from the C allocator's heap,
    where the update loops were found to run at 0.8 of their speed."""
    if nbytes >= HUGE_PAGE:
        mapping = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(mapping, np.uint8)
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]
