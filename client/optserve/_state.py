"""State: where a parameter set stands, as a value that can be moved; and its outline, which travels before the elements."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from optserve._dtypes import computed
from optserve._errors import InvalidState
from optserve._results import GroupDescription
from optserve._specification import TensorSpec
from optserve.optim import Group, Optimizer

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Parts = dict[str, Mapping[str, Array]]

# Names of parts beside the rule's slots, none that a rule's could have.
PARAMETERS, GRADIENT = "parameters", "transform:gradient"
AVERAGE, LOOKAHEAD = "transform:average", "transform:lookahead"
LONGEST_NAME = 512
MOST = 2**53  # updates or pushes that are counted


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of some tensors, which go by index: the parameters, a slot, or the mean that pushes accumulate in."""

    name: str
    tensors: tuple[int, ...]
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A state but for its elements; tensors go by index. `memory` is by name and tensor, `group_memory` by group and name."""

    version: int
    steps: tuple[int, ...]
    memory: Mapping[str, Mapping[int, float]]
    group_memory: Mapping[str, Mapping[str, float]]
    parts: tuple[Part, ...]
    accumulated: int = 0
    skipped: int = 0
    samples: float = 0.0
    divisor: float = 0.0

    def elements(self, tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
        """What comes after the outline, in its order."""
        return [
            TensorSpec(_label(part.name, tensors[index].name), computed(tensors[index].dtype), shape)
            for part in self.parts
            for index, shape in zip(part.tensors, part.shapes, strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Accumulation:
    """Pushes that wait for others to make an update with: how many, and what they add to its mean gradient, by tensor.

    `samples` are theirs together, and `divisor` what each was divided by as it was added up; 0 stands for one sample each, and
    for the number of pushes that make an update.
    """

    pushes: int
    gradients: Mapping[str, Array]
    samples: float = 0.0
    divisor: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class State:
    """Where a parameter set stands. One created from it makes of the same gradients the same updates, bit for bit.

    `tensors` are the registered ones; `groups` have the hyperparameters in force, `default` first. Arrays are in the dtype that
    the server calculates in, float32 for half precision: `parameters` by tensor (none, if the set holds moments only), `slots`
    by slot and tensor, those of the transforms included. `steps` counts the updates of each tensor; one that has had none may
    be absent from slots and memory, and begins as in a new set. `memory`, by tensor and name, and `group_memory`, by group and
    name, are what the rule remembers besides. `skipped` counts pushes in a row. Raises InvalidState.
    """

    tensors: tuple[TensorSpec, ...]
    groups: tuple[GroupDescription, ...]
    parameters: Mapping[str, Array]
    slots: Mapping[str, Mapping[str, Array]]
    steps: Mapping[str, int]
    memory: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    group_memory: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    version: int = 0
    accumulation: Accumulation | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        if not self.groups or self.groups[0].name != Group.DEFAULT:
            raise InvalidState(f"expected the group 'default' first; got {[group.name for group in self.groups]}")
        names = {tensor.name for tensor in self.tensors}
        for name in itertools.chain(self.memory, *self._parts().values()):
            if name not in names:
                raise InvalidState(f"expected tensors of the state, {_some(names)}; got {name!r}")
        if names != set(self.steps):
            raise InvalidState(f"expected steps of every tensor, {_some(names)}; got those of {_some(self.steps)}")
        waiting = self.accumulation.pushes if self.accumulation is not None else 1
        counts = {**{f"steps of {name!r}": count for name, count in self.steps.items()}, "version": self.version}
        for what, count in (counts | {"skipped": self.skipped, "waiting pushes": waiting}).items():
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST:
                raise InvalidState(f"expected {what} to be a whole number from 0 to 2**53; got {count!r}")

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the group `default`, with the values in force."""
        return self.groups[0].optimizer

    def optimizer_of(self, tensor: str) -> Optimizer:
        """The optimizer of a tensor's group; raises InvalidState for a tensor that no group has."""
        for group in self.groups:
            if tensor in group.tensors:
                return group.optimizer
        raise InvalidState(f"expected a tensor of a group of this state; got {tensor!r}")

    def evaluated(self) -> Self:
        """The same with the values that schedules have at the next update in their place."""
        groups = (replace(group, optimizer=group.optimizer.at(self.version)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    def creation_groups(self) -> tuple[Group, ...]:
        """The groups as a set is created with: those beside `default`, with what is different there."""
        common = self.optimizer.hyperparameters
        return tuple(
            Group(
                group.name,
                *group.tensors,
                **{name: value for name, value in group.optimizer.hyperparameters.items() if value != common[name]},
            )
            for group in self.groups[1:]
        )

    def packed(self, *, parameters: bool = True) -> tuple[Outline, list[Array]]:
        """The outline and the elements in its order; without the parameters, what a set takes that holds moments only.

        Raises InvalidState for a dtype that would lose some of an array's bits.
        """
        parts = self._parts(parameters=parameters)
        return self._outline(parts), list(self._elements(parts))

    def _outline(self, parts: Parts) -> Outline:
        indices = {tensor.name: index for index, tensor in enumerate(self.tensors)}
        memory: dict[str, dict[int, float]] = {}
        for tensor, values in self.memory.items():
            for name, value in values.items():
                memory.setdefault(name, {})[indices[tensor]] = float(value)
        return Outline(
            version=self.version,
            steps=tuple(self.steps[tensor.name] for tensor in self.tensors),
            memory=memory,
            group_memory=self.group_memory,
            parts=tuple(
                Part(name, tuple(indices[tensor] for tensor in arrays), tuple(map(np.shape, arrays.values())))
                for name, arrays in parts.items()
            ),
            accumulated=self.accumulation.pushes if self.accumulation is not None else 0,
            skipped=self.skipped,
            samples=self.accumulation.samples if self.accumulation is not None else 0.0,
            divisor=self.accumulation.divisor if self.accumulation is not None else 0.0,
        )

    def _elements(self, parts: Parts) -> Iterator[Array]:
        dtypes = {tensor.name: tensor.dtype.compute for tensor in self.tensors}
        for name, arrays in parts.items():
            for tensor, array in arrays.items():
                if not np.can_cast(np.asarray(array).dtype, dtypes[tensor], "safe"):
                    raise InvalidState(
                        f"expected {_label(name, tensor)!r} as {dtypes[tensor]}; got {np.asarray(array).dtype}"
                    )
                yield np.ascontiguousarray(array, dtypes[tensor])

    def _parts(self, *, parameters: bool = True) -> Parts:
        own = {PARAMETERS: self.parameters} if parameters and self.parameters else {}
        waiting = {GRADIENT: self.accumulation.gradients} if self.accumulation is not None else {}
        return {**own, **waiting, **self.slots}


def assembled(
    tensors: Sequence[TensorSpec], groups: Iterable[GroupDescription], outline: Outline, arrays: Iterable[Array]
) -> State:
    """A state from its outline and elements."""
    elements = iter(arrays)
    parts = {
        part.name: {tensors[index].name: array for index, array in zip(part.tensors, elements, strict=False)}
        for part in outline.parts
    }
    memory: dict[str, dict[str, float]] = {}
    for name, values in outline.memory.items():
        for index, value in values.items():
            memory.setdefault(tensors[index].name, {})[name] = value
    waiting = parts.pop(GRADIENT, None)
    return State(
        tensors=tuple(tensors),
        groups=tuple(groups),
        parameters=parts.pop(PARAMETERS, {}),
        slots=parts,
        steps={tensor.name: count for tensor, count in zip(tensors, outline.steps, strict=True)},
        memory=memory,
        group_memory=outline.group_memory,
        version=outline.version,
        accumulation=Accumulation(outline.accumulated, waiting, outline.samples, outline.divisor)
        if waiting is not None
        else None,
        skipped=outline.skipped,
    )


def _label(part: str, tensor: str) -> str:
    return tensor if part == PARAMETERS else f"{part} of {tensor}"[:LONGEST_NAME]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(map(repr, listed[:10])) + (", ..." if len(listed) > 10 else "") or "none"
