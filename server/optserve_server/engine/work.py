"""Work: the parts of an update, planned before anything changes, and the memory that they act on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from optserve._dtypes import FLOAT32, FLOAT64
from optserve._errors import InvalidHyperparameter
from optserve_server.engine.arena import Arena, ComputeType
from optserve_server.engine.rules import Memory
from optserve_server.engine.threads import Threads

if TYPE_CHECKING:
    from optserve_server.engine.mean import Gathered

COMPUTED = {dtype.compute: dtype for dtype in (FLOAT32, FLOAT64)}
_LARGEST = {compute: float(np.finfo(compute).max) for compute in COMPUTED}


class Arenas(NamedTuple):
    """What work acts on: parameters of the version before and of the one after, slots, and a gathered gradient."""

    before: Arena
    after: Arena
    slots: Mapping[str, Arena]
    gradient: Arena


class Work(Protocol):
    """A part of an update."""

    def run(self, arenas: Arenas, threads: Threads) -> None:
        """Do it."""


@dataclass(frozen=True, slots=True)
class Update:
    """All the work of an update, in order, and the memory that each updated tensor has after it.

    What comes before is to `gather` gradients in memory of the set: this work changes nothing else, and `gathered` is what
    then lies there. If that is `recorded`, history keeps it instead of what was pushed. `samples` are those of all pushes so
    far that make this update, or a later one, each divided by `divisor`.
    """

    work: Sequence[Work]
    memories: Mapping[int, Memory]
    gather: Sequence[Work] = ()
    gathered: "Gathered | None" = None
    recorded: bool = False
    samples: float = 0.0
    divisor: float = 0.0


def check_computable(values: Iterable[float], compute: ComputeType) -> None:
    """Raises InvalidHyperparameter for values that overflow the type that an update is computed in."""
    values, largest = tuple(values), _LARGEST[compute]
    if not all(-largest <= value <= largest for value in values):
        raise InvalidHyperparameter(
            f"expected values whose update can be computed in {compute.name}; some overflow: {values}"
        )
