"""The decider: what becomes of pushes, as a draft of the set that they lead to, or of what an event of its history led to."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optserve._errors import InvalidArgument, InvalidState, Refusal
from optserve._results import Outcome, Receipt
from optserve._specification import ParameterSetSpec, Pushes
from optserve._transforms import SkipNonFinite
from optserve_server.engine.arena import Arena
from optserve_server.engine.commit import Commit
from optserve_server.engine.decision import Decision
from optserve_server.engine.draft import Draft
from optserve_server.engine.folding import Folded
from optserve_server.engine.groups import TensorGroup, at, change, check_pushed, slowed
from optserve_server.engine.history import Event
from optserve_server.engine.mean import Gathered
from optserve_server.engine.pipeline import Pipeline, Progress, Pushed
from optserve_server.engine.push import Push
from optserve_server.engine.rounds import merged_changes
from optserve_server.engine.work import Update


class Decider:
    """Decides for one set. Drafts go on with what is applied; nothing else changes."""

    def __init__(self, spec: ParameterSetSpec, pipeline: Pipeline) -> None:
        self._spec = spec
        self._pipeline = pipeline

    def decide(self, commits: Sequence[Commit], draft: Draft, number: int, folded: Folded | None = None) -> Decision:
        """What becomes of commits that belong together, after those in the draft, which goes on with them if they are
        applied. What was `folded` of a round is in the mean's memory already."""
        before = len(draft.updates)
        outcome, refusal = self._advance(draft, commits, folded)
        if outcome is not Outcome.REFUSED:
            for commit in commits:
                draft.count(commit.staleness)
        receipts = [
            Receipt(
                sequence=commit.push.sequence,
                position=draft.position,
                outcome=outcome,
                staleness=commit.staleness,
                gradient_norm=commit.push.gradient_norm,
                learning_rates=draft.learning_rates if outcome is Outcome.APPLIED else {},
                refusal=refusal,
            )
            for commit in commits
        ]
        update = draft.updates[before] if len(draft.updates) > before else None
        return Decision(number, draft.position.version, commits, receipts, update)

    def _advance(
        self, draft: Draft, commits: Sequence[Commit], folded: Folded | None
    ) -> tuple[Outcome, Refusal | None]:
        """Let the draft go on with pushes that belong together, unless there is something wrong with that."""
        for commit in commits:
            if commit.push.refusal is not None:
                return self._pass_over(draft, commit.push), commit.push.refusal
            if commit.discarded is not None:
                return Outcome.DISCARDED, commit.discarded
        try:
            changes = merged_changes(each.push.changes for each in commits)
            check_pushed(draft.groups, changes)
            parts = [Pushed(commit.push, commit.staleness, self.base(commit)) for commit in commits]
            plan = functools.partial(self._pipeline.plan, pushes=parts, folded=folded)
            stalenesses = [commit.staleness for commit in commits]
            return self._plan(draft, changes, self._pipeline.added(commits[0].push), stalenesses, plan), None
        except InvalidArgument as error:
            return Outcome.REFUSED, Refusal.of(error)

    def base(self, commit: Commit) -> Arena | None:
        """The parameters that a push was computed at, if they are looked at, and are not those of now."""
        if not commit.staleness or not self._pipeline.keeps_bases or commit.push.base is None:
            return None
        return self._pipeline.bases.at(commit.push.base.version)

    def knows_base(self, commit: Commit) -> bool:
        """Whether the parameters that a push was computed at can be looked at, as far as they must be."""
        if commit.staleness is None:
            return self._spec.pushes is not Pushes.PARAMETERS
        return not commit.staleness or not self._pipeline.keeps_bases or self.base(commit) is not None

    def _plan(
        self,
        draft: Draft,
        changes: Mapping[str, Mapping[str, Any]],
        tensors: tuple[int, ...],
        stalenesses: Sequence[int | None],
        plan: Callable[..., Update],
    ) -> Outcome:
        """Let the draft go on with an update of some tensors, after changes; raises InvalidArgument kinds."""
        groups = change(draft.groups, changes)
        evaluated = slowed(at(groups, draft.position.version), self._pipeline.learning_rate_divisor(stalenesses))
        planned = plan(evaluated, draft.progress, updated=draft.updated)
        if planned.memories:
            draft.advance(groups, evaluated, planned)
            return Outcome.APPLIED
        draft.accumulate(groups, planned, tensors)
        return Outcome.ACCUMULATED

    def _pass_over(self, draft: Draft, push: Push) -> Outcome:
        """What becomes of a push that can't be applied."""
        nonfinite = self._spec.transforms.nonfinite
        if not push.skippable or not isinstance(nonfinite, SkipNonFinite):
            return Outcome.REFUSED
        if nonfinite.at_most is not None and draft.progress.skipped >= nonfinite.at_most:
            return Outcome.REFUSED
        draft.progress.skipped += 1
        return Outcome.SKIPPED

    def repeat(self, event: Event, draft: Draft, brought: Push | Gathered | None) -> None:
        """Let the draft go on as it did when an event happened, with what that brought; raises InvalidState if it can't."""
        first = event.pushes[0].receipt if event.pushes else None
        expected = first.outcome if first is not None else Outcome.REFUSED
        outcome: Outcome = expected if expected is Outcome.DISCARDED else Outcome.REFUSED
        stalenesses = [each.receipt.staleness for each in event.pushes]
        if brought is not None:
            outcome = self._repeat(event, draft, brought, stalenesses)
        elif not event.pushes:
            draft.change(change(draft.groups, event.changes))
        elif expected is Outcome.SKIPPED:
            outcome = Outcome.SKIPPED
            draft.progress.skipped += 1
        if outcome is not Outcome.REFUSED:
            for staleness in stalenesses:
                draft.count(staleness)
        if (outcome, draft.position.version) != (expected, event.version):
            raise InvalidState(
                f"expected event {event.number} to be {expected.name} and lead to version {event.version}; it was "
                f"{outcome.name}, and led to {draft.position.version}"
            )

    def _repeat(
        self, event: Event, draft: Draft, brought: Push | Gathered, stalenesses: Sequence[int | None]
    ) -> Outcome:
        if isinstance(brought, Push):
            if brought.refusal is not None:
                return Outcome.REFUSED
            plan = functools.partial(self._pipeline.plan, pushes=[Pushed(brought, stalenesses[0])])
            try:
                return self._plan(draft, event.changes, self._pipeline.added(brought), stalenesses, plan)
            except InvalidArgument:
                return Outcome.REFUSED
        counted = self._pipeline.samples_of(draft.progress, [each.samples for each in event.pushes])
        filled = event.pushes[0].receipt.outcome is Outcome.APPLIED

        def planned(groups: tuple[TensorGroup, ...], progress: Progress, updated: set[int]) -> Update:
            update = self._pipeline.plan_gathered(groups, progress, brought, updated, filled=filled)
            divisor = self._pipeline.divisor(progress, counted)
            return replace(update, samples=progress.samples + counted, divisor=divisor)

        return self._plan(draft, event.changes, tuple(brought.gradients), stalenesses, planned)
