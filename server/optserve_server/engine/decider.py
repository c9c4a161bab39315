"""The decider: what becomes of pushes, as a draft of the set that they lead to, or of what an event of its history led to."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optserve._errors import InvalidArgument, InvalidState, Refusal
from optserve._results import Outcome, Position, Receipt
from optserve._specification import ParameterSetSpec
from optserve._transforms import SkipNonFinite
from optserve_server.engine.commit import Commit
from optserve_server.engine.decision import Decision
from optserve_server.engine.draft import Draft
from optserve_server.engine.groups import at, change, check_pushed
from optserve_server.engine.history import Event
from optserve_server.engine.mean import Gathered
from optserve_server.engine.pipeline import Pipeline
from optserve_server.engine.push import Push
from optserve_server.engine.rounds import merged_changes
from optserve_server.engine.work import Update


class Decider:
    """Decides for one set. Drafts go on with what is applied; nothing else changes."""

    def __init__(self, spec: ParameterSetSpec, pipeline: Pipeline) -> None:
        self._spec = spec
        self._pipeline = pipeline

    def decide(self, commits: Sequence[Commit], draft: Draft, number: int) -> Decision:
        """What becomes of commits that belong together, after those in the draft, which goes on with them if they are
        applied."""
        pushes = [commit.push for commit in commits]
        stalenesses = [_staleness(push.base, draft.position) for push in pushes]
        before = len(draft.updates)
        outcome, refusal = self._advance(draft, pushes)
        receipts = [
            Receipt(
                sequence=push.sequence,
                position=draft.position,
                outcome=outcome,
                staleness=staleness,
                gradient_norm=push.gradient_norm,
                learning_rates=draft.learning_rates if outcome is Outcome.APPLIED else {},
                refusal=refusal,
            )
            for push, staleness in zip(pushes, stalenesses, strict=True)
        ]
        update = draft.updates[before] if len(draft.updates) > before else None
        return Decision(number, draft.position.version, commits, receipts, update)

    def _advance(self, draft: Draft, pushes: Sequence[Push]) -> tuple[Outcome, Refusal | None]:
        """Let the draft go on with pushes that belong together, unless there is something wrong with that."""
        for push in pushes:
            if push.refusal is not None:
                return self._pass_over(draft, push), push.refusal
        try:
            changes = merged_changes(pushes)
            check_pushed(draft.groups, changes)
            plan = functools.partial(self._pipeline.plan, pushes=pushes)
            return self._plan(draft, changes, tuple(pushes[0].gradients), plan), None
        except InvalidArgument as error:
            return Outcome.REFUSED, Refusal.of(error)

    def _plan(
        self,
        draft: Draft,
        changes: Mapping[str, Mapping[str, Any]],
        tensors: tuple[int, ...],
        plan: Callable[..., Update],
    ) -> Outcome:
        """Let the draft go on with an update of some tensors, after changes; raises InvalidArgument kinds."""
        groups = change(draft.groups, changes)
        evaluated = at(groups, draft.position.version)
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
        outcome = Outcome.REFUSED
        if isinstance(brought, Push):
            outcome, _ = self._advance(draft, [brought])
        elif brought is not None:
            plan = functools.partial(self._pipeline.plan_gathered, gathered=brought)
            outcome = self._plan(draft, event.changes, tuple(brought.gradients), plan)
        elif not event.pushes:
            draft.change(change(draft.groups, event.changes))
        elif event.pushes[0].receipt.outcome is Outcome.SKIPPED:
            outcome = Outcome.SKIPPED
            draft.progress.skipped += 1
        expected = event.pushes[0].receipt.outcome if event.pushes else Outcome.REFUSED
        if (outcome, draft.position.version) != (expected, event.version):
            raise InvalidState(
                f"expected event {event.number} to be {expected.name} and lead to version {event.version}; it was "
                f"{outcome.name}, and led to {draft.position.version}"
            )


def _staleness(base: Position | None, now: Position) -> int | None:
    if base is None or base.incarnation != now.incarnation:
        return None
    return max(0, now.version - base.version)
