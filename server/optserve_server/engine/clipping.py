"""Clipping: how much smaller a set's gradients are made, from their norms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._specification import BLOCK, TensorSpec
from optserve._transforms import Clip, ClipAdaptive, ClipGlobalNorm, ClipNorm, ClipValue
from optserve_server.engine.arena import Arena, Layout
from optserve_server.engine.loops import guard_loop
from optserve_server.engine.mean import SKIP
from optserve_server.engine.rows import SparseGradient
from optserve_server.engine.staging import StagedTensor
from optserve_server.engine.threads import Threads
from optserve_server.engine.update import Factors
from optserve_server.engine.work import Arenas

TORCH_EPS = 1e-6  # that torch adds to a norm before it divides by it
LEAST_NORM = 1e-6  # of a unit's gradient, in adaptive clipping


def reads_norms(clip: Clip | None) -> bool:
    """Whether a clip needs the norms that the guard measures."""
    return isinstance(clip, ClipGlobalNorm | ClipNorm)


def bound(clip: Clip | None) -> float:
    """The largest magnitude of an element; 0 if there is none."""
    return clip.max_value if isinstance(clip, ClipValue) else 0.0


def factors(clip: Clip | None, norms: Mapping[int, float]) -> Factors:
    """What to multiply each tensor's gradient by, from their norms."""
    match clip:
        case ClipGlobalNorm():
            return dict.fromkeys(norms, _factor(clip, math.hypot(*norms.values())))
        case ClipNorm():
            return {index: _factor(clip, norm) for index, norm in norms.items()}
        case _:
            return dict.fromkeys(norms, 1.0)


def _factor(clip: ClipGlobalNorm | ClipNorm, norm: float) -> float:
    if clip.convention == "torch":
        return min(1.0, clip.max_norm / (norm + TORCH_EPS))
    return clip.max_norm / norm if norm > clip.max_norm else 1.0


@dataclass(frozen=True, slots=True)
class Clipping:
    """Work that clips gathered gradients where they lie, before they are read."""

    clip: Clip
    tensors: tuple[TensorSpec, ...]
    gradients: Mapping[int, StagedTensor]
    layout: Layout
    sparse: Mapping[int, SparseGradient]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        if isinstance(self.clip, ClipAdaptive):
            self._adapt(self.clip, arenas)
            return
        norms = {index: _norm(gradient, threads) for index, gradient in self.gradients.items()}
        norms |= {index: gradient.norm for index, gradient in self.sparse.items()}
        for index, factor in factors(self.clip, norms).items():
            if factor != 1:
                values = self.sparse[index].values if index in self.sparse else self._of(arenas.gradient, index)
                values *= values.dtype.type(factor)

    def _adapt(self, clip: ClipAdaptive, arenas: Arenas) -> None:
        for index in self.gradients:
            if self.tensors[index].size:
                adapt(clip, self._of(arenas.before, index), self._of(arenas.gradient, index))

    def _of(self, arena: Arena, index: int) -> NDArray[np.floating]:
        return self.layout.elements(arena, index).reshape(self.tensors[index].shape)


def adapt(clip: ClipAdaptive, parameter: NDArray[np.floating], gradient: NDArray[np.floating]) -> None:
    """Clip a tensor's gradient, in place, against its parameters."""
    parameter_norms, gradient_norms = (_unit_norms(clip, each) for each in (parameter, gradient))
    largest = clip.clipping * np.maximum(parameter_norms, clip.eps)
    clipped = gradient_norms >= largest
    gradient *= np.where(clipped, largest / np.maximum(gradient_norms, LEAST_NORM), 1.0).astype(gradient.dtype)


def _unit_norms(clip: ClipAdaptive, array: NDArray[np.floating]) -> NDArray[np.float64]:
    """Norms of an array's units, of as many dimensions."""
    axes: tuple[int, ...] | None
    if array.squeeze().ndim <= 1:
        axes = None
    elif clip.convention == "torch":
        axes = tuple(range(1, array.ndim))
    else:
        axes = (0,) if array.ndim < 4 else tuple(range(array.ndim - 1))
    squares = np.square(array, dtype=np.float64)
    return np.asarray(np.sqrt(squares.sum(axis=axes, keepdims=True)))


def _norm(gradient: StagedTensor, threads: Threads) -> float:
    """Euclidean norm of a gathered gradient."""
    if not gradient.pieces:
        return 0.0
    blocks = -(-gradient.spec.size // BLOCK)
    sums, digests = np.zeros(blocks), np.zeros(blocks, np.uint32)
    (piece,) = gradient.pieces
    table = np.array([[0, piece.size, piece.address, piece.skip]], np.int64)
    threads.run(guard_loop(gradient.spec.dtype), table, {SKIP: 1}, sums, digests, grain=BLOCK)
    return math.sqrt(float(sums.sum()))
