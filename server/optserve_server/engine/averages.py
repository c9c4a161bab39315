"""Averages: slots that follow the parameters after the rule, Lookahead's and those to evaluate."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._state import AVERAGE, LOOKAHEAD
from optserve._transforms import EMA, Average, Lookahead, Transforms
from optserve_server.engine.arena import ComputeType, Layout
from optserve_server.engine.loops import BLEND_COLUMNS, blend_loop
from optserve_server.engine.threads import Ranges, Threads
from optserve_server.engine.work import Arenas


@dataclass(frozen=True, slots=True)
class Blend:
    """Movement of a slot towards the parameters of some tensors; see `loops.blend_loop`."""

    slot: str
    compute: ComputeType
    table: Ranges
    scalars: NDArray[np.floating]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        parameters, slot = arenas.after[self.compute], arenas.slots[self.slot][self.compute]
        threads.run(blend_loop(), self.table, {}, self.scalars, parameters, slot)


def slots(transforms: Transforms) -> tuple[str, ...]:
    """Names of the slots that transforms need; they begin as the parameters."""
    return tuple(
        name for name, value in ((LOOKAHEAD, transforms.lookahead), (AVERAGE, transforms.average)) if value is not None
    )


def plan(transforms: Transforms, layout: Layout, tensors: Iterable[int], steps: NDArray[np.int64]) -> Iterator[Blend]:
    """What follows the rule once it has updated some tensors, which have had `steps` updates before."""
    counts = {index: int(steps[index]) + 1 for index in tensors}
    if transforms.lookahead is not None:
        yield from _blends(
            LOOKAHEAD, layout, {k: _slow_weight(transforms.lookahead, t) for k, t in counts.items()}, 1.0
        )
    if transforms.average is not None:
        yield from _blends(AVERAGE, layout, {k: _average_weight(transforms.average, t) for k, t in counts.items()}, 0.0)


def compile(layout: Layout) -> None:
    """Compile the loop now, by running it on nothing."""
    for compute in layout.sizes:
        nothing = np.empty(0, compute)
        blend_loop()(np.empty((0, BLEND_COLUMNS), np.int64), np.empty((0, 2), compute), nothing, nothing)


def _slow_weight(lookahead: Lookahead, t: int) -> float:
    return lookahead.alpha if t % lookahead.every == 0 else 0.0


def _average_weight(average: Average, t: int) -> float:
    """How much the parameters after update t weigh in the new average."""
    if isinstance(average, EMA):
        return 1.0 if t == 1 else 1.0 - average.decay
    since, remainder = divmod(t - average.start, average.every)
    if since < 0:
        return 1.0
    return 1.0 / (since + 1) if remainder == 0 else 0.0


def _blends(slot: str, layout: Layout, weights: Mapping[int, float], back: float) -> Iterator[Blend]:
    by_compute: dict[ComputeType, list[list[int]]] = {}
    rows: dict[float, int] = {}
    for index, weight in weights.items():
        place = layout.places[index]
        if weight and place.size:
            row = rows.setdefault(weight, len(rows))
            by_compute.setdefault(place.compute, []).append([place.start, place.size, row])
    for compute, table in by_compute.items():
        yield Blend(slot, compute, np.array(table, np.int64), np.array([[weight, back] for weight in rows], compute))
