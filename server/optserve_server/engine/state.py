"""All that a parameter set is at one version, as a value: what a checkpoint keeps and a restart brings back."""

import datetime
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optserve._results import Change, Position
from optserve._specification import ParameterSetSpec
from optserve.optim import Optimizer
from optserve_server.engine.arena import Arena
from optserve_server.engine.rules import Memory
from optserve_server.engine.sessions import Session


@dataclass(frozen=True, slots=True)
class State:
    """A set at a position.

    `optimizers` holds the hyperparameters in force by group, or their schedules, `changes` how they came to be; `arenas` the
    parameters (absent in a set that holds moments only) and the slots by name; `steps`, int64 [tensors], the updates that each
    tensor has had; `memory` the rule's values for each tensor; `sessions` who has pushed what.
    """

    spec: ParameterSetSpec
    position: Position
    create_time: datetime.datetime
    optimizers: dict[str, Optimizer]
    changes: list[Change]
    arenas: dict[str, Arena]
    steps: NDArray[np.int64]
    memory: list[Memory]
    sessions: list[Session]
