"""What the service answers: positions, receipts, parameters, descriptions."""

import datetime
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optserve._errors import Refusal
from optserve._policies import ASYNC, Policy
from optserve._rows import RowSparse
from optserve._specification import Holds, Journal, ParameterSetSpec
from optserve.optim import Group, Optimizer
from optserve.schedules import Schedule


class Outcome(enum.IntEnum):
    """What was done with a push: it made an update, was added to others for a later one, skipped, refused, or, since it came
    too late, was too stale or not to be trusted, discarded."""

    APPLIED = 1
    ACCUMULATED = 2
    SKIPPED = 3
    REFUSED = 4
    DISCARDED = 5


class Durability(enum.IntEnum):
    """How far a push had travelled when its receipt was sent."""

    MEMORY = 1
    JOURNAL = 2
    CHECKPOINT = 3


@dataclass(frozen=True, slots=True)
class Position:
    """A point in a set's history; versions compare only within one incarnation."""

    incarnation: int
    version: int
    durable_version: int = 0

    def next(self) -> "Position":
        """One update later."""
        return Position(self.incarnation, self.version + 1, self.durable_version)

    def newer_than(self, other: "Position") -> bool:
        """Whether history has moved past the other point, or was replaced."""
        return (self.incarnation, self.version) != (other.incarnation, other.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of a push.

    `staleness` is in updates, None if the push named no base; `gradient_norm` is Euclidean over all pushed gradients, divided
    by the loss scale, before any other change to them, and NaN in a set without a guard; `learning_rates` holds the one used,
    by group; `duplicate` marks the first receipt of a push that came again; `refusal` is why a push was refused (the SDK raises
    it as an error), skipped or discarded. Pushes of this worker up to
    `durable_sequence` were on stable storage when this was sent.
    """

    sequence: int
    position: Position
    outcome: Outcome
    duplicate: bool = False
    staleness: int | None = None
    gradient_norm: float = 0.0
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    durability: Durability = Durability.MEMORY
    refusal: Refusal | None = None
    durable_sequence: int = 0

    @property
    def version(self) -> int:
        """Number of updates that the set had applied right after the push."""
        return self.position.version

    @property
    def applied(self) -> bool:
        """Whether the push made an update."""
        return self.outcome is Outcome.APPLIED

    @property
    def refused(self) -> bool:
        """Whether the push was wrong; nothing changed then."""
        return self.outcome is Outcome.REFUSED

    @property
    def discarded(self) -> bool:
        """Whether the push came too late, was too stale, or not to be trusted, as the policy has it."""
        return self.outcome is Outcome.DISCARDED

    @property
    def learning_rate(self) -> float:
        """Learning rate used in the group `default`."""
        return self.learning_rates.get(Group.DEFAULT, float("nan"))


@dataclass(frozen=True, slots=True)
class Worker:
    """A member of a set: since when, seconds since it was last heard of, how many of its pushes were decided on since it came.

    `staleness` is that of the last, None if it was not known; `waiting` says whether it waits for others, `quarantined` whether
    what it pushes is discarded now.
    """

    client_id: str
    join_time: datetime.datetime
    idle: float
    pushes: int
    staleness: int | None = None
    waiting: bool = False
    quarantined: bool = False


class Parameters(dict[str, Any]):
    """Tensors by name (tables: RowSparse), with the position that all of them belong to, and the receipt of a step."""

    def __init__(
        self,
        tensors: Mapping[str, "np.ndarray[Any, Any] | RowSparse"],
        position: Position,
        receipt: Receipt | None = None,
    ) -> None:
        super().__init__(tensors)
        self.position = position
        self.receipt = receipt

    @property
    def version(self) -> int:
        """Number of updates that these parameters have had."""
        return self.position.version


@dataclass(frozen=True, slots=True)
class Summary:
    """A parameter set in a list."""

    id: str
    rule: str
    holds: Holds
    position: Position
    tensor_count: int
    element_count: int
    state_bytes: int
    create_time: datetime.datetime
    journal: Journal

    @property
    def version(self) -> int:
        """Number of updates that the set has applied."""
        return self.position.version


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """A group as it is now: its tensors and its optimizer with the values that the next update uses.

    `schedules` are those that hyperparameters follow, by name. If they have left the values allowed, so that the next update
    would be refused, they stand in the optimizer themselves.
    """

    name: str
    tensors: tuple[str, ...]
    optimizer: Optimizer
    schedules: Mapping[str, Schedule] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """New values of a group, given by `update` or with a push, after `version` updates: the next one used them first."""

    version: int
    group: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Description:
    """A parameter set as it is now, and in `changes` what was changed of its hyperparameters, the last 1000 in order.

    What schedules do is no change: it follows from the version. `policy` is the one in force. `staleness` counts pushes by
    their staleness; from 16 on, by the power of two that it reaches.
    """

    spec: ParameterSetSpec
    position: Position
    groups: tuple[GroupDescription, ...]
    create_time: datetime.datetime
    state_bytes: int
    element_count: int
    changes: tuple[Change, ...] = ()
    policy: Policy = ASYNC
    staleness: Mapping[int, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The set's id."""
        return self.spec.id

    @property
    def version(self) -> int:
        """Number of updates that the set has applied."""
        return self.position.version
