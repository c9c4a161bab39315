"""A parameter set: tensors, optimizer state, sessions, and the update that changes them together."""

import datetime
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from optserve._dtypes import DType
from optserve._errors import (
    InvalidArgument,
    InvalidHyperparameter,
    ParameterSetNotFound,
    Refusal,
    ServerBusy,
    ServerError,
)
from optserve._results import Change, Description, GroupDescription, Outcome, Position, Receipt, Summary
from optserve._rows import Indices
from optserve._specification import Holds, ParameterSetSpec
from optserve._state import GRADIENT, PARAMETERS
from optserve._transforms import SkipNonFinite
from optserve_server.engine import slot_formats, update
from optserve_server.engine.arena import Arena, ComputeType, Layout, assign, copy
from optserve_server.engine.buffers import Allocate, Buffer, Buffers, Memory, private, published_offsets
from optserve_server.engine.commit import Commit
from optserve_server.engine.draft import Draft
from optserve_server.engine.groups import TensorGroup, at, change, check_pushed, differences, resolve
from optserve_server.engine.loops import decode_loop, encode_loop
from optserve_server.engine.outlines import Start
from optserve_server.engine.pipeline import Pipeline
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.rounds import Rounds, merged_changes
from optserve_server.engine.sessions import Session, Sessions
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.staging import StagedTensor, Staging
from optserve_server.engine.state import State
from optserve_server.engine.threads import Threads
from optserve_server.engine.views import Rows, Views
from optserve_server.engine.work import Arenas

CHANGES_KEPT = 1000


class ParameterSet:
    """One set. Every method may be called from any thread; each takes effect whole or not at all."""

    rewinds = 0
    """How often it was rewound."""

    def __init__(
        self, spec: ParameterSetSpec, incarnation: int, threads: Threads, allocate: Allocate = private
    ) -> None:
        self.spec = spec
        self.layout = slot_formats.layout(spec)
        self.indices = {tensor.name: index for index, tensor in enumerate(spec.tensors)}
        self.create_time = datetime.datetime.now(datetime.UTC)
        self._groups = resolve(spec)
        self._first_groups = at(self._groups, 0)  # for compiling loops; raises for a schedule that begins out of range
        self._changes: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self._position = Position(incarnation, 0)
        self._sessions = Sessions()
        self._threads = threads
        self._lock = threading.Lock()
        self._decided = threading.Condition(self._lock)
        self._deleted = False
        self._broken = False
        self._commits: deque[Commit] = deque()
        self._rounds = Rounds(spec.policy, spec.transforms)
        # In a set that holds moments only, these take the updates of the last push instead.
        self._buffers = Buffers(spec.tensors, self.layout, allocate)
        self._pipeline = Pipeline(spec, self.layout)
        self._slots = self._pipeline.allocate()
        self._progress = self._pipeline.begin()
        self._views = Views(spec, self.layout, self._buffers, self._slots, self._pipeline, threads)
        self.state_bytes = sum(array.nbytes for arena in self._arenas().values() for array in arena.values())
        for dtype in {tensor.dtype for tensor in spec.tensors}:
            read = dtype, dtype if spec.holds is Holds.MOMENTS else None
            self._pipeline.compile_for(read, self._first_groups[0], self._memory(self._buffers.current))
            encode_loop(dtype)(np.empty((0, 3), np.int64), self._buffers.current.arena[dtype.compute])

    @property
    def position(self) -> Position:
        """Where the set's history stands."""
        return self._position

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
                position=self._position,
                groups=tuple(map(self._describe_group, self._groups)),
                create_time=self.create_time,
                state_bytes=self.state_bytes,
                element_count=self._element_count,
                changes=tuple(self._changes),
            )

    def summarize(self) -> Summary:
        """The set in a list."""
        return Summary(
            id=self.spec.id,
            rule=self.spec.optimizer.rule,
            holds=self.spec.holds,
            position=self._position,
            tensor_count=len(self.spec.tensors),
            element_count=self._element_count,
            state_bytes=self.state_bytes,
            create_time=self.create_time,
        )

    def load(self, staging: Staging) -> None:
        """Take the initial values of all tensors, before the set is published."""
        self._fill(self._buffers.current.arena, self.layout, dict(enumerate(staging.tensors)))
        for name in self._pipeline.copies:
            assign(self._slots[name], self._buffers.current.arena)

    def resume(self, start: Start, staging: Staging) -> None:
        """Begin where something else stood, with the elements that came for it, before the set is published."""
        elements = iter(staging.tensors)
        parts = {part.name: dict(zip(part.tensors, elements, strict=False)) for part in start.parts}
        self._fill(self._buffers.current.arena, self.layout, parts.pop(PARAMETERS, {}))
        for name in self._pipeline.copies:
            assign(self._slots[name], self._buffers.current.arena)
        arenas, layouts = self._arenas(), {GRADIENT: self.layout, **self._pipeline.slots}
        for name, tensors in parts.items():
            self._fill(arenas[name], layouts[name], tensors)
        self._progress = start.progress
        self._position = replace(self._position, version=start.version)

    def _fill(self, arena: Arena, layout: Layout, tensors: Mapping[int, StagedTensor]) -> None:
        """Write staged tensors, by index, to their places in an arena."""
        tables: dict[tuple[ComputeType, DType], list[list[int]]] = {}
        for index, tensor in tensors.items():
            place = layout.places[index]
            table = tables.setdefault((place.compute, tensor.spec.dtype), [])
            itemsize = tensor.spec.dtype.itemsize
            table += [
                [place.start + piece.offset, piece.size, piece.address + piece.skip * itemsize]
                for piece in tensor.pieces
            ]
        for (compute, dtype), table in tables.items():
            if table:
                rows = np.array(table, np.int64)
                self._threads.run(decode_loop(dtype), rows, {2: dtype.itemsize}, arena[compute])

    def update(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Change hyperparameters by group and name; raises InvalidGroup or InvalidHyperparameter."""
        with self._lock:
            self._check_alive()
            version, groups = self._position.version, change(self._groups, changes)
            for group in groups:
                if group.name in changes:
                    group.optimizer.at(version)  # raises for a schedule that is out of range already
            self._changes.extend(differences(self._groups, groups, version))
            self._groups = groups

    def open(self, client_id: str, epoch: int, stream: object) -> Session:
        """Open or resume a client's session; a push of its older stream that has begun is finished first."""
        with self._lock:
            self._check_alive()
            self._rounds.withdraw(client_id)
            self._decided.notify_all()
            return self._sessions.open(client_id, epoch, stream)

    def begin(
        self,
        sequence: int,
        declared: Sequence[Declared],
        *,
        base: Position | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        loss_scale: float = 1.0,
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
        )
        # What gradients travel as is not known before. Nor should this wait for updates, or they for a compiler.
        try:
            self._pipeline.compile(push, self._first_groups[0], self._memory(self._buffers.current))
        except KeyError:
            if self._deleted:  # and its arenas with it
                raise self._not_found() from None
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
        ParameterSetNotFound, which consume nothing.
        """
        commit = Commit(session, stream, push, pull, held, dtype)
        self._commits.append(commit)
        with self._lock:
            while not commit.done:
                try:
                    if self._commits:
                        self._apply(self._next_commits())
                    else:
                        self._decided.wait(self._rounds.remaining)
                        self._rounds.expire()
                finally:
                    self._decided.notify_all()
        if commit.error is not None:
            try:
                raise commit.error
            finally:
                del commit  # which its own error would keep alive
        assert commit.receipt is not None
        return commit.receipt, commit.snapshot

    def snapshot(self, *, pinned: bool = True, dtype: DType | None = None, evaluation: bool = False) -> Snapshot | None:
        """The tensors of the current version: parameters, or the updates of the last push; or the parameters to evaluate.

        If `pinned`, they are the set's own memory, to be released; None if too many versions are being read. Otherwise they
        are a copy, which all who ask for it share, in elements of a smaller dtype if one is given.
        """
        with self._lock:
            self._check_alive()
            if pinned and dtype is None and not evaluation:
                return self._views.pin(self._position)
            return self._views.copy(self._position, dtype, evaluation=evaluation)

    def rows(
        self, whole: Sequence[int], rows: Rows, dtype: DType | None = None, *, evaluation: bool = False
    ) -> Snapshot:
        """A copy of some rows of tensors, by index or, of tables, by key; and of others whole, which come first."""
        with self._lock:
            self._check_alive()
            return self._views.rows(self._position, whole, rows, dtype, evaluation=evaluation)

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

    def capture(self) -> State:
        """A copy of all that the set is; updates wait until it is taken."""
        with self._lock:
            self._check_alive()
            return State(
                spec=self.spec,
                position=self._position,
                create_time=self.create_time,
                optimizers={group.name: group.optimizer for group in self._groups},
                changes=list(self._changes),
                arenas={name: copy(arena, self._pipeline.used(name)) for name, arena in self._arenas().items()},
                progress=self._progress.copy(),
                sessions=self._sessions.copy(),
                forgotten=self._sessions.forgotten,
                keys={index: list(table.keys) for index, table in self._pipeline.tables.items()},
            )

    def restore(self, state: State) -> None:
        """Become what was captured, in this set's own incarnation, before it is published."""
        for index, keys in state.keys.items():
            self._pipeline.tables[index].add(np.array(keys, np.int64))
        for name, arena in self._arenas().items():
            assign(arena, state.arenas[name], self._pipeline.used(name))
        self.create_time = state.create_time
        self._groups = tuple(replace(group, optimizer=state.optimizers[group.name]) for group in self._groups)
        self._changes.extend(state.changes)
        self._position = replace(state.position, incarnation=self._position.incarnation)
        self._progress = state.progress.copy()
        self._sessions.restore(state.sessions, state.forgotten)
        self.made_durable(state.position.version)

    def made_durable(self, version: int) -> None:
        """Say so in every answer from now on."""
        with self._lock:
            durable = max(version, self._position.durable_version)
            self._position = replace(self._position, durable_version=durable)
            self._views.forget()

    def drain(self) -> None:
        """Let nobody wait for other workers any more: those who do are told to try again once the server is back."""
        with self._lock:
            self._rounds.drain()
            self._decided.notify_all()

    def delete(self) -> None:
        """Refuse everything from now on, and let go of the memory."""
        with self._lock:
            self._deleted = True
            self._rounds.give_up(self._not_found())
            self._decided.notify_all()
            self._views.forget()
            self._buffers.clear()
            self._pipeline.clear()
            for arena in self._slots.values():
                arena.clear()

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
        gradient = {GRADIENT: mean.arena} if mean is not None and self.spec.transforms.accumulate > 1 else {}
        return parameters | gradient | self._slots

    def _memory(self, after: Buffer) -> Arenas:
        """What an update acts on that writes a buffer."""
        mean = self._pipeline.mean
        return Arenas(self._buffers.current.arena, after.arena, self._slots, mean.arena if mean is not None else {})

    def _check_alive(self) -> None:
        if self._deleted:
            raise self._not_found()
        if self._broken:
            raise ServerError(
                f"parameter set {self.spec.id!r} is unusable: an update failed half way; restart the server to restore it"
            )

    def _not_found(self) -> ParameterSetNotFound:
        return ParameterSetNotFound(f"parameter set {self.spec.id!r} was deleted")

    def _next_commits(self) -> list[Commit]:
        """Those that wait; or one, if they can't share a pass: updates that a set of moments returns must be read before
        the next, there is memory for one mean, and one at a time lets tables grow."""
        alone = self.spec.holds is Holds.MOMENTS or self._pipeline.mean is not None or self._pipeline.tables
        most = 1 if alone else len(self._commits)
        return [self._commits.popleft() for _ in range(most)]

    def _apply(self, commits: Sequence[Commit]) -> None:
        """Decide on commits in their order, run all of their updates in one pass, and take their snapshots."""
        draft = Draft(self._groups, self._position, self._progress.copy())
        decided: list[tuple[Commit, Receipt]] = []
        for commit in commits:
            together = [commit]
            try:
                self._check_alive()
                commit.session.check_stream(commit.stream)
                commit.receipt = commit.session.admit(commit.push.sequence, commit.push.digest)
                if commit.receipt is None:
                    together = self._rounds.join(commit)
                    receipts = self._decide([each.push for each in together], draft)
                    decided += zip(together, receipts, strict=True)
            except Exception as error:
                for each in together:
                    each.fail(error)
        try:
            if draft.updates or draft.progress.skipped != self._progress.skipped:
                self._run(draft, [commit.held for commit, receipt in decided if receipt.applied and commit.held])
        except Exception as error:
            for commit, _ in decided:
                commit.fail(error)
            return
        for commit, receipt in decided:
            commit.session.record(receipt.sequence, commit.push.digest, receipt)
            self._sessions.touch(commit.session)
            commit.receipt = receipt
        for commit in {*commits, *(commit for commit, _ in decided)}:
            if commit.pull and commit.receipt is not None:
                try:
                    commit.snapshot = self._after(commit.receipt, commit.dtype)
                except Exception as error:  # what was applied stays applied
                    commit.fail(error)

    def _after(self, receipt: Receipt, dtype: DType | None) -> Snapshot | None:
        """What is pulled with a push."""
        moments_only = self.spec.holds is Holds.MOMENTS
        if not receipt.applied:
            return Snapshot(self._position, (), (), ()) if moments_only else None
        pinned = self._views.pin(self._position) if dtype is None else None
        return self._views.copy(self._position, dtype) if pinned is None and moments_only else pinned

    def _decide(self, pushes: Sequence[Push], draft: Draft) -> list[Receipt]:
        """Receipts of pushes that come together after those in the draft; if they are applied, the draft goes on with them."""
        if not pushes:
            return []
        stalenesses = [_staleness(push.base, draft.position) for push in pushes]
        outcome, refusal = self._advance(draft, pushes)
        return [
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

    def _advance(self, draft: Draft, pushes: Sequence[Push]) -> tuple[Outcome, Refusal | None]:
        """Let the draft go on with pushes that belong together, unless there is something wrong with that."""
        for push in pushes:
            if push.refusal is not None:
                return self._pass_over(draft, push), push.refusal
        try:
            changes = merged_changes(pushes)
            check_pushed(draft.groups, changes)
            groups = change(draft.groups, changes)
            evaluated = at(groups, draft.position.version)
            planned = self._pipeline.plan(evaluated, draft.progress, pushes, draft.updated)
        except InvalidArgument as error:
            return Outcome.REFUSED, Refusal.of(error)
        if not planned.memories:
            draft.accumulate(groups, planned, pushes[0].gradients)
            return Outcome.ACCUMULATED, None
        draft.advance(groups, evaluated, planned)
        return Outcome.APPLIED, None

    def _pass_over(self, draft: Draft, push: Push) -> Outcome:
        """What becomes of a push that can't be applied."""
        nonfinite = self.spec.transforms.nonfinite
        if not push.skippable or not isinstance(nonfinite, SkipNonFinite):
            return Outcome.REFUSED
        if nonfinite.at_most is not None and draft.progress.skipped >= nonfinite.at_most:
            return Outcome.REFUSED
        draft.progress.skipped += 1
        return Outcome.SKIPPED

    def _run(self, draft: Draft, held: Sequence[Snapshot]) -> None:
        """Become what the draft says; if that fails half way, nothing is ever read from this set again."""
        buffers = [each.buffer for each in held if each.buffer is not None]
        for buffer in buffers:
            self._buffers.unpin(buffer)
        try:
            after = self._buffers.writable() if draft.updated else self._buffers.current
        except (MemoryError, OSError):
            for buffer in buffers:
                self._buffers.pin_again(buffer)
            raise ServerBusy("there is no memory for another version of the parameters; try again later") from None
        for each in held:
            each.buffer = None
        self._broken = True
        update.run(draft.updates, self._memory(after), self._threads)
        if draft.updated:
            self._buffers.publish(after, draft.updated, draft.position.version)
            self._views.forget()
            if self.spec.holds is Holds.MOMENTS:
                self._views.present = tuple(sorted(draft.updated))
        self._groups, self._position, self._progress = draft.groups, draft.position, draft.progress
        self._changes.extend(draft.changes)
        self._broken = False


def _staleness(base: Position | None, now: Position) -> int | None:
    if base is None or base.incarnation != now.incarnation:
        return None
    return max(0, now.version - base.version)
