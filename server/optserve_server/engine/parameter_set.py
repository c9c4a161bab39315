"""A parameter set: tensors, optimizer state, sessions, and the update that changes them together."""

import datetime
import threading
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import DType, narrowed
from optserve._errors import (
    InvalidArgument,
    InvalidHyperparameter,
    ParameterSetNotFound,
    Refusal,
    ServerBusy,
    ServerError,
    TensorMismatch,
)
from optserve._results import Change, Description, GroupDescription, Position, Receipt, Summary
from optserve._specification import Holds, ParameterSetSpec
from optserve_server.engine import mean, snapshot, update
from optserve_server.engine.arena import Arena, ComputeType, Layout, copy
from optserve_server.engine.buffers import Allocate, Buffers, Memory, private, published_offsets
from optserve_server.engine.commit import Commit
from optserve_server.engine.groups import TensorGroup, at, change, check_pushed, differences, resolve
from optserve_server.engine.loops import decode_loop, encode_loop, guard_loop
from optserve_server.engine.mean import Mean
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.rounds import Rounds, merged_changes
from optserve_server.engine.rules import Memory as RuleMemory
from optserve_server.engine.rules import rule_for
from optserve_server.engine.sessions import Session, Sessions
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.staging import Staging
from optserve_server.engine.state import State
from optserve_server.engine.threads import Threads
from optserve_server.engine.update import Planner, Read, Update

PARAMETERS = "parameters"  # name of that arena beside those of the slots
CHANGES_KEPT = 1000


@dataclass(slots=True)
class Draft:
    """What a set will be once the updates that are planned so far have run."""

    groups: tuple[TensorGroup, ...]
    position: Position
    steps: NDArray[np.int64]
    memory: list[RuleMemory]
    updates: list[Update] = field(default_factory=list)
    means: list[mean.Part] = field(default_factory=list)
    updated: set[int] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)  # of the last update, by group

    def advance(self, groups: tuple[TensorGroup, ...], evaluated: tuple[TensorGroup, ...], planned: Update) -> None:
        """Add an update, by groups whose schedules are evaluated."""
        self.changes += differences(self.groups, groups, self.position.version)
        self.learning_rates = {group.name: group.optimizer.lr for group in evaluated}
        self.groups = groups
        self.position = self.position.next()
        self.updates.append(planned)
        for index, memory in planned.memories.items():
            self.steps[index] += 1
            self.memory[index] = memory
            self.updated.add(index)


class ParameterSet:
    """One set. Every method may be called from any thread; each takes effect whole or not at all."""

    def __init__(
        self, spec: ParameterSetSpec, incarnation: int, threads: Threads, allocate: Allocate = private
    ) -> None:
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.indices = {tensor.name: index for index, tensor in enumerate(spec.tensors)}
        self.rule = rule_for(spec.optimizer)
        self.create_time = datetime.datetime.now(datetime.UTC)
        self._groups = resolve(spec)
        self._first_groups = at(
            self._groups, 0
        )  # raises for a schedule that begins out of range; loops are compiled with them
        self._changes: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self._position = Position(incarnation, 0)
        self._sessions = Sessions()
        self._threads = threads
        self._lock = threading.Lock()
        self._decided = threading.Condition(self._lock)
        self._deleted = False
        self._broken = False
        self._commits: deque[Commit] = deque()
        self._rounds = Rounds(spec.policy)
        self._copies: WeakValueDictionary[DType | None, Snapshot] = WeakValueDictionary()  # of the current version
        # In a set that holds moments only, these take the updates of the last push instead.
        self._buffers = Buffers(spec.tensors, self.layout, allocate)
        self._present = tuple(range(len(spec.tensors))) if spec.holds is Holds.PARAMETERS else ()
        initial = self.rule.initial(spec.optimizer)
        self._slots = {slot: self.layout.allocate(initial.get(slot, 0.0)) for slot in self.rule.slots}
        self._steps = np.zeros(len(spec.tensors), np.int64)
        self._memory: list[RuleMemory] = [tuple(self.rule.memory.values())] * len(spec.tensors)
        self._planner = Planner(self.rule, self.layout, moments_only=spec.holds is Holds.MOMENTS)
        self._mean = Mean(spec.tensors, self.layout) if self._rounds.workers > 1 else None
        self._compiled: set[Read] = set()
        for dtype in {tensor.dtype for tensor in spec.tensors}:
            self._compile((dtype, dtype if spec.holds is Holds.MOMENTS else None))
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
                state_bytes=self._state_bytes,
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
            state_bytes=self._state_bytes,
            create_time=self.create_time,
        )

    def load(self, staging: Staging) -> None:
        """Take the initial values of all tensors, before the set is published."""
        tables: dict[tuple[ComputeType, DType], list[list[int]]] = {}
        for place, tensor in zip(self.layout.places, staging.tensors, strict=True):
            table = tables.setdefault((place.compute, tensor.spec.dtype), [])
            itemsize = tensor.spec.dtype.itemsize
            table += [
                [place.start + piece.offset, piece.size, piece.address + piece.skip * itemsize]
                for piece in tensor.pieces
            ]
        for (compute, dtype), table in tables.items():
            if table:
                rows = np.array(table, np.int64)
                self._threads.run(decode_loop(dtype), rows, {2: dtype.itemsize}, self._buffers.current.arena[compute])

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
    ) -> Push:
        """A push of this set, to be filled, finished and given to `push`."""
        push = Push(self.spec, self.indices, self._threads, sequence, declared, base=base, changes=changes)
        for read in self._reads(push) - self._compiled:  # what gradients travel as is not known before
            self._compile(read)
        return push

    def push(
        self, session: Session, stream: object, push: Push, *, pull: bool, held: Snapshot | None = None
    ) -> tuple[Receipt, Snapshot | None]:
        """Apply a finished push, or refuse it; either consumes its sequence and is its receipt for ever.

        With `pull`, also the tensors after it, pinned, if they can be (of a push that came again: the current ones; of a
        refused one: None). If it is applied, `held`, which the worker has read until now, is released before. Pushes that
        wait here at the same time are applied in one pass, in the order in which they came; those of a synchronous round wait
        for each other. Raises SequenceGap, SequenceReused, SessionSuperseded, ServerBusy (RoundIncomplete is one),
        ServerDraining or ParameterSetNotFound, which consume nothing.
        """
        commit = Commit(session, stream, push, pull, held)
        self._commits.append(commit)
        with self._lock:
            while not commit.done:
                if self._commits:
                    self._apply(self._next_commits())
                else:
                    self._decided.wait(self._rounds.remaining)
                    self._rounds.expire()
                self._decided.notify_all()
        if commit.error is not None:
            try:
                raise commit.error
            finally:
                del commit  # which its own error would keep alive
        assert commit.receipt is not None
        return commit.receipt, commit.snapshot

    def snapshot(self, *, pinned: bool = True, dtype: DType | None = None) -> Snapshot | None:
        """The tensors of the current version: parameters, or the updates of the last push.

        If `pinned`, they are the set's own memory, to be released; None if too many versions are being read. Otherwise they
        are a copy, which all who ask for it share, in elements of a smaller dtype if one is given.
        """
        with self._lock:
            self._check_alive()
            return self._pin() if pinned and dtype is None else self._copy(dtype)

    def release(self, snapshot: Snapshot) -> None:
        """Say that a snapshot is not read any more; again does nothing."""
        if snapshot.buffer is not None:
            self._buffers.unpin(snapshot.buffer)
            snapshot.buffer = None

    def snapshot_nbytes(self, dtype: DType | None) -> int:
        """Size of a copy."""
        return sum(tensor.size * narrowed(tensor.dtype, dtype).itemsize for tensor in self.spec.tensors)

    def _pin(self) -> Snapshot | None:
        buffer = self._buffers.pin()
        if buffer is None:
            return None
        tensors = self.spec.tensors
        dtypes = [tensor.dtype for tensor in tensors]
        if not buffer.encoded:
            halves = [index for index, dtype in enumerate(dtypes) if dtype.is_half]
            snapshot.encode(tensors, halves, self.layout, buffer.arena, buffer.data, dtypes, self._threads)
            buffer.encoded = True
        return Snapshot(self._position, self._present, dtypes, buffer.data, buffer)

    def _copy(self, dtype: DType | None) -> Snapshot:
        copied = self._copies.get(dtype)
        if copied is None:
            tensors, arena = self.spec.tensors, self._buffers.current.arena
            dtypes = [narrowed(tensor.dtype, dtype) for tensor in tensors]
            data = snapshot.room(tensors, dtypes)
            snapshot.encode(tensors, self._present, self.layout, arena, data, dtypes, self._threads)
            copied = self._copies[dtype] = Snapshot(self._position, self._present, dtypes, data)
        return copied

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
                arenas={name: copy(arena) for name, arena in self._arenas().items()},
                steps=self._steps.copy(),
                memory=list(self._memory),
                sessions=self._sessions.copy(),
            )

    def restore(self, state: State) -> None:
        """Become what was captured, in this set's own incarnation, before it is published."""
        for name, arena in self._arenas().items():
            for compute, array in arena.items():
                np.copyto(array, state.arenas[name][compute])
        self.create_time = state.create_time
        self._groups = tuple(replace(group, optimizer=state.optimizers[group.name]) for group in self._groups)
        self._changes.extend(state.changes)
        self._position = replace(state.position, incarnation=self._position.incarnation)
        self._steps = state.steps.copy()
        self._memory = list(state.memory)
        self._sessions.restore(state.sessions)
        self.made_durable(state.position.version)

    def made_durable(self, version: int) -> None:
        """Say so in every answer from now on."""
        with self._lock:
            durable = max(version, self._position.durable_version)
            self._position = replace(self._position, durable_version=durable)
            self._copies.clear()

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
            self._copies.clear()
            self._buffers.clear()
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
    def _state_bytes(self) -> int:
        return self.layout.nbytes * len(self._arenas())

    @property
    def _element_count(self) -> int:
        return sum(tensor.size for tensor in self.spec.tensors)

    def _arenas(self) -> dict[str, Arena]:
        """What outlives a restart."""
        return ({PARAMETERS: self._buffers.current.arena} if self.spec.holds is Holds.PARAMETERS else {}) | self._slots

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
        the next, and there is memory for the mean of one round."""
        most = len(self._commits) if self.spec.holds is Holds.PARAMETERS and self._mean is None else 1
        return [self._commits.popleft() for _ in range(most)]

    def _apply(self, commits: Sequence[Commit]) -> None:
        """Decide on commits in their order, run all of their updates in one pass, and take their snapshots."""
        draft = Draft(self._groups, self._position, self._steps.copy(), list(self._memory))
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
            if draft.updates:
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
            if commit.pull and commit.receipt is not None and commit.receipt.applied:
                commit.snapshot = self._pin() or (self._copy(None) if self.spec.holds is Holds.MOMENTS else None)

    def _decide(self, pushes: Sequence[Push], draft: Draft) -> list[Receipt]:
        """Receipts of pushes that come together after those in the draft; if they are applied, the draft goes on with them."""
        if not pushes:
            return []
        stalenesses = [_staleness(push.base, draft.position) for push in pushes]
        refusal = pushes[0].refusal or self._advance(draft, pushes)
        return [
            Receipt(
                sequence=push.sequence,
                position=draft.position,
                applied=refusal is None,
                staleness=staleness,
                gradient_norm=push.gradient_norm,
                learning_rates={} if refusal else draft.learning_rates,
                refusal=refusal,
            )
            for push, staleness in zip(pushes, stalenesses, strict=True)
        ]

    def _advance(self, draft: Draft, pushes: Sequence[Push]) -> Refusal | None:
        """Let the draft go on with the mean of pushes, unless there is something wrong with that."""
        gradients: mean.Gradients = pushes[0].gradients
        parameters, means = pushes[0].parameters, list[mean.Part]()
        if self._mean is not None and len(pushes) > 1:
            gradients, means = self._mean.plan([push.gradients for push in pushes])
        try:
            changes = merged_changes(pushes)
            check_pushed(draft.groups, changes)
            groups = change(draft.groups, changes)
            evaluated = at(groups, draft.position.version)
            self._check_parameters(gradients, parameters, evaluated)
            planned = self._planner.plan(evaluated, gradients, parameters, draft.steps, draft.memory, draft.updated)
        except InvalidArgument as error:
            return Refusal.of(error)
        draft.advance(groups, evaluated, planned)
        draft.means += means
        return None

    def _run(self, draft: Draft, held: Sequence[Snapshot]) -> None:
        """Become what the draft says; if that fails half way, nothing is ever read from this set again."""
        for each in held:
            self.release(each)
        try:
            before, after = self._buffers.current, self._buffers.writable()
        except (MemoryError, OSError):
            raise ServerBusy("there is no memory for another version of the parameters; try again later") from None
        self._broken = True
        mean.run(draft.means, self._threads)
        update.run(draft.updates, before.arena, after.arena, list(self._slots.values()), self._threads)
        self._buffers.publish(after, draft.updated, draft.position.version)
        self._groups, self._position, self._steps, self._memory = (
            draft.groups,
            draft.position,
            draft.steps,
            draft.memory,
        )
        self._changes.extend(draft.changes)
        self._copies.clear()
        if self.spec.holds is Holds.MOMENTS:
            self._present = tuple(sorted(draft.updated))
        self._broken = False

    def _reads(self, push: Push) -> set[Read]:
        """What the loops will have to read that apply a push."""
        if push.refusal is not None:
            return set()
        parameters = push.parameters
        return {self._planner.read(each, parameters.get(index)) for index, each in push.gradients.items()}

    def _compile(self, read: Read) -> None:
        """Compile the loops that a push needs now, by running them on nothing, rather than under the lock."""
        arena, slots = self._buffers.current.arena, list(self._slots.values())
        for dtype in filter(None, read):
            guard_loop(dtype)(np.empty((0, 4), np.int64), np.empty(0), np.empty(0, np.uint32))
        self._planner.compile(read, self._first_groups[0], arena, slots)
        if self._mean is not None:
            self._mean.compile(read[0])
            self._planner.compile((mean.dtype_of(read[0]), read[1]), self._first_groups[0], arena, slots)
        self._compiled.add(read)

    def _check_parameters(
        self, gradients: Container[int], parameters: Container[int], groups: tuple[TensorGroup, ...]
    ) -> None:
        """In a set that holds moments only, weight decay needs the caller's parameters."""
        if self.spec.holds is Holds.PARAMETERS:
            return
        for group in groups:
            if group.optimizer.hyperparameters.get("weight_decay", 0.0) == 0.0:
                continue
            for index in group.members:
                if index in gradients and index not in parameters:
                    raise TensorMismatch(
                        f"set {self.spec.id!r} holds moments only and weight decay reads the parameters: expected those of "
                        f"{self.spec.tensors[index].name!r} beside its gradient; got none. Push parameters=..., or set "
                        "weight_decay=0"
                    )


def _staleness(base: Position | None, now: Position) -> int | None:
    if base is None or base.incarnation != now.incarnation:
        return None
    return max(0, now.version - base.version)
