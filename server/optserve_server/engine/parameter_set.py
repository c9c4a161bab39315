"""A parameter set: tensors, optimizer state, sessions, and the update that changes them together."""

import contextlib
import datetime
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType
from optserve._errors import (
    InvalidArgument,
    InvalidHyperparameter,
    InvalidState,
    OptserveError,
    ParameterSetNotFound,
    Refusal,
    ServerBusy,
    ServerError,
    SessionSuperseded,
    TooStale,
    WorkerQuarantined,
)
from optserve._policies import BoundedStaleness, Policy
from optserve._results import Change, Description, GroupDescription, Outcome, Position, Receipt, Summary, Worker
from optserve._rows import Indices
from optserve._specification import Holds, ParameterSetSpec
from optserve._state import GRADIENT, PARAMETERS
from optserve_server.engine import replay, slot_formats, update
from optserve_server.engine.arena import Arena, assign, copy
from optserve_server.engine.barrier import Barrier
from optserve_server.engine.buffers import Allocate, Buffer, Buffers, Memory, private, published_offsets
from optserve_server.engine.checks import check_policy
from optserve_server.engine.commit import Commit, wake_in_turn
from optserve_server.engine.decider import Decider
from optserve_server.engine.decision import Decision
from optserve_server.engine.draft import Draft
from optserve_server.engine.filling import fill
from optserve_server.engine.groups import TensorGroup, at, change, differences, resolve
from optserve_server.engine.history import NOTHING_STORED, Event, Log, Stored, Unlogged
from optserve_server.engine.loops import encode_loop
from optserve_server.engine.mean import Gathered
from optserve_server.engine.members import Members
from optserve_server.engine.outlines import Start
from optserve_server.engine.pipeline import Pipeline, Pushed
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.rounds import Rounds
from optserve_server.engine.sessions import Session, Sessions
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.staging import Staging
from optserve_server.engine.staleness import check_staleness
from optserve_server.engine.state import State
from optserve_server.engine.threads import Threads
from optserve_server.engine.views import Rows, Views
from optserve_server.engine.work import Arenas

CHANGES_KEPT = 1000
BARRIER_DEADLINE = 60.0  # seconds, where the policy has none


class ParameterSet:
    """One set. Every method may be called from any thread; each takes effect whole or not at all.

    `watermark` says how far its history is on stable storage; it is `lost`, until a restart, if an update failed half way.
    """

    def __init__(
        self,
        spec: ParameterSetSpec,
        incarnation: int,
        threads: Threads,
        allocate: Allocate = private,
        lease: float = math.inf,
    ) -> None:
        self.spec = spec
        self.layout = slot_formats.layout(spec)
        self.indices = {tensor.name: index for index, tensor in enumerate(spec.tensors)}
        self.create_time = datetime.datetime.now(datetime.UTC)
        self._groups = resolve(spec)
        self._first_groups = at(self._groups, 0)  # for compiling loops; raises for a schedule that begins out of range
        self._changes: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self._policy_since: int | None = None
        self._position = Position(incarnation, 0)
        self._events = 0
        self._undone: tuple[tuple[int, int], ...] = ()
        self.watermark = NOTHING_STORED
        self._storing = threading.Lock()  # of journal and checkpoints, which may come at a time
        self._log: Log = Unlogged()
        self._sessions = Sessions()
        self._threads = threads
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._gone: OptserveError | None = None
        self._broken = False
        self.lost = False
        self._commits: deque[Commit] = deque()
        self._members = Members(lease)
        self.lease = lease
        self._rounds = Rounds(spec.policy, spec.transforms, self._members)
        self._barrier = Barrier(self._members)
        self._opening: dict[str, object] = {}  # the last stream of each client that waits to be opened
        # In a set that holds moments only, these take the updates of the last push instead.
        self._buffers = Buffers(spec.tensors, self.layout, allocate)
        self._pipeline = Pipeline(spec, self.layout)
        self._decider = Decider(spec, self._pipeline)
        self._slots = self._pipeline.allocate()
        self._progress = self._pipeline.begin()
        self._views = Views(spec, self.layout, self._buffers, self._slots, self._pipeline, threads)
        self.state_bytes = sum(array.nbytes for arena in self._arenas().values() for array in arena.values())

    def compile(self) -> None:
        """Compile the loops that it will need, unless they are: else the first push waits for that."""
        for dtype in {tensor.dtype for tensor in self.spec.tensors}:
            read = dtype, dtype if self.spec.holds is Holds.MOMENTS else None
            with contextlib.suppress(KeyError):  # deleted meanwhile, and its arenas with it
                self._pipeline.compile_for(read, self._first_groups[0], self._memory(self._buffers.current))
                encode_loop(dtype)(np.empty((0, 3), np.int64), self._buffers.current.arena[dtype.compute])

    @property
    def position(self) -> Position:
        """Where the set's history stands."""
        watermark = self.watermark
        if watermark is NOTHING_STORED:
            return self._position
        return replace(self._position, durable_version=watermark.version)

    @property
    def events(self) -> int:
        """How many events the set's history has."""
        return self._events

    @property
    def gone(self) -> bool:
        """Whether it refuses everything, since it was retired or deleted."""
        return self._gone is not None

    @property
    def forgotten(self) -> int:
        """The last epoch that is over."""
        return self._sessions.forgotten

    @property
    def rewinds(self) -> int:
        """How often history went back."""
        return len(self._undone)

    @property
    def memories(self) -> list[Memory]:
        """The memory that holds published parameters, or did."""
        return self._buffers.memories

    @property
    def offsets(self) -> list[int]:
        """Where each tensor lies in such memory, in bytes."""
        return published_offsets(self.spec.tensors, self.layout)

    def describe(self) -> Description:
        """The set as it is now."""
        with self._lock:
            return Description(
                spec=self.spec,
                position=self.position,
                groups=tuple(map(self._describe_group, self._groups)),
                create_time=self.create_time,
                state_bytes=self.state_bytes,
                element_count=self._element_count,
                changes=tuple(self._changes),
                policy=self._rounds.policy,
                staleness=dict(self._progress.staleness),
            )

    def summarize(self) -> Summary:
        """The set in a list."""
        return Summary(
            id=self.spec.id,
            rule=self.spec.optimizer.rule,
            holds=self.spec.holds,
            position=self.position,
            tensor_count=len(self.spec.tensors),
            element_count=self._element_count,
            state_bytes=self.state_bytes,
            create_time=self.create_time,
            journal=self.spec.journal,
        )

    def load(self, staging: Staging) -> None:
        """Take the initial values of all tensors, before the set is published."""
        fill(self._buffers.current.arena, self.layout, dict(enumerate(staging.tensors)), self._threads)
        for name in self._pipeline.copies:
            assign(self._slots[name], self._buffers.current.arena)

    def begin_with(self, parameters: Mapping[str, NDArray[Any]], keys: Mapping[int, Sequence[int]]) -> None:
        """Take initial values that are there already, by name, and the keys of tables, before the set is published."""
        for index, each in keys.items():
            self._pipeline.tables[index].add(np.array(each, np.int64))
        with self.frozen() as state:
            elements = state.entries()
        for name, array in parameters.items():
            np.copyto(elements[PARAMETERS][name], array)
        for name, value in self._pipeline.rule.initial(self.spec.optimizer.at(0)).items():
            for index in keys:
                elements[name][self.spec.tensors[index].name].fill(value)
        for name in self._pipeline.copies:
            assign(self._slots[name], self._buffers.current.arena, self._pipeline.used(name))

    def resume(self, start: Start, staging: Staging) -> None:
        """Begin where something else stood, with the elements that came for it, before the set is published."""
        elements = iter(staging.tensors)
        parts = {part.name: dict(zip(part.tensors, elements, strict=False)) for part in start.parts}
        fill(self._buffers.current.arena, self.layout, parts.pop(PARAMETERS, {}), self._threads)
        for name in self._pipeline.copies:
            assign(self._slots[name], self._buffers.current.arena)
        arenas, layouts = self._arenas(), {GRADIENT: self.layout, **self._pipeline.slots}
        for name, tensors in parts.items():
            fill(arenas[name], layouts[name], tensors, self._threads)
        self._progress = start.progress
        self._position = replace(self._position, version=start.version)

    def update(self, changes: Mapping[str, Mapping[str, Any]], policy: Policy | None = None) -> None:
        """Change hyperparameters by group and name, or the policy; a round that is under way is then given up.

        Raises InvalidGroup, InvalidHyperparameter, InvalidPolicy, ServerBusy or StorageFailed.
        """
        if policy is not None:
            check_policy(self.spec, policy)
        with self._lock:
            self._check_alive()
            groups = change(self._groups, changes)
            for group in groups:
                if group.name in changes:
                    group.optimizer.at(self._position.version)  # raises for a schedule that is out of range already
            event = Event(self._events + 1, self._position.version, changes=changes, policy=policy)
            try:
                if policy is not None:
                    self._make_room(policy)
                self._log.append([event])
            except BaseException:
                self._pipeline.settle(self._progress.accumulated)
                raise
            self._broken = True
            self._changes.extend(differences(self._groups, groups, self._position.version))
            self._groups = groups
            if policy is not None:
                self._follow(policy)
                self._policy_since = self._position.version
            self._events = event.number
            self._broken = False
            self._changed.notify_all()
        self._log.wait(event.number)

    def _make_room(self, policy: Policy) -> None:
        try:
            self._pipeline.make_room(policy)
        except MemoryError:
            raise ServerBusy(f"there is no memory for what {policy} needs; try again later") from None

    def _follow(self, policy: Policy) -> None:
        """Follow a policy from now on; there is memory for it."""
        self._rounds.change(policy)
        self._pipeline.follow(policy, accumulated=self._progress.accumulated)

    def open(self, client_id: str, epoch: int, stream: object, *, joins: bool = False) -> Session:
        """Open or resume a client's session; a push of its older stream that has begun is finished first, and its round.

        Who `joins` is a member from now on, others are from their first push.

        Raises SessionSuperseded, or StorageFailed if what its last push did can't be told yet.
        """
        with self._lock:
            self._check_alive()
            self._opening[client_id] = stream
            self._changed.notify_all()
            try:
                while self._rounds.has(client_id):  # and so be decided on, before its worker is told what became of it
                    self._changed.wait(self._rounds.remaining)
                    self._end_round()
                    self._check_alive()
                    self._check_opening(client_id, stream)
            finally:
                if self._opening.get(client_id) is stream:
                    del self._opening[client_id]
            session = self._sessions.open(client_id, epoch, stream)
            if joins or client_id in self._members:
                self._join(session)
            self._changed.notify_all()  # its older stream may wait
        self._log.wait(session.last_event)
        return session

    def _check_opening(self, client_id: str, stream: object) -> None:
        """Raises SessionSuperseded if a later stream of the client waits here as well: its worker has given this one up."""
        if self._opening.get(client_id) is not stream:
            raise SessionSuperseded(
                f"client {client_id!r} opened a newer stream on this set; use one handle per worker"
            )

    def _join(self, session: Session) -> None:
        """Let a worker be a member, or stay one; who makes room for it is gone."""
        if session.barriers is None:
            session.barriers = self._barrier.passed
        if session.client_id not in self._members:
            self._lapse()
        self._members.join(session)

    def _lapse(self) -> None:
        """Let those go whose leases have ended."""
        for client_id in self._members.lapse(self._position.version):
            self._pipeline.bases.let_go(client_id)

    def begin(
        self,
        sequence: int,
        declared: Sequence[Declared],
        *,
        base: Position | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        loss_scale: float = 1.0,
        samples: float = 1.0,
    ) -> Push:
        """A push of this set, to be filled, finished and given to `push`."""
        push = Push(
            self.spec,
            self.indices,
            self._threads,
            sequence,
            declared,
            base=base,
            changes=changes,
            loss_scale=loss_scale,
            samples=samples,
        )
        # What gradients travel as is not known before. Nor should this wait for updates, or they for a compiler.
        try:
            self._pipeline.compile(push, self._first_groups[0], self._memory(self._buffers.current))
        except KeyError:
            self._check_present()  # if not, its arenas are gone as well
            raise
        return push

    def push(
        self,
        session: Session,
        stream: object,
        push: Push,
        *,
        pull: bool,
        dtype: DType | None = None,
        held: Snapshot | None = None,
    ) -> tuple[Receipt, Snapshot | None]:
        """Apply a finished push, or refuse it; either consumes its sequence and is its receipt for ever.

        With `pull`, also the tensors after it, pinned, if they can be (of a push that came again, or made no update, or if
        another dtype is wanted: None; but in a set that holds moments only a copy in that dtype, or no tensors). If it is
        applied, `held`, which the worker has read until now, is released before. Pushes that wait here at the same time are
        applied in one pass, in the order in which they came; those of a synchronous round wait for each other. Raises
        SequenceGap, SequenceReused, SessionSuperseded, ServerBusy (RoundIncomplete is one), ServerDraining or
        ParameterSetNotFound, which consume nothing; or StorageFailed, after which that is not known.
        """
        commit = Commit(session, stream, push, pull, held, dtype)
        self._commits.append(commit)
        session.heard(stream, waits=True)
        with self._lock:
            while self._commits and not commit.done:
                try:
                    self._apply(self._next_commits())
                finally:
                    self._changed.notify_all()
            if not commit.done:
                commit.decided = threading.Event()
        if commit.decided is not None:
            self._await_others(commit, commit.decided)
        session.heard(stream, waits=False)
        if commit.error is not None:
            try:
                raise commit.error
            finally:
                del commit  # which its own error would keep alive
        assert commit.receipt is not None
        try:
            self._log.wait(commit.event)
        except BaseException:
            if commit.snapshot is not None:
                self.release(commit.snapshot)
            raise
        return self._told(commit.receipt, commit.event, session), commit.snapshot

    def _await_others(self, commit: Commit, decided: threading.Event) -> None:
        """Return once a push that waits in a round has an outcome; then the following one may go on as well."""
        try:
            while not decided.wait(self._rounds.remaining):
                with self._lock:
                    self._end_round()
        finally:
            decided.set()
            if commit.following is not None:
                commit.following.wake()

    def _end_round(self) -> None:
        """Decide on a round that is over although nobody came."""
        self._lapse()
        if together := self._round_over():
            draft = Draft(self._groups, self._position, self._progress.copy())
            try:
                decision = self._decide(together, draft, self._events + 1)
            except Exception as error:  # of which each that waits has to hear
                for each in together:
                    each.fail(error)
            else:
                self._settle(draft, [decision], together)
            finally:
                self._changed.notify_all()

    def _round_over(self) -> list[Commit]:
        """The pushes of a round that is over; no other waits again for those that it has waited for in vain."""
        together = self._rounds.over(self._position.version)
        for client_id in self._rounds.overdue:
            self._dismiss(client_id)
        return together

    @property
    def takes_turns(self) -> bool:
        """Whether workers may have to wait before they read."""
        return isinstance(self._rounds.policy, BoundedStaleness)

    def await_turn(self, session: Session, stream: object) -> None:
        """Return once a worker is not too far ahead of others, as the policy has it.

        Raises SessionSuperseded or ServerDraining.
        """
        if not isinstance(self._rounds.policy, BoundedStaleness):
            return
        begin = time.monotonic()
        with self._lock:
            while isinstance(policy := self._rounds.policy, BoundedStaleness):
                self._check_alive()
                session.check_stream(stream)
                self._rounds.check_draining()
                self._end_round()
                behind = self._members.behind(session, policy.bound)
                left = begin + policy.deadline - time.monotonic()
                if not behind:
                    break
                if left <= 0:
                    for client_id in behind:
                        self._dismiss(client_id)
                    self._changed.notify_all()
                    break
                session.heard(stream, waits=True)
                self._changed.wait(min(left, self._members.remaining))
            session.heard(stream, waits=False)

    def barrier(self, session: Session, stream: object, known: int) -> int:
        """Return once all members have come to the barrier after `known` others; how many there were then.

        Those that there were before the worker was a member are none of its own. Raises RoundIncomplete, SessionSuperseded or
        ServerDraining.
        """
        deadline = getattr(self._rounds.policy, "deadline", BARRIER_DEADLINE)
        with self._lock:
            self._check_alive()
            session.check_stream(stream)
            session.heard(stream, waits=True)
            self._join(session)
            known = min(max(known, session.barriers or 0), self._barrier.passed)
            self._barrier.arrive(session.client_id, stream)
            try:
                while self._barrier.passed <= known:
                    self._check_alive()
                    session.check_stream(stream)
                    self._rounds.check_draining()
                    self._end_round()
                    if not self._barrier.opened():
                        self._changed.wait(self._barrier.remaining(session.client_id, deadline))
            finally:
                self._barrier.depart(session.client_id, stream)
                session.heard(stream, waits=False)
                self._changed.notify_all()
            return self._barrier.passed

    @property
    def barriers(self) -> int:
        """How many barriers there were."""
        return self._barrier.passed

    def leave(self, session: Session, stream: object) -> None:
        """Be no member any more: nobody waits for this worker. Raises SessionSuperseded."""
        with self._lock:
            session.check_stream(stream)
            self._members.leave(session.client_id, self._position.version)
            self._pipeline.bases.let_go(session.client_id)
            self._end_round()
            self._changed.notify_all()

    def disconnected(self, session: Session, stream: object) -> None:
        """A stream has ended: what only it has read is let go of; without a lease its worker leaves."""
        with self._lock:
            if session.stream is not stream:
                return
            if session.client_id not in self._members:
                self._pipeline.bases.let_go(session.client_id)
            elif self.lease == math.inf:
                self._dismiss(session.client_id)
                self._end_round()
                self._changed.notify_all()

    def _dismiss(self, client_id: str) -> None:
        """Wait for a member no more."""
        self._members.dismiss(client_id, self._position.version)
        self._pipeline.bases.let_go(client_id)

    def workers(self) -> list[Worker]:
        """The members, ordered by client id."""
        with self._lock:
            self._end_round()
            quarantined = self._rounds.quarantined(self._position.version)
            return [replace(each, quarantined=each.client_id in quarantined) for each in self._members.describe()]

    def last_receipt(self, session: Session) -> Receipt | None:
        """What became of a session's last push, and how far that has come by now; None before the first."""
        receipt = session.last_receipt
        return receipt and self._told(receipt, session.last_event, session)

    def _told(self, receipt: Receipt, event: int, session: Session) -> Receipt:
        """A receipt that says how far it, and its session, have come by now."""
        watermark = self.watermark
        if watermark is NOTHING_STORED:
            return receipt
        return replace(
            receipt,
            position=replace(receipt.position, durable_version=watermark.version),
            durability=watermark.reached(event),
            durable_sequence=session.durable_sequence,
        )

    def _hold(self, reader: Session | None) -> None:
        """Keep what a worker reads, if that will be looked at when it pushes."""
        if reader is not None and self._pipeline.keeps_bases:
            self._lapse()
            self._pipeline.bases.hold(reader.client_id, self._position.version, self._buffers.current.arena)

    def snapshot(
        self,
        *,
        pinned: bool = True,
        dtype: DType | None = None,
        evaluation: bool = False,
        reader: Session | None = None,
    ) -> Snapshot | None:
        """The tensors of the current version: parameters, or the updates of the last push; or the parameters to evaluate.

        If `pinned`, they are the set's own memory, to be released; None if too many versions are being read. Otherwise they
        are a copy, which all who ask for it share, in elements of a smaller dtype if one is given. The `reader` may push
        what it makes of them.
        """
        with self._lock:
            self._check_alive()
            self._hold(reader)
            if pinned and dtype is None and not evaluation:
                return self._views.pin(self.position)
            return self._views.copy(self.position, dtype, evaluation=evaluation)

    def rows(
        self, whole: Sequence[int], rows: Rows, dtype: DType | None = None, *, evaluation: bool = False
    ) -> Snapshot:
        """A copy of some rows of tensors, by index or, of tables, by key; and of others whole, which come first."""
        with self._lock:
            self._check_alive()
            return self._views.rows(self.position, whole, rows, dtype, evaluation=evaluation)

    def check_pull(self, names: Sequence[str], rows: Mapping[str, Indices], *, evaluation: bool) -> Rows:
        """The rows that a pull asks for by the tensor's index; raises TensorMismatch or InvalidTransform if it can't be had."""
        return self._views.check(self.indices, names, rows, evaluation=evaluation)

    def release(self, snapshot: Snapshot) -> None:
        """Say that a snapshot is not read any more; again does nothing."""
        if snapshot.buffer is not None:
            self._buffers.unpin(snapshot.buffer)
            snapshot.buffer = None

    def snapshot_nbytes(self, dtype: DType | None) -> int:
        """Size of a copy."""
        return self._views.nbytes(dtype)

    def rows_nbytes(self, whole: Sequence[int], rows: Rows, dtype: DType | None) -> int:
        """Size of a copy of some rows, and of some tensors whole."""
        return self._views.rows_nbytes(whole, rows, dtype)

    def keep(self, log: Log) -> None:
        """Let events go to a log from now on."""
        with self._lock:
            self._log = log

    @contextlib.contextmanager
    def frozen(self) -> Iterator[State]:
        """All that the set is, in its own memory; nothing changes until this ends."""
        with self._lock:
            self._check_alive()
            yield State(
                spec=self.spec,
                position=self._position,
                create_time=self.create_time,
                optimizers={group.name: group.optimizer for group in self._groups},
                changes=list(self._changes),
                arenas=self._arenas(),
                progress=self._progress.copy(),
                sessions=self._sessions.copy(),
                forgotten=self._sessions.forgotten,
                events=self._events,
                undone=self._undone,
                policy=self._rounds.policy,
                policy_since=self._policy_since,
                keys={index: list(table.keys) for index, table in self._pipeline.tables.items()},
            )

    def capture(self) -> State:
        """A copy of all that the set is; updates wait until it is taken."""
        with self.frozen() as state:
            arenas = {name: copy(arena, self._pipeline.used(name)) for name, arena in state.arenas.items()}
            return replace(state, arenas=arenas)

    def restore(self, state: State) -> None:
        """Become what a state says but for its arenas, in this set's own incarnation, before it is published.

        The elements are to be written to `frozen().entries()` afterwards.
        """
        for index, keys in state.keys.items():
            self._pipeline.tables[index].add(np.array(keys, np.int64))
        self.create_time = state.create_time
        self._groups = tuple(replace(group, optimizer=state.optimizers[group.name]) for group in self._groups)
        self._changes.extend(state.changes)
        self._position = replace(state.position, incarnation=self._position.incarnation)
        self._events, self._undone = state.events, state.undone
        self._progress = state.progress.copy()
        self._pipeline.make_room(state.policy, accumulated=state.progress.accumulated)
        self._follow(state.policy)
        self._policy_since = state.policy_since
        self._sessions.restore(state.sessions, state.forgotten)

    def repeat(self, event: Event) -> None:
        """Let an event happen again; raises InvalidState if that can't lead to where it led."""
        if event.number != self._events + 1:
            raise InvalidState(f"expected event {self._events + 1}; got {event.number}")
        draft = Draft(self._groups, self._position, self._progress.copy())
        content = event.content
        brought: Push | Gathered | None = None
        kept: object = None  # what is read until the update has run
        if content is not None and not content.gathered:
            brought = replay.pushed(event, content, self.begin)
        with self._lock:
            if content is not None and content.gathered:
                assert self._pipeline.mean is not None
                brought, kept = replay.round_of(content, self.indices, self._pipeline.mean, self.layout, self._threads)
            self._decider.repeat(event, draft, brought)
            after = self._writable(draft)
            self._log.append([event])
            self._broken = True
            self._gather(draft, after)
            self._run(draft, after)
            del kept
            if event.policy is not None:
                self._pipeline.make_room(event.policy)
                self._follow(event.policy)
                self._policy_since = self._position.version
            self._events = event.number
            for each in event.pushes:
                self._sessions.resume(each.client_id, each.epoch).record(each.digest, each.receipt, event.number)
            self._broken = False

    def stored(self, stored: Stored) -> None:
        """Say what has come to be on stable storage, in every answer from now on."""
        with self._storing:
            self.watermark = self.watermark.raised(stored)
        for client_id, epoch, sequence in stored.sequences:
            self._sessions.made_durable(client_id, epoch, sequence)

    def drain(self) -> None:
        """Let nobody wait for other workers any more: those who do are told to try again once the server is back."""
        with self._lock:
            self._rounds.drain()
            self._changed.notify_all()

    def delete(self) -> None:
        """Refuse everything from now on, and let go of the memory."""
        with self._lock:
            self._leave(ParameterSetNotFound(f"parameter set {self.spec.id!r} was deleted"))
        self.clear()

    def retire(self, error: OptserveError) -> State:
        """Refuse everything from now on with an error; what the set was in the end, in its own memory."""
        with self.frozen() as state:
            self._leave(error)
            return state

    def _leave(self, error: OptserveError) -> None:
        self._gone = error
        self._rounds.give_up(error)
        self._changed.notify_all()

    def reinstate(self) -> None:
        """Take `retire` back."""
        with self._lock:
            self._gone = None

    def clear(self) -> None:
        """Let go of the memory of a set that is retired."""
        with self._lock:
            self._views.forget()
            self._buffers.clear()
            self._pipeline.clear()
            for arena in self._slots.values():
                arena.clear()

    def rewound(self, end: State) -> None:
        """Be the same set at an earlier version, before it is published: its history goes on after the `end` that it had."""
        self._undone = (*end.undone, (self._events + 1, end.events))
        self._events = end.events + 1
        self._sessions.restore(end.sessions, end.forgotten)

    def _describe_group(self, group: TensorGroup) -> GroupDescription:
        optimizer = group.optimizer
        try:
            evaluated = optimizer.at(self._position.version)
        except InvalidHyperparameter:
            evaluated = optimizer
        tensors = tuple(self.spec.tensors[index].name for index in group.members)
        return GroupDescription(group.name, tensors, evaluated, optimizer.schedules)

    @property
    def _element_count(self) -> int:
        return sum(tensor.size for tensor in self.spec.tensors)

    def _arenas(self) -> dict[str, Arena]:
        """What outlives a restart."""
        parameters = {PARAMETERS: self._buffers.current.arena} if self.spec.holds is Holds.PARAMETERS else {}
        mean = self._pipeline.mean
        waits = self._pipeline.accumulates or self._progress.accumulated
        gradient = {GRADIENT: mean.arena} if mean is not None and waits else {}
        return parameters | gradient | self._slots

    def _memory(self, after: Buffer) -> Arenas:
        """What an update acts on that writes a buffer."""
        mean = self._pipeline.mean
        return Arenas(self._buffers.current.arena, after.arena, self._slots, mean.arena if mean is not None else {})

    def _check_present(self) -> None:
        if self._gone is not None:
            raise type(self._gone)(str(self._gone))

    def _check_alive(self) -> None:
        self._check_present()
        if self._broken:
            raise ServerError(
                f"parameter set {self.spec.id!r} is unusable: an update failed half way; restart the server to restore it"
            )

    def _next_commits(self) -> list[Commit]:
        """Those that wait; or one, if they can't share a pass: updates that a set of moments returns must be read before
        the next, there is memory for one mean, and one at a time lets tables grow."""
        alone = self.spec.holds is Holds.MOMENTS or self._pipeline.mean is not None or self._pipeline.tables
        most = 1 if alone else len(self._commits)
        return [self._commits.popleft() for _ in range(most)]

    def _apply(self, commits: Sequence[Commit]) -> None:
        """Decide on commits in their order, run all of their updates in one pass, and take their snapshots."""
        draft = Draft(self._groups, self._position, self._progress.copy())
        decisions: list[Decision] = []
        for commit in commits:
            together = [commit]
            try:
                self._check_alive()
                commit.session.check_stream(commit.stream)
                first = commit.session.admit(commit.push.sequence, commit.push.digest)
                if first is not None:
                    commit.settle(first.receipt, first.event)
                    continue
                commit.staleness = draft.staleness(commit.push)
                if not self._joins_round(commit) or (together := self._round_over()):
                    decisions.append(self._decide(together, draft, self._events + len(decisions) + 1))
            except Exception as error:
                for each in together:
                    each.fail(error)
        self._settle(draft, decisions, commits)

    def _joins_round(self, commit: Commit) -> bool:
        """Let a push wait for others, if that is how it is to be."""
        self._discard(commit)
        self._join(commit.session)
        self._rounds.join(commit)
        if not self._rounds.has(commit.session.client_id):
            return False
        if self._folds and commit.push.refusal is None:
            self._fold(commit)
        return self._rounds.has(commit.session.client_id)

    def _discard(self, commit: Commit) -> None:
        """Discard a push that is not to be part of an update, as the policy has it."""
        if commit.push.refusal is None:
            client_id, version = commit.session.client_id, self._position.version
            barred = self._members.barred(client_id)
            missed = not self._members.took_part(client_id, version)
            known = self._decider.knows_base(commit)
            try:
                check_staleness(commit, self._rounds.policy, version, barred, missed=missed, known=known)
                self._rounds.judge(commit, version)
            except (TooStale, WorkerQuarantined) as error:
                commit.discarded = Refusal.of(error)

    def _fold(self, commit: Commit) -> None:
        """Add a push to its round, and let go of it; one that can't be added is refused."""
        folded, push = self._rounds.folded, commit.push
        assert folded is not None
        try:
            pushed = Pushed(push, commit.staleness, self._decider.base(commit))
            gather, sparse = self._pipeline.fold(pushed, folded)
        except InvalidArgument as error:
            self._rounds.refuse(commit, error)
            return
        try:
            for work in gather:
                work.run(self._memory(self._buffers.current), self._threads)
        except BaseException:
            self._rounds.give_up(ServerBusy("there was no memory for a push of this round; try again later"))
            raise
        folded.samples += push.samples
        folded.sparse = sparse
        if folded.first is None:
            folded.first = push
        if folded.first is not push or self.spec.holds is Holds.PARAMETERS:
            push.let_go()

    def _decide(self, commits: Sequence[Commit], draft: Draft, number: int) -> Decision:
        folded = None
        if self._folds and self._rounds.waits(commits[0]):
            folded, self._rounds.folded = self._rounds.folded, None
        return self._decider.decide(commits, draft, number, folded)

    @property
    def _folds(self) -> bool:
        """Whether a round is added up in the mean as it comes; not while pushes from before it wait there."""
        return self._rounds.folds and not self._progress.accumulated

    def _settle(self, draft: Draft, decisions: Sequence[Decision], commits: Sequence[Commit]) -> None:
        """Become what was decided, and let everyone know."""
        decided = [commit for decision in decisions for commit in decision.commits]
        try:
            if decisions:
                self._become(draft, decisions)
        except Exception as error:
            self.lost = self.lost or self._broken
            for commit in decided:
                commit.fail(error)
            return
        try:
            self._note(decisions)
            for commit in {*commits, *decided}:
                if commit.pull and commit.receipt is not None:
                    try:
                        commit.snapshot = self._after(commit)
                    except Exception as error:  # what was applied stays applied
                        commit.fail(error)
        finally:
            wake_in_turn([commit for commit in decided if commit.waits])

    def _note(self, decisions: Sequence[Decision]) -> None:
        """Let those know who keep account of workers."""
        for decision in decisions:
            taken = decision.receipts[0].outcome in (Outcome.APPLIED, Outcome.ACCUMULATED)
            if taken:
                self._rounds.accept(decision.commits)
            for commit in decision.commits:
                self._members.pushed(commit.session, commit.staleness, decision.version if taken else -1)

    def _after(self, commit: Commit) -> Snapshot | None:
        """What is pulled with a push."""
        assert commit.receipt is not None
        moments_only, receipt, dtype = self.spec.holds is Holds.MOMENTS, commit.receipt, commit.dtype
        if not receipt.applied:
            return Snapshot(self._position, (), (), ()) if moments_only else None
        self._hold(commit.session)
        pinned = self._views.pin(self.position) if dtype is None else None
        return self._views.copy(self.position, dtype) if pinned is None and moments_only else pinned

    def _become(self, draft: Draft, decisions: Sequence[Decision]) -> None:
        """Become what the draft says, once the log has it; raises StorageFailed or ServerBusy, and nothing changed."""
        applied = [commit for each in decisions if each.receipts[0].applied for commit in each.commits]
        held = [commit.held for commit in applied if commit.held]
        buffers = [each.buffer for each in held if each.buffer is not None]
        for buffer in buffers:
            self._buffers.unpin(buffer)
        recorded = any(each.update is not None and each.update.recorded for each in decisions)
        undo = self._mean_before() if recorded else None
        try:
            after = self._writable(draft)
            if recorded:
                self._broken = bool(self._progress.accumulated) and undo is None
                self._gather(draft, after)
                self._broken = False
            self._log.append(each.event(self.spec.tensors) for each in decisions)
        except BaseException:
            for buffer in buffers:
                self._buffers.pin_again(buffer)
            if undo is not None and self._pipeline.mean is not None:
                assign(self._pipeline.mean.arena, undo)
            raise
        for each in held:
            each.buffer = None
        self._broken = True  # until all that the log has has happened: else nothing is ever read from this set again
        if not recorded:
            self._gather(draft, after)
        self._run(draft, after)
        self._events = decisions[-1].number
        for decision in decisions:
            for commit, receipt in zip(decision.commits, decision.receipts, strict=True):
                commit.session.record(commit.push.digest, receipt, decision.number)
                self._sessions.touch(commit.session)
                commit.settle(receipt, decision.number)
        self._broken = False

    def _mean_before(self) -> Arena | None:
        """A copy of the mean, if it has gradients of earlier rounds in it and the log may refuse those of this one."""
        if isinstance(self._log, Unlogged) or not self._progress.accumulated or self._pipeline.mean is None:
            return None
        return copy(self._pipeline.mean.arena)

    def _writable(self, draft: Draft) -> Buffer:
        try:
            return self._buffers.writable() if draft.updated else self._buffers.current
        except (MemoryError, OSError):
            raise ServerBusy("there is no memory for another version of the parameters; try again later") from None

    def _gather(self, draft: Draft, after: Buffer) -> None:
        """Make gradients one, in memory of the set."""
        for planned in draft.updates:
            for work in planned.gather:
                work.run(self._memory(after), self._threads)

    def _run(self, draft: Draft, after: Buffer) -> None:
        """Become what the draft says; the caller marks the set as broken until all of it is done."""
        update.run(draft.updates, self._memory(after), self._threads)
        if draft.updated:
            self._buffers.publish(after, draft.updated, draft.position.version)
            self._views.forget()
            self._pipeline.bases.moved(after.arena, self._threads)
            if self.spec.holds is Holds.MOMENTS:
                self._views.present = tuple(sorted(draft.updated))
        self._groups, self._position, self._progress = draft.groups, draft.position, draft.progress
        self._changes.extend(draft.changes)
        self._pipeline.settle(self._progress.accumulated)
