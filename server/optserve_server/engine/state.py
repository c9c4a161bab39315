"""All that a parameter set is at one version, as a value: what a checkpoint keeps and a restart brings back."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from optserve._policies import ASYNC, Policy
from optserve._results import Change, GroupDescription, Position
from optserve._specification import ParameterSetSpec
from optserve._state import GRADIENT, PARAMETERS, Shape
from optserve.optim import Optimizer
from optserve_server.engine import slot_formats
from optserve_server.engine.arena import Arena, Layout
from optserve_server.engine.groups import resolve
from optserve_server.engine.pipeline import Progress, slot_layouts, slot_shapes
from optserve_server.engine.sessions import Session


@dataclass(frozen=True, slots=True)
class State:
    """A set at a position, after a number of `events`.

    `optimizers` holds the hyperparameters in force by group, or their schedules, `changes` how they came to be, `policy` the
    one in force, and `policy_since` the version at which it took the place of another, if it did; `arenas` the parameters
    (absent in a set that holds moments only), the slots by name and the mean that pushes accumulate in; `sessions` who has
    pushed what, and `forgotten` the last epoch that is over; `undone` the first and last events of each part of history that
    was rewound; `keys` those of each table, by its index, in the order of its rows.
    """

    spec: ParameterSetSpec
    position: Position
    create_time: datetime.datetime
    optimizers: dict[str, Optimizer]
    changes: list[Change]
    arenas: dict[str, Arena]
    progress: Progress
    sessions: list[Session]
    forgotten: int
    events: int = 0
    undone: tuple[tuple[int, int], ...] = ()
    policy: Policy = ASYNC
    policy_since: int | None = None
    keys: dict[int, list[int]] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[GroupDescription, ...]:
        """The groups with the hyperparameters in force."""
        names = [tensor.name for tensor in self.spec.tensors]
        return tuple(
            GroupDescription(group.name, tuple(names[index] for index in group.members), self.optimizers[group.name])
            for group in resolve(self.spec)
        )

    def is_undone(self, event: int) -> bool:
        """Whether an event is of a part of history that was rewound."""
        return any(first <= event <= last for first, last in self.undone)

    def entries(self) -> dict[str, dict[str, NDArray[Any]]]:
        """The arenas' elements that are in use, where they lie: by the arena's name, then by the tensor's.

        A slot that is kept in blocks of fewer bits is one array, under the name of what it is computed in.
        """
        own = slot_formats.layout(self.spec)
        layouts = {PARAMETERS: own, GRADIENT: own, **slot_layouts(self.spec, own)}
        shapes = slot_shapes(self.spec)
        return {
            name: self._elements(arena, layouts[name], shapes.get(name) or [each.shape for each in self.spec.tensors])
            for name, arena in self.arenas.items()
        }

    @property
    def key_arrays(self) -> dict[str, NDArray[np.int64]]:
        """The keys of each table by the tensor's name."""
        return {self.spec.tensors[index].name: np.array(keys, np.int64) for index, keys in self.keys.items()}

    def with_keys(self, arrays: Mapping[str, NDArray[np.int64]]) -> Self:
        """The same with the keys of its tables, from `key_arrays`."""
        indices = {tensor.name: index for index, tensor in enumerate(self.spec.tensors)}
        return replace(self, keys={indices[name]: keys.tolist() for name, keys in arrays.items()})

    def _elements(self, arena: Arena, layout: Layout, shapes: Sequence[Shape]) -> dict[str, NDArray[Any]]:
        if any(array.size != layout.sizes[compute] for compute, array in arena.items()):
            return {compute.name: array for compute, array in arena.items()}
        elements = {}
        for index, (tensor, shape) in enumerate(zip(self.spec.tensors, shapes, strict=True)):
            every = layout.elements(arena, index).reshape(shape)
            elements[tensor.name] = every[: len(self.keys[index])] if index in self.keys else every
        return elements
