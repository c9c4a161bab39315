"""All that a parameter set is at one version, as a value: what a checkpoint keeps and a restart brings back."""

import datetime
from dataclasses import dataclass, field

from optserve._results import Change, GroupDescription, Position
from optserve._specification import ParameterSetSpec
from optserve.optim import Optimizer
from optserve_server.engine.arena import Arena
from optserve_server.engine.groups import resolve
from optserve_server.engine.pipeline import Progress
from optserve_server.engine.sessions import Session


@dataclass(frozen=True, slots=True)
class State:
    """A set at a position.

    `optimizers` holds the hyperparameters in force by group, or their schedules, `changes` how they came to be; `arenas` the
    parameters (absent in a set that holds moments only), the slots by name and the mean that pushes accumulate in; `sessions`
    who has pushed what, and `forgotten` the last epoch that is over; `keys` those of each table, by its index, in the order of its rows.
    """

    spec: ParameterSetSpec
    position: Position
    create_time: datetime.datetime
    optimizers: dict[str, Optimizer]
    changes: list[Change]
    arenas: dict[str, Arena]
    progress: Progress
    sessions: list[Session]
    forgotten: int = 0
    keys: dict[int, list[int]] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[GroupDescription, ...]:
        """The groups with the hyperparameters in force."""
        names = [tensor.name for tensor in self.spec.tensors]
        return tuple(
            GroupDescription(group.name, tuple(names[index] for index in group.members), self.optimizers[group.name])
            for group in resolve(self.spec)
        )
