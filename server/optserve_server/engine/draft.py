"""Drafts: what a set will be once the updates that are planned so far have run."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from optserve._results import Change, Position
from optserve_server.engine.groups import TensorGroup, differences
from optserve_server.engine.pipeline import Progress
from optserve_server.engine.push import Push
from optserve_server.engine.staleness import bucket
from optserve_server.engine.work import Update


@dataclass(slots=True)
class Draft:
    """A set as it was, and the updates on top of it."""

    groups: tuple[TensorGroup, ...]
    position: Position
    progress: Progress
    updates: list[Update] = field(default_factory=list)
    updated: set[int] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)  # of the last update, by group

    def staleness(self, push: Push) -> int | None:
        """How many updates there were since a push's base, 0 if none was of its tensors; None if that can't be told."""
        base, now = push.base, self.position
        if base is None or base.incarnation != now.incarnation or base.version > now.version:
            return None
        if base.version == now.version or not push.covers:
            return now.version - base.version
        changed = int(self.progress.changed[push.indices].max()) > base.version
        return now.version - base.version if changed else 0

    def count(self, staleness: int | None) -> None:
        """Count a push by its staleness."""
        if staleness is not None:
            least = bucket(staleness)
            self.progress.staleness[least] = self.progress.staleness.get(least, 0) + 1

    def change(self, groups: tuple[TensorGroup, ...]) -> None:
        """Let hyperparameters change."""
        self.changes += differences(self.groups, groups, self.position.version)
        self.groups = groups

    def advance(self, groups: tuple[TensorGroup, ...], evaluated: tuple[TensorGroup, ...], planned: Update) -> None:
        """Add an update, by groups whose schedules are evaluated."""
        self.change(groups)
        self.learning_rates = {group.name: group.optimizer.lr for group in evaluated}
        self.position = self.position.next()
        self.updates.append(planned)
        self.progress.accumulated = self.progress.skipped = 0
        self.progress.samples = self.progress.divisor = 0.0
        for index, memory in planned.memories.items():
            self.progress.steps[index] += 1
            self.progress.memory[index] = memory
            self.updated.add(index)
        self.progress.changed[list(planned.memories)] = self.position.version

    def accumulate(self, groups: tuple[TensorGroup, ...], planned: Update, tensors: Iterable[int]) -> None:
        """Add pushes to those that will make an update together."""
        self.change(groups)
        self.updates.append(planned)
        self.progress.accumulated += 1
        self.progress.samples, self.progress.divisor = planned.samples, planned.divisor
        self.progress.accumulating = tuple(tensors)
        self.progress.skipped = 0
