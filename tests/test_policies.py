"""Policies and membership, whatever workers do and in whichever order: pushes are counted once or said not to be, bounds hold,
and nobody waits without a reason.

`POLICY_EXAMPLES` is how many histories are tried.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from optserve import Async, BoundedStaleness, Buffered, Outcome, Receipt, Sync, TensorSpec, optim, staleness
from optserve._errors import (
    NonFiniteValue,
    OptserveError,
    RoundIncomplete,
    ServerDraining,
    SessionSuperseded,
    StorageFailed,
)
from optserve._policies import Late, Policy
from optserve._results import Position
from optserve._specification import Holds, ParameterSetSpec
from optserve._wire import pack
from optserve_server.engine import parameter_set
from optserve_server.engine.history import Event
from optserve_server.engine.members import Member, Members
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.sessions import Session
from optserve_server.engine.staging import Staging
from optserve_server.engine.threads import Threads
from turns import Progress, Stage, Task

EXAMPLES = int(os.environ.get("POLICY_EXAMPLES", "60"))
SIZE = 128  # elements: each push has its own, so that the parameters say how often it was counted
LEASE = 10.0  # seconds, of the stage
NAMES = ("a", "b", "c", "d")
THREADS = Threads(1)
Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class Sent:
    """A push as its worker knows it: a gradient that is one at its own element, and zero elsewhere."""

    place: int
    sequence: int
    base: int | None
    samples: float
    finite: bool
    digest: bytes = b""


@dataclass(eq=False)
class Activity:
    """What a worker does now; one that has crashed does it, too, until the server has noticed."""

    kind: str
    worker: "Worker"
    stream: object
    session: Session | None
    changes: int  # of the policy, before it
    began: float
    phase: str = ""
    round_began: float = math.inf
    deadline: float = math.inf
    passed: bool = False
    task: Task | None = None

    @property
    def current(self) -> bool:
        """Whether its stream is the one that has the session."""
        return self.stream is self.worker.stream


@dataclass(eq=False)
class Worker:
    """A worker, and what it knows."""

    name: str
    stream: object = None
    session: Session | None = None
    epoch: int = 0
    base: int | None = None
    unsettled: Sent | None = None
    settled: Sent | None = None
    barriers: int = 0
    up: bool = False
    heard: float = -math.inf
    activity: Activity | None = None
    older: tuple[Session, object] | None = None

    @property
    def idle(self) -> bool:
        """Whether it could do something now."""
        return self.up and self.activity is None


@dataclass
class Known:
    """What is known of members, from who joined, pushed and left in which order."""

    clocks: dict[str, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)  # version that a worker's last push led to
    barred: dict[str, int] = field(default_factory=dict)
    vacancies: int = 0

    def join(self, name: str) -> None:
        if name not in self.clocks:
            self.clocks[name] = min(self.clocks.values(), default=0)
            self.vacancies = max(0, self.vacancies - 1)

    def leave(self, name: str, version: int) -> None:
        del self.clocks[name]
        self.taken.pop(name, None)
        self.barred[name] = version
        self.vacancies += 1

    def ahead(self, name: str) -> int:
        """How far a worker is ahead of the slowest."""
        return self.clocks[name] - min(self.clocks.values()) if name in self.clocks else 0


def created(policy: Policy, lease: float, dtype: Any = np.float64, holds: Holds = Holds.PARAMETERS) -> ParameterSet:
    """A set of zeros, whose parameters are the sum of what is pushed, with the other sign."""
    start = np.zeros(SIZE, dtype)
    spec = ParameterSetSpec("zeros", (TensorSpec.of("x", start),), optim.SGD(lr=1.0), holds=holds, policy=policy)
    each = ParameterSet(spec, incarnation=1, threads=THREADS, lease=lease)
    if holds is Holds.PARAMETERS:
        staging = Staging(spec.tensors, THREADS)
        for payload in pack([(0, start.view(np.uint8).data, start.itemsize)]):
            staging.add(payload.runs, payload.buffer)
        staging.finish()
        each.load(staging)
    return each


def received(
    each: ParameterSet, sequence: int, gradient: Array, base: Position | None = None, samples: float = 1.0
) -> Push:
    """A push as it came over the wire."""
    push = each.begin(sequence, [Declared(TensorSpec.of("x", gradient))], base=base, samples=samples)
    for payload in pack([(0, gradient.view(np.uint8).data, gradient.itemsize)]):
        push.add(payload.runs, payload.buffer, replace=False)
    push.finish()
    return push


class World:
    """A set, its workers, and a model of what must become of all of them."""

    def __init__(self, policy: Policy, lease: float = LEASE, dtype: Any = np.float64) -> None:
        self.stage = Stage()
        self.stage.__enter__()
        self.lease, self.policy, self.changes = lease, policy, 0
        self.workers = {name: Worker(name) for name in NAMES}
        self.activities: list[Activity] = []
        self.known = Known()
        self.version = 0
        self.dtype = np.dtype(dtype)
        self.parameters = np.zeros(SIZE)
        self.versions = {0: self.parameters.copy()}
        self.pending: list[tuple[int, float, float]] = []  # element, samples, weight
        self.attempts: dict[tuple[str, int, int], list[Sent]] = {}
        self.records: dict[tuple[str, int, int], tuple[Sent, Receipt]] = {}
        self.told: set[tuple[str, int, int]] = set()
        self.barriers = 0
        self.first_barriers: dict[tuple[str, int], int] = {}  # that there had been when a session first joined
        self.disk_fails = False
        self.draining = False
        self.failure: BaseException | None = None
        self._places = iter(range(SIZE))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parameter_set, "Members", lambda lease: Observed(lease, self))
            self.set = created(policy, lease, dtype)
        self.set.keep(self)

    # What the set tells its log.

    def append(self, events: Any) -> None:
        events = list(events)
        if self.disk_fails:
            self.disk_fails = False
            raise StorageFailed("there is no room")
        try:
            for event in events:
                self.happened(event)
        except AssertionError as error:
            self.failure = self.failure or error
            raise

    def wait(self, number: int) -> None:
        """Everything is on stable storage at once."""

    def happened(self, event: Event) -> None:
        """Take note of an event, and check that it is as it must be."""
        if event.policy is not None:
            if getattr(event.policy, "workers", None) != getattr(self.policy, "workers", None):
                self.known.vacancies = 0
            self.policy = event.policy
            self.changes += 1
            return
        outcomes = {each.receipt.outcome for each in event.pushes}
        assert len(outcomes) == 1
        (outcome,) = outcomes
        sent = {each.client_id: self.record(each) for each in event.pushes}
        assert len(sent) == len(event.pushes), "a worker is twice in a round"
        for name, each in sent.items():
            self.check_outcome(name, each, outcome)
        if outcome in (Outcome.APPLIED, Outcome.ACCUMULATED):
            self.check_together(sorted(sent))
            self.pending += [(each.place, each.samples, self.weight(each)) for each in sent.values()]
            assert outcome is (Outcome.APPLIED if self.filled else Outcome.ACCUMULATED)
        if outcome is Outcome.APPLIED:
            total = sum(samples for _, samples, _ in self.pending)
            for place, samples, weight in self.pending:
                self.parameters[place] -= samples * weight / total
            self.version, self.pending = self.version + 1, []
            self.versions[self.version] = self.parameters.copy()
        assert {each.receipt.version for each in event.pushes} | {event.version} == {self.version}
        for name in sent:
            self.known.taken[name] = self.version if outcome in (Outcome.APPLIED, Outcome.ACCUMULATED) else -1

    def record(self, pushed: Any) -> Sent:
        """What was sent of what was decided on now, and never before."""
        assert self.pushing(pushed.client_id).current, "a newer stream was told that this was not applied"
        key = pushed.client_id, pushed.epoch, pushed.receipt.sequence
        assert key not in self.records, "a sequence is consumed twice"
        (sent,) = [each for each in self.attempts[key] if each.digest == pushed.digest][-1:]
        assert all(sent is not other for other, _ in self.records.values()), "a push is counted twice"
        self.records[key] = sent, pushed.receipt
        stale = None if sent.base is None else self.version - sent.base
        assert pushed.receipt.staleness == stale
        assert pushed.samples == sent.samples
        return sent

    def check_outcome(self, name: str, sent: Sent, outcome: Outcome) -> None:
        """Whether a push is refused or discarded exactly when it should be."""
        assert (outcome is Outcome.REFUSED) == (not sent.finite)
        stale = 0 if sent.base is None else self.version - sent.base
        policy, discarded = self.policy, False
        if stale and sent.base is not None and sent.finite:
            if isinstance(policy.staleness, staleness.Reject):
                discarded = stale > policy.staleness.bound
            if isinstance(policy, Sync) and policy.workers != 1 and policy.late is Late.DISCARD:
                discarded = self.known.taken.get(name) != self.version
            if isinstance(policy, BoundedStaleness) and name in self.known.barred:
                discarded = discarded or sent.base <= self.known.barred[name]
        assert (outcome is Outcome.DISCARDED) == discarded
        doing = self.doing()
        if isinstance(policy, BoundedStaleness) and doing is not None and doing.changes == self.changes:
            assert self.known.ahead(name) <= policy.bound

    def check_together(self, names: Sequence[str]) -> None:
        """Whether exactly these pushes make an update now."""
        policy = self.policy
        if not isinstance(policy, Sync) or policy.workers == 1:
            assert len(names) == 1
            return
        there = [self.pushing(name) for name in names]
        arrivals = sorted(each.began for each in there)
        late = self.stage.now >= arrivals[0] + policy.deadline
        all_there = self.known.clocks.keys() <= set(names)
        if policy.workers is not None:
            assert len(names) <= policy.workers
            unfilled = policy.workers - self.known.vacancies - len(self.known.clocks)
            all_there = len(names) == policy.workers or (all_there and unfilled <= 0)
        if policy.quorum is None:
            assert all_there or (late and policy.workers is None)
            return
        assert len(names) >= policy.quorum
        if policy.grace == 0:
            assert len(names) == policy.quorum
        assert late or all_there or self.stage.now >= arrivals[policy.quorum - 1] + policy.grace

    def weight(self, sent: Sent) -> float:
        """What a push's staleness makes of its weight."""
        stale = 0 if sent.base is None else self.version - sent.base
        match self.policy.staleness:
            case staleness.Polynomial(a):
                return float((1 + stale) ** -a)
            case staleness.DivideLearningRate():
                return 1 / max(1, stale)
            case _:
                return 1.0

    @property
    def filled(self) -> bool:
        """Whether what is pending makes an update."""
        if not isinstance(self.policy, Buffered):
            return True
        if self.policy.pushes is not None:
            return len(self.pending) >= self.policy.pushes
        assert self.policy.samples is not None
        return sum(samples for _, samples, _ in self.pending) >= self.policy.samples

    # Who is there.

    def alive(self, name: str) -> bool:
        """Whether a member's lease has not ended."""
        worker = self.workers[name]
        waits = any(each.worker is worker and each.current and each.phase for each in self.activities)
        return waits or self.stage.now < worker.heard + self.lease

    def doing(self) -> Activity | None:
        """What the task that runs now is about."""
        return next((each for each in self.activities if each.task is self.stage.current), None)

    def pushing(self, name: str) -> Activity:
        """The push of a worker that waits, or runs now."""
        (activity,) = [each for each in self.activities if each.worker.name == name and each.phase == "push"]
        return activity

    def left(self, name: str, version: int, *, lapsed: bool) -> None:
        """A member is no member any more; check that it has to be so."""
        assert version == self.version
        doing = self.doing()
        if lapsed:
            assert not self.alive(name), "a lease ended too early"
        elif self.overdue(name):
            pass
        elif doing is not None and doing.phase == "turn":
            assert isinstance(self.policy, BoundedStaleness)
            assert self.stage.now >= doing.began + self.policy.deadline, "dismissed before the deadline"
            ahead = self.known.clocks[doing.worker.name] - self.known.clocks[name]
            assert ahead > self.policy.bound, "dismissed though nobody waited for it"
        elif doing is not None:
            assert doing.worker.name == name
        self.known.leave(name, version)

    def overdue(self, name: str) -> bool:
        """Whether an elastic round has waited for a member until its deadline."""
        if not isinstance(self.policy, Sync) or self.policy.workers is not None:
            return False
        there = [each for each in self.activities if each.phase == "push" and each.worker.name in self.known.clocks]
        began = min((each.began for each in there), default=math.inf)
        return self.stage.now >= began + self.policy.deadline and name not in {each.worker.name for each in there}

    # What workers do.

    def act(self, kind: str, worker: Worker, call: Callable[[Activity], None]) -> None:
        """Begin to do something, up to where it waits."""
        stream, session = (object(), None) if kind == "open" else (worker.stream, worker.session)
        activity = Activity(kind, worker, stream, session, self.changes, self.stage.now)
        worker.activity = activity
        self.activities.append(activity)
        activity.task = self.stage.begin(lambda: self.perform(activity, call))
        activity.task.advance()

    def perform(self, activity: Activity, call: Callable[[Activity], None]) -> None:
        worker, session = activity.worker, activity.session
        if session is not None:
            session.heard(activity.stream, waits=False)
            worker.heard = self.stage.now
        try:
            call(activity)
        except OptserveError as error:
            self.note(partial(self.check_error, activity, error))
        except BaseException as error:
            self.failure = self.failure or error
        activity.phase = ""
        if activity.current:
            worker.heard = self.stage.now
        self.activities.remove(activity)
        if worker.activity is activity:
            worker.activity = None
        elif activity.session is not None:  # its process is gone
            self.set.disconnected(activity.session, activity.stream)

    def note(self, check: Callable[[], None]) -> None:
        """Keep what is wrong until the machine asks for it."""
        try:
            check()
        except AssertionError as error:
            self.failure = self.failure or error

    def check_error(self, activity: Activity, error: OptserveError) -> None:
        """Whether there was a reason for an error."""
        changed, now = activity.changes != self.changes, self.stage.now
        if isinstance(error, RoundIncomplete):
            begin = activity.round_began if activity.kind == "push" else activity.began
            assert changed or now >= begin + activity.deadline, "given up before the deadline"
        elif isinstance(error, SessionSuperseded):
            assert not activity.current
        elif isinstance(error, ServerDraining):
            assert self.draining
        else:
            assert isinstance(error, StorageFailed), error

    def open(self, worker: Worker, *, joins: bool, anew: bool) -> None:
        """Begin a stream; what the worker was doing goes on without it."""
        epoch = 0 if anew else worker.epoch

        def run(activity: Activity) -> None:
            activity.phase = "open"
            session = self.set.open(worker.name, epoch, activity.stream, joins=joins)
            if worker.session is not None:
                worker.older = worker.session, worker.stream
            if session.epoch != worker.epoch:
                worker.unsettled = worker.settled = None
            worker.session, worker.stream, worker.epoch = session, activity.stream, session.epoch
            activity.session, worker.up = session, worker.activity is activity
            worker.barriers = self.set.barriers
            if (sent := worker.unsettled) is not None and session.last_sequence == sent.sequence:
                receipt = self.set.last_receipt(session)
                assert receipt is not None
                self.tell(worker, session, sent, receipt)

        self.act("open", worker, run)

    def tell(self, worker: Worker, session: Session, sent: Sent, receipt: Receipt) -> None:
        """A worker gets a receipt."""
        key = worker.name, session.epoch, sent.sequence
        recorded, first = self.records[key]
        assert recorded is sent
        assert replace(receipt, duplicate=False) == first
        self.told.add(key)
        if worker.unsettled is sent:
            worker.unsettled, worker.settled = None, sent

    def prepared(self, sent: Sent) -> Push:
        """A push as it came over the wire."""
        gradient = np.zeros(SIZE, self.dtype)
        gradient[sent.place] = 1.0 if sent.finite else math.nan
        base = None if sent.base is None else Position(1, sent.base)
        push = received(self.set, sent.sequence, gradient, base, sent.samples)
        assert (push.refusal is None) == sent.finite
        if push.refusal is not None:
            assert push.refusal.reason == NonFiniteValue.reason()
        sent.digest = push.digest
        return push

    def push(self, worker: Worker, *, again: bool, samples: float, finite: bool, knows_base: bool) -> None:
        """Push what was not consumed yet `again`, or something new."""
        assert worker.session is not None
        if worker.unsettled is None or not again:
            base = worker.base if knows_base else None
            before = worker.settled.sequence if worker.settled is not None else 0
            worker.unsettled = Sent(next(self._places), before + 1, base, samples, finite)
        sent = worker.unsettled
        self.attempts.setdefault((worker.name, worker.epoch, sent.sequence), []).append(sent)
        self.act("push", worker, lambda activity: self.pushed(activity, sent))

    def pushed(self, activity: Activity, sent: Sent) -> None:
        worker, session = activity.worker, activity.session
        assert session is not None
        push = self.prepared(sent)
        self.take_turn(activity)
        activity.phase, activity.began = "push", self.stage.now
        activity.changes = self.changes if isinstance(self.policy, Sync) else activity.changes
        activity.deadline = getattr(self.policy, "deadline", math.inf)
        activity.round_began = min(each.began for each in self.activities if each.phase == "push")
        receipt, _ = self.set.push(session, activity.stream, push, pull=False)
        self.tell(worker, session, sent, receipt)
        assert not receipt.duplicate

    def take_turn(self, activity: Activity) -> None:
        assert activity.session is not None
        activity.phase, activity.began = "turn", self.stage.now
        self.set.await_turn(activity.session, activity.stream)
        if activity.current:
            activity.worker.heard = self.stage.now
        activity.phase, activity.changes = "", self.changes
        self.stage.pause()

    def repeat(self, worker: Worker) -> None:
        """Push what was consumed last once more."""
        sent = worker.settled
        assert sent is not None

        def run(activity: Activity) -> None:
            assert activity.session is not None
            before = len(self.records)
            receipt, _ = self.set.push(activity.session, activity.stream, self.prepared(sent), pull=False)
            assert receipt.duplicate
            assert len(self.records) == before
            self.tell(worker, activity.session, sent, receipt)

        self.act("repeat", worker, run)

    def pull(self, worker: Worker) -> None:
        """Get parameters."""

        def run(activity: Activity) -> None:
            self.take_turn(activity)
            snapshot = self.set.snapshot(pinned=False, reader=activity.session)
            assert snapshot is not None
            version, array = snapshot.position.version, snapshot.data[0].view(self.dtype)
            np.testing.assert_allclose(array, self.versions[version], rtol=0, atol=1e-12)
            if isinstance(self.policy, BoundedStaleness) and activity.changes == self.changes:
                assert self.known.ahead(worker.name) <= self.policy.bound
            if activity.current:
                worker.base = version

        self.act("pull", worker, run)

    def barrier(self, worker: Worker) -> None:
        """Wait for all members."""

        def run(activity: Activity) -> None:
            assert activity.session is not None
            activity.phase, activity.began = "barrier", self.stage.now
            activity.deadline = getattr(self.policy, "deadline", parameter_set.BARRIER_DEADLINE)
            known = max(worker.barriers, self.first_barriers.get((worker.name, worker.epoch), self.barriers))
            activity.passed = known < self.barriers  # without it, though it was a member before
            count = self.set.barrier(activity.session, activity.stream, worker.barriers)
            if not activity.passed:
                there = self.at_barrier()
                assert self.known.clocks.keys() <= there.keys(), "a barrier opened before all had come"
                assert activity in there.values()
                for each in there.values():
                    each.passed = True
                self.barriers += 1
            assert count == self.barriers
            if activity.current:
                worker.barriers = count

        self.act("barrier", worker, run)

    def at_barrier(self) -> dict[str, Activity]:
        """Who has come to the barrier."""
        return {
            each.worker.name: each
            for each in self.activities
            if each.phase == "barrier" and each.current and not each.passed
        }

    def crash(self, worker: Worker) -> None:
        """The process is gone; the server goes on with what it was doing for it."""
        if worker.idle:
            self.stage.do(lambda: self.set.disconnected(worker.session, worker.stream))
        worker.activity, worker.up = None, False

    def leave(self, worker: Worker) -> None:
        """Be no member any more."""

        def run(activity: Activity) -> None:
            assert activity.session is not None
            self.set.leave(activity.session, activity.stream)
            assert worker.name not in self.known.clocks

        self.act("leave", worker, run)

    def beat(self, worker: Worker) -> None:
        """Say that a worker is alive."""
        assert worker.session is not None
        worker.session.heard(worker.stream, waits=False)
        worker.heard = self.stage.now

    # What must be so whenever nobody could go on.

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.stage.ready:
            return
        for each in self.activities:
            assert each.task is not None
            assert each.task.progress is Progress.WAITS
            assert self.has_reason(each), (each.kind, each.phase, each.worker.name)
        if any(each.phase in ("turn", "push", "barrier") and each.current for each in self.activities):
            assert all(map(self.alive, self.known.clocks)), "somebody waits for the dead"
        snapshot = self.set.snapshot(pinned=False)
        assert snapshot is not None
        assert snapshot.position.version == self.version
        np.testing.assert_allclose(snapshot.data[0].view(self.dtype), self.parameters, rtol=0, atol=1e-12)

    def has_reason(self, activity: Activity) -> bool:
        """Whether there is still something to wait for."""
        now, name, policy = self.stage.now, activity.worker.name, self.policy
        match activity.phase:
            case "open":
                own = [each for each in self.activities if each.worker.name == name]
                last = [each for each in own if each.phase == "open"][-1]
                return activity is last and any(each.phase == "push" for each in own)
            case "turn":
                assert isinstance(policy, BoundedStaleness)
                blocked = self.known.ahead(name) > policy.bound and activity.current
                return blocked and now < activity.began + policy.deadline
            case "barrier":
                missing = self.known.clocks.keys() - self.at_barrier().keys()
                return now < activity.began + activity.deadline and bool(missing) and activity.current
            case "push":
                return self.round_goes_on()
        return False

    def round_goes_on(self) -> bool:
        policy = self.policy
        assert isinstance(policy, Sync)
        there = [each for each in self.activities if each.phase == "push"]
        arrivals = sorted(each.began for each in there)
        if self.stage.now >= arrivals[0] + policy.deadline:
            return False
        all_there = self.known.clocks.keys() <= {each.worker.name for each in there}
        if policy.workers is not None:
            unfilled = policy.workers - self.known.vacancies - len(self.known.clocks)
            all_there = len(there) >= policy.workers or (all_there and unfilled <= 0)
        if policy.quorum is None:
            return not all_there
        if len(there) < policy.quorum:
            return True
        return not all_there and self.stage.now < arrivals[policy.quorum - 1] + policy.grace

    def close(self) -> None:
        """Let everyone go home; nobody may be left waiting, and nothing unsaid."""
        try:
            self.draining = True
            self.stage.settle()
            self.set.drain()
            self.stage.settle()
            if self.failure is not None:
                raise self.failure
            assert not self.stage.unfinished
            assert self.records.keys() == self.told, "pushes were decided on and nobody was told"
            self.check()
        finally:
            self.stage.__exit__(None, None, None)


class Observed(Members):
    """Members of which the world is told."""

    def __init__(self, lease: float, world: World) -> None:
        super().__init__(lease)
        self._world = world
        self._lapsing = False

    def join(self, session: Session) -> Member:
        self._world.known.join(session.client_id)
        self._world.first_barriers.setdefault((session.client_id, session.epoch), self._world.barriers)
        return super().join(session)

    def leave(self, client_id: str, version: int) -> None:
        super().leave(client_id, version)
        if not len(self):
            self._world.known.vacancies = 0

    def dismiss(self, client_id: str, version: int) -> None:
        if client_id in self:
            self._world.note(lambda: self._world.left(client_id, version, lapsed=self._lapsing))
        super().dismiss(client_id, version)

    def lapse(self, version: int) -> list[str]:
        self._lapsing = True
        try:
            return super().lapse(version)
        finally:
            self._lapsing = False

    def pushed(self, session: Session, staleness: int | None, version: int) -> None:
        super().pushed(session, staleness, version)
        self._world.known.clocks[session.client_id] += 1
        self._world.known.barred.pop(session.client_id, None)


@contextmanager
def staged(policy: Policy, members: str = "", **choices: Any) -> Iterator[World]:
    """A world with some members, in which all is well in the end."""
    world = World(policy, **choices)
    try:
        for name in members:
            world.open(world.workers[name], joins=True, anew=False)
        yield world
        world.stage.settle()
        world.check()
    finally:
        world.close()


def pushed(world: World, names: str, *, samples: float = 1.0) -> None:
    """Let workers push in some order."""
    for name in names:
        world.push(world.workers[name], again=False, samples=samples, finite=True, knows_base=True)
        world.stage.settle()


def test_a_worker_that_comes_back_to_a_barrier_is_there() -> None:
    with staged(Async(), "ab") as world:
        a, b = world.workers["a"], world.workers["b"]
        world.barrier(a)
        world.crash(a)
        world.open(a, joins=True, anew=False)
        world.barrier(a)
        world.stage.settle()
        world.barrier(b)
        world.stage.settle()
        assert not world.activities


def test_what_an_older_stream_says_keeps_nobody_alive() -> None:
    with staged(Sync(), "ab") as world:
        a = world.workers["a"]
        world.open(a, joins=True, anew=False)
        assert a.older is not None
        pushed(world, "b")
        for _ in range(4):
            a.older[0].heard(a.older[1], waits=False)
            world.stage.pass_time(LEASE / 3)
        assert world.version == 1


def test_an_older_stream_can_not_leave() -> None:
    with staged(Sync(), "ab") as world:
        a = world.workers["a"]
        world.open(a, joins=True, anew=False)
        assert a.older is not None
        session, stream = a.older
        with pytest.raises(SessionSuperseded):
            world.stage.do(lambda: world.set.leave(session, stream))
        pushed(world, "b")
        assert world.version == 0


def test_a_push_of_an_older_stream_is_not_applied_after_the_newer_one_was_told() -> None:
    with staged(Async(), "a") as world:
        a = world.workers["a"]
        world.push(a, again=False, samples=1.0, finite=True, knows_base=False)  # up to where it may push
        world.crash(a)
        world.open(a, joins=True, anew=False)
        world.stage.settle()
        assert world.version == 0


def test_when_a_slow_worker_is_dismissed_all_go_on_that_waited_for_it() -> None:
    with staged(BoundedStaleness(0, deadline=7.0), "abc", lease=math.inf) as world:
        pushed(world, "b")
        world.pull(world.workers["b"])
        world.stage.pass_time(4.0)
        pushed(world, "c")
        world.pull(world.workers["c"])
        assert len(world.activities) == 2
        world.stage.pass_time(3.0)
        assert not world.activities


def test_a_new_number_of_workers_is_waited_for_whoever_left_before() -> None:
    with staged(Async(), "abcd") as world:
        for name in "bcd":
            world.leave(world.workers[name])
        world.stage.do(lambda: world.set.update({}, Sync(2)))
        pushed(world, "a")
        assert world.version == 0
        world.open(world.workers["b"], joins=False, anew=False)
        pushed(world, "b")
        assert world.version == 1


def test_what_can_not_be_added_leaves_the_others_waiting() -> None:
    with Stage() as stage:
        each = created(Sync(quorum=2), LEASE, np.float32)
        first, second, third = (each.open(name, 0, name, joins=True) for name in "abc")

        def push(session: Session, samples: float) -> Task:
            pushed = received(each, 1, np.ones(SIZE, np.float32), samples=samples)
            task = stage.begin(partial(each.push, session, session.stream, pushed, pull=False))
            stage.settle()
            return task

        waiting = push(first, 1.0)
        refused = push(second, 1e300)  # more than the dtype has room for
        assert refused.result[0].outcome is Outcome.REFUSED
        assert not waiting.done
        assert push(third, 1.0).result[0].version == 1
        assert waiting.done


def test_a_round_that_can_not_be_planned_fails_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    with Stage() as stage:
        each = created(Sync(deadline=5.0), LEASE)
        sessions = [each.open(name, 0, name, joins=True) for name in NAMES]
        gradient = np.ones(SIZE)
        waiting = [
            stage.begin(partial(each.push, session, session.stream, received(each, 1, gradient), pull=False))
            for session in sessions[1:]
        ]
        stage.settle()
        monkeypatch.setattr(each._decider, "decide", fail)
        stage.pass_time(5.0)
        assert [type(task.error) for task in waiting] == [MemoryError] * len(waiting)


@pytest.mark.parametrize("holds", list(Holds))
@pytest.mark.parametrize("count", [1, 2, 16])
def test_a_round_that_is_folded_keeps_no_gradients(holds: Holds, count: int) -> None:
    gradients: list[ref[Array]] = []

    def push(each: ParameterSet, session: Session) -> None:
        gradient = np.ones(SIZE)
        gradients.append(ref(gradient))
        pushed = received(each, 1, gradient)
        del gradient
        each.push(session, session.stream, pushed, pull=False)

    with Stage() as stage:
        each = created(Sync(count + 1), LEASE, holds=holds)
        sessions = [each.open(f"worker-{k}", 0, k) for k in range(count + 1)]
        for session in sessions:
            stage.begin(partial(push, each, session)).advance()
            kept = [gradient for gradient in gradients if gradient() is not None]
            assert len(kept) <= (1 if holds is Holds.MOMENTS else 0)  # whose worker's parameters the update may read
        stage.settle()
        assert not stage.unfinished
        assert all(gradient() is None for gradient in gradients)
        assert each.position.version == 1


DEADLINES = st.sampled_from([2.0, 7.0, 25.0])
WEIGHTS = st.sampled_from([None, staleness.Polynomial(1.0), staleness.DivideLearningRate()])
STALENESS = st.one_of(st.builds(staleness.Reject, st.integers(0, 2)), WEIGHTS)


@st.composite
def syncs(draw: st.DrawFn) -> Sync:
    """Policies of rounds."""
    workers = draw(st.none() | st.integers(1, 4))
    late = draw(st.sampled_from(Late))
    return Sync(
        workers,
        deadline=draw(DEADLINES),
        quorum=draw(st.none() | st.integers(1, workers or 3)),
        grace=draw(st.sampled_from([0.0, 0.0, 1.5])),
        late=late,
        deterministic=draw(st.booleans()),
        staleness=draw(STALENESS) if late is Late.CARRY else None,
    )


POLICIES = st.one_of(
    syncs(),
    syncs(),
    st.builds(BoundedStaleness, st.integers(0, 2), DEADLINES, STALENESS),
    st.builds(Async, STALENESS),
    st.builds(Buffered, pushes=st.integers(1, 3), staleness=STALENESS),
    st.builds(Buffered, samples=st.sampled_from([2.0, 5.0]), staleness=STALENESS),
)
WORKERS = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """Workers do anything, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World = None  # type: ignore[assignment]
        self.lazy = False

    @initialize(policy=POLICIES, lease=st.sampled_from([LEASE, LEASE, math.inf]))
    def begin(self, policy: Policy, lease: float) -> None:
        self.world = World(policy, lease)

    def worker(self, name: str) -> Worker:
        """A worker that could do something now: this one, or the next."""
        start = NAMES.index(name)
        order = [self.world.workers[each] for each in (*NAMES[start:], *NAMES[:start])]
        return next(each for each in order if each.idle)

    def settled(self) -> None:
        """Let all go on, or let some be slow."""
        if not self.lazy:
            self.world.stage.settle()
        self.lazy = False

    @property
    def some_idle(self) -> bool:
        return self.world is not None and any(each.idle for each in self.world.workers.values())

    @rule(name=WORKERS, joins=st.booleans(), anew=st.sampled_from([False, False, False, True]))
    def open(self, name: str, joins: bool, anew: bool) -> None:
        self.world.open(self.world.workers[name], joins=joins, anew=anew)
        self.settled()

    @precondition(lambda self: self.some_idle)
    @rule(
        name=WORKERS,
        again=st.booleans(),
        samples=st.sampled_from([1.0, 1.0, 2.0, 3.0]),
        finite=st.sampled_from([True] * 7 + [False]),
        knows_base=st.sampled_from([True] * 5 + [False]),
    )
    def push(self, name: str, **choices: Any) -> None:
        self.world.push(self.worker(name), **choices)
        self.settled()

    @precondition(lambda self: self.some_idle)
    @rule(name=WORKERS)
    def push_and_pull(self, name: str) -> None:
        worker = self.worker(name)
        self.world.push(worker, again=True, samples=1.0, finite=True, knows_base=True)
        self.settled()
        if worker.idle:
            self.world.pull(worker)
            self.settled()

    @precondition(lambda self: self.some_idle)
    @rule(name=WORKERS)
    def pull(self, name: str) -> None:
        self.world.pull(self.worker(name))
        self.settled()

    @precondition(lambda self: self.some_idle)
    @rule(name=WORKERS)
    def repeat(self, name: str) -> None:
        if (worker := self.worker(name)).settled is not None and worker.unsettled is None:
            self.world.repeat(worker)
            self.settled()

    @precondition(lambda self: self.some_idle)
    @rule(name=WORKERS)
    def barrier(self, name: str) -> None:
        self.world.barrier(self.worker(name))
        self.settled()

    @precondition(lambda self: self.some_idle)
    @rule(name=WORKERS)
    def leave(self, name: str) -> None:
        self.world.leave(self.worker(name))
        self.settled()

    @rule(name=WORKERS)
    def crash(self, name: str) -> None:
        self.world.crash(self.world.workers[name])
        self.settled()

    @rule(name=WORKERS, leaves=st.booleans())
    def an_older_stream_speaks(self, name: str, leaves: bool) -> None:
        if (older := self.world.workers[name].older) is not None:
            older[0].heard(older[1], waits=False)
            if leaves:
                with contextlib.suppress(SessionSuperseded):
                    self.world.stage.do(lambda: self.world.set.leave(*older))
                self.settled()

    @rule(seconds=st.sampled_from([0.5, 1.5, 5.0, 11.0]), beating=st.sets(WORKERS))
    def time_passes(self, seconds: float, beating: set[str]) -> None:
        self.world.stage.settle()
        while seconds > 0:
            for name in sorted(beating):
                if (worker := self.world.workers[name]).idle:
                    self.world.beat(worker)
            self.world.stage.pass_time(min(seconds, LEASE / 3))
            seconds -= LEASE / 3

    @rule(policy=POLICIES)
    def change(self, policy: Policy) -> None:
        with contextlib.suppress(StorageFailed):
            self.world.stage.do(lambda: self.world.set.update({}, policy))
        self.settled()

    @rule(slow=st.booleans())
    def be_slow(self, slow: bool) -> None:
        self.lazy = True

    @precondition(lambda self: self.world is not None and self.world.stage.ready)
    @rule(choice=st.integers(0, 7))
    def one_goes_on(self, choice: int) -> None:
        ready = self.world.stage.ready
        ready[choice % len(ready)].advance()

    @rule()
    def the_disk_fails(self) -> None:
        self.world.disk_fails = True

    @rule()
    def somebody_looks(self) -> None:
        listed = self.world.stage.do(self.world.set.workers)
        assert [each.client_id for each in listed] == sorted(self.world.known.clocks)
        self.settled()

    @invariant()
    def all_is_well(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.close()


TestPolicies = Machine.TestCase
TestPolicies.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize="POLICY_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
