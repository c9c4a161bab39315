"""Rounds: pushes that wait for each other, as the set's policy says, and then make one update together."""

import math
import time
from collections.abc import Sequence
from typing import Any

from optserve._errors import (
    InvalidArgument,
    InvalidHyperparameter,
    OptserveError,
    RoundIncomplete,
    ServerDraining,
    SessionSuperseded,
    TensorMismatch,
)
from optserve._policies import Policy, Sync
from optserve._transforms import SkipNonFinite, Transforms
from optserve_server.engine.commit import Commit
from optserve_server.engine.push import Push

Changes = dict[str, dict[str, Any]]


class Rounds:
    """The round that is being gathered. Every method is called under the set's lock; who waits is woken by the caller."""

    def __init__(self, policy: Policy, transforms: Transforms) -> None:
        self._skips = isinstance(transforms.nonfinite, SkipNonFinite)
        self.workers = policy.workers if isinstance(policy, Sync) else 1
        self._seconds = policy.deadline if isinstance(policy, Sync) else math.inf
        self._waiting: dict[str, Commit] = {}  # by client
        self._deadline = math.inf
        self._draining = False

    @property
    def remaining(self) -> float:
        """Seconds until the round is given up."""
        return max(0.0, self._deadline - time.monotonic())

    def join(self, commit: Commit) -> list[Commit]:
        """What a push makes ready to be decided on: the round that it completes, in the order of the workers' ids, or none.

        One that does not fit the others is refused, and then ready by itself. Raises ServerDraining.
        """
        if self.workers > 1:
            self._check(commit.push)
        skipped = self._skips and commit.push.skippable  # which skips the whole round
        if self.workers == 1 or (commit.push.refusal is not None and not skipped):
            return [commit]
        if self._draining:
            raise ServerDraining("the server is draining; try again once it is back")
        if not self._waiting:
            self._deadline = time.monotonic() + self._seconds
        self._waiting[commit.session.client_id] = commit
        return self._take() if len(self._waiting) == self.workers else []

    def withdraw(self, client_id: str) -> None:
        """Take a client's push out of the round, since it has opened a newer stream and may send it again."""
        commit = self._waiting.pop(client_id, None)
        if commit is not None:
            commit.fail(SessionSuperseded(f"client {client_id!r} opened a newer stream on this set"))

    def expire(self) -> None:
        """Give the round up if its time is over."""
        if self._waiting and not self.remaining:
            there = ", ".join(map(repr, sorted(self._waiting)[:10]))
            self.give_up(
                RoundIncomplete(
                    f"expected pushes of {self.workers} workers within {self._seconds:g} s; {len(self._waiting)} came, of "
                    f"{there}. Nothing was applied; push again"
                )
            )

    def drain(self) -> None:
        """Give the round up, and begin no other."""
        self._draining = True
        self.give_up(
            ServerDraining("the server is draining, and this round was not complete; try again once it is back")
        )

    def give_up(self, error: OptserveError) -> None:
        """Fail everyone who waits."""
        for commit in self._take():
            commit.fail(type(error)(str(error)))  # each its own: it is raised in several threads

    def _take(self) -> list[Commit]:
        together = [self._waiting[client] for client in sorted(self._waiting)]
        self._waiting.clear()
        self._deadline = math.inf
        return together

    def _check(self, push: Push) -> None:
        """Refuse a push that can't be averaged with those that wait."""
        others = [commit.push for commit in self._waiting.values() if commit.push.refusal is None]
        if push.refusal is None and others:
            try:
                if _pushed(push) != _pushed(others[0]):
                    raise TensorMismatch(
                        f"expected gradients of the {len(_pushed(others[0]))} tensors that the others of this round pushed, "
                        f"row-sparse where theirs are; got {len(_pushed(push))}, or others. Push zeros for a tensor that is "
                        "not used"
                    )
                merged_changes([*others, push])
            except InvalidArgument as error:
                push.refuse(error)


def _pushed(push: Push) -> list[tuple[int, bool]]:
    """The tensors of a push, and which are row-sparse."""
    return [*((index, False) for index in push.gradients), *((index, True) for index in push.sparse)]


def merged_changes(pushes: Sequence[Push]) -> Changes:
    """The hyperparameters that pushes change, by group and name; raises InvalidHyperparameter where they disagree."""
    merged: Changes = {}
    for push in pushes:
        for group, values in push.changes.items():
            for name, value in values.items():
                present = merged.setdefault(group, {}).setdefault(name, value)
                if present != value:
                    raise InvalidHyperparameter(
                        f"expected one value of {name!r} in group {group!r} from all workers of a round; got {present!r} and "
                        f"{value!r}"
                    )
    return merged
