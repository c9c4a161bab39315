"""Rounds: pushes that wait for each other, as the set's policy says, and then make one update together."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optserve._errors import (
    InvalidArgument,
    InvalidHyperparameter,
    OptserveError,
    RoundIncomplete,
    ServerDraining,
    TensorMismatch,
    WorkerQuarantined,
)
from optserve._policies import Policy, Sync, in_rounds
from optserve._transforms import SkipNonFinite, Transforms
from optserve_server.engine.commit import Commit
from optserve_server.engine.folding import Folded
from optserve_server.engine.members import Members
from optserve_server.engine.push import Push
from optserve_server.engine.quarantine import Watch

Changes = dict[str, dict[str, Any]]


class Rounds:
    """The round that is being gathered. Every method is called under the set's lock; who waits is woken by the caller."""

    def __init__(self, policy: Policy, transforms: Transforms, members: Members) -> None:
        self._skips = isinstance(transforms.nonfinite, SkipNonFinite)
        self._accumulates = transforms.accumulate > 1
        self._members = members
        self._waiting: dict[str, Commit] = {}  # by client
        self._changes: Changes = {}  # of those
        self._deadline = math.inf
        self._quorum_since = math.inf
        self._barred: Mapping[str, int] = {}
        self._draining = False
        self.folded: Folded | None = None
        self.overdue: Sequence[str] = ()
        self.policy = policy
        self._watch = self._watch_of(policy)

    @property
    def sync(self) -> Sync | None:
        """The policy, if pushes wait for each other."""
        return in_rounds(self.policy)

    @property
    def folds(self) -> bool:
        """Whether gradients are added up as they come, and let go of."""
        return self.sync is not None and not self.sync.keeps and not self._accumulates

    @property
    def remaining(self) -> float | None:
        """Seconds until something is due although nobody comes; None: never."""
        due = max(0.0, min(self._deadline, self._quorum_over) - time.monotonic())
        left = min(due, self._members.remaining)
        return left if left < math.inf else None

    def waits(self, commit: Commit) -> bool:
        """Whether a push is one that waits for others: nothing is wrong with it, or all of its round is to be skipped."""
        skipped = self._skips and commit.push.skippable
        return self.sync is not None and commit.discarded is None and (commit.push.refusal is None or skipped)

    def join(self, commit: Commit) -> None:
        """Let a push wait for others; one that does not fit them is refused instead. Raises ServerDraining."""
        if commit.discarded is None:  # else it may well be of other tensors than the present round
            self._check(commit.push)
        if not self.waits(commit):
            return
        self.check_draining()
        assert self.sync is not None
        if not self._waiting:
            self._deadline = time.monotonic() + self.sync.deadline
            self.folded = Folded((self.sync.workers or max(1, len(self._members))) * commit.push.samples)
        self._waiting[commit.session.client_id] = commit
        if commit.push.refusal is None:
            self._changes = merged_changes((self._changes, commit.push.changes))
        if self.sync.quorum is not None and len(self._waiting) == self.sync.quorum:
            self._quorum_since = time.monotonic()

    def refuse(self, commit: Commit, error: InvalidArgument) -> None:
        """Take a push out of the round again, since it can't be added."""
        self._waiting.pop(commit.session.client_id, None)
        waiting = [each.push for each in self._waiting.values()]
        self._changes = merged_changes(push.changes for push in waiting if push.refusal is None)
        if self.sync is not None and len(self._waiting) < (self.sync.quorum or 0):
            self._quorum_since = math.inf
        commit.push.refuse(error)

    def has(self, client_id: str) -> bool:
        """Whether a client's push waits."""
        return client_id in self._waiting

    def over(self, version: int) -> list[Commit]:
        """The pushes of the round if it is over, in the order of the workers' ids; otherwise none.

        One that has taken too long with too few is given up. The set is at a version. Members that an elastic round has waited
        for until its deadline are `overdue` then.
        """
        self.overdue = ()
        if not self._waiting:
            return []
        self._barred = self.quarantined(version)
        late = time.monotonic() >= self._deadline
        if late and self.sync is not None and self.sync.workers is None:
            self.overdue = tuple(each for each in self._members if each not in self._waiting)
        if len(self._waiting) >= self._least and (late or self._complete or time.monotonic() >= self._quorum_over):
            return self._take()
        if late:
            self._watch = self._watch_of(self.policy)  # or a quarantine that leaves too few would never end
            there = ", ".join(map(repr, sorted(self._waiting)[:10]))
            self.give_up(
                RoundIncomplete(
                    f"expected pushes of {self._expected} workers within {self.sync.deadline if self.sync else 0:g} s; "
                    f"{len(self._waiting)} came, of {there}. Nothing was applied; push again"
                )
            )
        return []

    def change(self, policy: Policy) -> None:
        """Follow another policy; a round that is under way is given up, and one of another number waits for that many."""
        self.give_up(RoundIncomplete("the policy of this set has changed. Nothing was applied; push again"))
        if getattr(policy, "workers", None) != getattr(self.policy, "workers", None):
            self._members.vacancies = 0
        self.policy = policy
        self._watch = self._watch_of(policy)

    def judge(self, commit: Commit, version: int) -> None:
        """Raises WorkerQuarantined for a push that is an outlier, or of a client whose were.

        Once everyone is in quarantine, nobody can be the measure of the others: it begins anew.
        """
        if self._watch is not None and commit.push.refusal is None:
            client_id, norm = commit.session.client_id, commit.push.gradient_norm
            if (reason := self._watch.judge(client_id, norm, version)) is not None:
                if set(self._members) <= self.quarantined(version).keys():
                    self._watch = self._watch_of(self.policy)
                raise WorkerQuarantined(reason)

    def accept(self, commits: Sequence[Commit]) -> None:
        """Take note of pushes that became part of an update."""
        if self._watch is not None:
            self._watch.accept(commit.push.gradient_norm for commit in commits)

    def quarantined(self, version: int) -> Mapping[str, int]:
        """The clients whose pushes are discarded when the set is at a version."""
        return self._watch.quarantined(version) if self._watch is not None else {}

    def check_draining(self) -> None:
        """Raises ServerDraining once nobody is to wait any more."""
        if self._draining:
            raise ServerDraining("the server is draining; try again once it is back")

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
        self.folded = None

    @property
    def _quorum_over(self) -> float:
        """When a round with a quorum waits no longer for others, in monotonic seconds."""
        return self._quorum_since + (self.sync.grace if self.sync is not None else 0.0)

    @property
    def _needed(self) -> int:
        """How many workers there are, if that is fixed, that nobody is in the place of."""
        assert self.sync is not None
        workers = self.sync.workers or 0
        return workers - self._members.vacancies - len(self._members)

    @property
    def _complete(self) -> bool:
        """Whether all have pushed that could."""
        assert self.sync is not None
        workers = self.sync.workers
        if workers is not None and len(self._waiting) >= workers:
            return True
        if len(self._members) > len(self._waiting) + len(self._barred):  # which spares a search at nearly every push
            return False
        missing = any(client not in self._waiting and client not in self._barred for client in self._members)
        return not missing and (workers is None or self._needed <= 0)

    @property
    def _least(self) -> int:
        """How many pushes make an update at least."""
        assert self.sync is not None
        robust = self.sync.aggregation.least if self.sync.aggregation is not None else 1
        if self.sync.quorum is not None:
            return max(robust, self.sync.quorum)
        if self.sync.workers is None or self._complete:
            return robust
        return max(robust, self.sync.workers)

    @property
    def _expected(self) -> str:
        """Of how many workers pushes were expected, for people."""
        assert self.sync is not None
        if self.sync.quorum is None and self.sync.workers is not None:
            return str(max(self.sync.workers - self._members.vacancies, 1))
        return f"at least {self._least}"

    def _watch_of(self, policy: Policy) -> Watch | None:
        quarantine = policy.quarantine if isinstance(policy, Sync) else None
        return Watch(quarantine) if quarantine is not None else None

    def _take(self) -> list[Commit]:
        together = [self._waiting[client] for client in sorted(self._waiting)]
        self._waiting.clear()
        self._changes = {}
        self._deadline = self._quorum_since = math.inf
        return together

    def _check(self, push: Push) -> None:
        """Refuse a push that can't be averaged with those that wait."""
        if push.refusal is None:
            other = next((each.push for each in self._waiting.values() if each.push.refusal is None), push)
            try:
                if push.covers != other.covers:
                    raise TensorMismatch(
                        f"expected gradients of the {len(other.covers)} tensors that the others of this round pushed, "
                        f"row-sparse where theirs are; got {len(push.covers)}, or others. Push zeros for a tensor that is "
                        "not used"
                    )
                merged_changes((self._changes, push.changes))
            except InvalidArgument as error:
                push.refuse(error)


def merged_changes(several: Iterable[Mapping[str, Mapping[str, Any]]]) -> Changes:
    """The hyperparameters that pushes change, by group and name; raises InvalidHyperparameter where they disagree."""
    merged: Changes = {}
    for changes in several:
        for group, values in changes.items():
            for name, value in values.items():
                present = merged.setdefault(group, {}).setdefault(name, value)
                if present != value:
                    raise InvalidHyperparameter(
                        f"expected one value of {name!r} in group {group!r} from all workers of a round; got {present!r} and "
                        f"{value!r}"
                    )
    return merged
