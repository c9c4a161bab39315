"""Bases: copies of the parameters that workers have, from which their gradients are compensated or their training measured."""

import numpy as np

from optserve.staleness import GapAware, Staleness
from optserve_server.engine.arena import Arena, Layout, copy
from optserve_server.engine.loops import step_loop
from optserve_server.engine.threads import Threads


class Steps:
    """How far each element usually moves in an update: running means of the squares, since this was made."""

    def __init__(self, decay: float, layout: Layout, parameters: Arena) -> None:
        self.squares = layout.allocate()
        self._before = copy(parameters)
        self._decay = decay
        self._layout = layout
        self._count = 0

    @property
    def correction(self) -> float:
        """What the squares are to be multiplied by, since they began at zero."""
        return 1.0 / (1.0 - self._decay**self._count) if self._count else 0.0

    def moved(self, parameters: Arena, threads: Threads) -> None:
        """Take note of an update of all tensors."""
        self._count += 1
        for compute, before in self._before.items():
            table = np.array([[0, before.size]], np.int64)
            decay = np.array([self._decay], compute)
            threads.run(step_loop(), table, {}, decay, before, self.squares[compute], parameters[compute])


class Bases:
    """Versions that workers hold, a copy of each, made when the first of them reads it. Called under the set's lock.

    Who holds one until then holds the next instead; `let_go` is for those that are gone.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._copies: dict[int, Arena] = {}
        self._held: dict[str, int] = {}  # version by client
        self._decay: float | None = None
        self.steps: Steps | None = None

    @property
    def versions(self) -> list[int]:
        """Those of which there is a copy."""
        return sorted(self._copies)

    def measure(self, choice: Staleness | None) -> None:
        """Measure steps from now on, if the choice wants that."""
        self._decay = choice.decay if isinstance(choice, GapAware) else None
        self.steps = None

    def hold(self, client_id: str, version: int, parameters: Arena) -> None:
        """A worker has read a version, which is the present one; raises MemoryError."""
        if self._decay is not None and self.steps is None:
            self.steps = Steps(self._decay, self._layout, parameters)
        if version not in self._copies:
            self._copies[version] = copy(parameters)
        self._held[client_id] = version
        self._forget()

    def moved(self, parameters: Arena, threads: Threads) -> None:
        """There was an update."""
        if self.steps is not None:
            self.steps.moved(parameters, threads)

    def let_go(self, client_id: str) -> None:
        """A worker is gone."""
        if self._held.pop(client_id, None) is not None:
            self._forget()

    def at(self, version: int) -> Arena | None:
        """The parameters of a version, if somebody holds it."""
        return self._copies.get(version)

    def clear(self) -> None:
        """Let go of everything."""
        self._copies.clear()
        self._held.clear()
        self.steps = None

    def _forget(self) -> None:
        held = set(self._held.values())
        for version in [version for version in self._copies if version not in held]:
            del self._copies[version]


def compile(layout: Layout) -> None:
    """Compile the loop that measures steps now, by running it on nothing."""
    for compute in layout.sizes:
        nothing = np.empty(0, compute)
        step_loop()(np.empty((0, 2), np.int64), np.empty(1, compute), nothing, nothing, nothing)
