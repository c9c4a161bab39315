"""A parameter set: tensors, optimizer state, sessions, and the update that changes them together."""

import datetime
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from optserve._dtypes import DType
from optserve._errors import InvalidArgument, ParameterSetNotFound, Refusal, ServerError, TensorMismatch
from optserve._results import Description, GroupDescription, Position, Receipt, Summary
from optserve._specification import Holds, ParameterSetSpec
from optserve_server.engine import snapshot
from optserve_server.engine.arena import Arena, ComputeType, Layout, copy
from optserve_server.engine.groups import TensorGroup, change, resolve
from optserve_server.engine.loops import decode_loop, encode_loop, guard_loop
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.rules import Memory, rule_for
from optserve_server.engine.sessions import Session, Sessions
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.staging import Staging
from optserve_server.engine.state import State
from optserve_server.engine.threads import Threads
from optserve_server.engine.update import Planner, Update

PARAMETERS = "parameters"  # name of that arena beside those of the slots


class ParameterSet:
    """One set. Every method may be called from any thread; each takes effect whole or not at all."""

    def __init__(self, spec: ParameterSetSpec, incarnation: int, threads: Threads) -> None:
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.indices = {tensor.name: index for index, tensor in enumerate(spec.tensors)}
        self.rule = rule_for(spec.optimizer)
        self.create_time = datetime.datetime.now(datetime.UTC)
        self._groups = resolve(spec)
        self._position = Position(incarnation, 0)
        self._sessions = Sessions()
        self._threads = threads
        self._lock = threading.Lock()
        self._deleted = False
        self._broken = False
        self._snapshot: Snapshot | None = None
        # In a set that holds moments only, this arena takes the updates of the last push instead.
        self._parameters = self.layout.allocate()
        self._present = tuple(range(len(spec.tensors))) if spec.holds is Holds.PARAMETERS else ()
        initial = self.rule.initial(spec.optimizer)
        self._slots = {slot: self.layout.allocate(initial.get(slot, 0.0)) for slot in self.rule.slots}
        self._steps = np.zeros(len(spec.tensors), np.int64)
        self._memory: list[Memory] = [tuple(self.rule.memory.values())] * len(spec.tensors)
        moments_only = spec.holds is Holds.MOMENTS
        self._planner = Planner(
            self.rule, self.layout, self._parameters, list(self._slots.values()), moments_only=moments_only
        )
        self._compile()

    @property
    def position(self) -> Position:
        """Where the set's history stands."""
        return self._position

    def describe(self) -> Description:
        """The set as it is now."""
        with self._lock:
            return Description(
                spec=self.spec,
                position=self._position,
                groups=tuple(
                    GroupDescription(
                        group.name, tuple(self.spec.tensors[k].name for k in group.members), group.optimizer
                    )
                    for group in self._groups
                ),
                create_time=self.create_time,
                state_bytes=self._state_bytes,
                element_count=self._element_count,
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
            table += [[place.start + piece.offset, piece.size, piece.address] for piece in tensor.pieces]
        for (compute, dtype), table in tables.items():
            if table:
                rows = np.array(table, np.int64)
                self._threads.run(decode_loop(dtype), rows, {2: dtype.itemsize}, self._parameters[compute])

    def update(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Change hyperparameters by group and name; raises InvalidGroup or InvalidHyperparameter."""
        with self._lock:
            self._check_alive()
            self._groups = change(self._groups, changes)

    def open(self, client_id: str, epoch: int, stream: object) -> Session:
        """Open or resume a client's session; a push of its older stream that has begun is finished first."""
        with self._lock:
            self._check_alive()
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
        return Push(self.spec, self.indices, self._threads, sequence, declared, base=base, changes=changes)

    def push(self, session: Session, stream: object, push: Push, *, pull: bool) -> tuple[Receipt, Snapshot | None]:
        """Apply a finished push, or refuse it; either consumes its sequence and is its receipt for ever.

        With `pull`, also the tensors right after it (of a push that came again: the current ones; of a refused one: None).
        Raises SequenceGap, SequenceReused, SessionSuperseded or ParameterSetNotFound, which consume nothing.
        """
        with self._lock:
            self._check_alive()
            session.check_stream(stream)
            receipt = session.admit(push.sequence, push.digest)
            if receipt is None:
                receipt = self._apply(push)
                session.record(push.sequence, push.digest, receipt)
                self._sessions.touch(session)
            return receipt, self._take_snapshot() if pull and receipt.applied else None

    def snapshot(self) -> Snapshot:
        """The tensors of the current version: parameters, or the updates of the last push."""
        with self._lock:
            self._check_alive()
            return self._take_snapshot()

    def _take_snapshot(self) -> Snapshot:
        if self._snapshot is None:
            self._snapshot = snapshot.take(
                self._position, self.spec.tensors, self._present, self.layout, self._parameters, self._threads
            )
        return self._snapshot

    def capture(self) -> State:
        """A copy of all that the set is; updates wait until it is taken."""
        with self._lock:
            self._check_alive()
            return State(
                spec=self.spec,
                position=self._position,
                create_time=self.create_time,
                optimizers={group.name: group.optimizer for group in self._groups},
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
            self._snapshot = None

    def delete(self) -> None:
        """Refuse everything from now on, and let go of the memory."""
        with self._lock:
            self._deleted = True
            self._snapshot = None
            for arena in (self._parameters, *self._slots.values()):
                arena.clear()

    @property
    def _state_bytes(self) -> int:
        return self.layout.nbytes * len(self._arenas())

    @property
    def _element_count(self) -> int:
        return sum(tensor.size for tensor in self.spec.tensors)

    def _arenas(self) -> dict[str, Arena]:
        """What outlives a restart."""
        return ({PARAMETERS: self._parameters} if self.spec.holds is Holds.PARAMETERS else {}) | self._slots

    def _check_alive(self) -> None:
        if self._deleted:
            raise ParameterSetNotFound(f"parameter set {self.spec.id!r} was deleted")
        if self._broken:
            raise ServerError(
                f"parameter set {self.spec.id!r} is unusable: an update failed half way; restart the server to restore it"
            )

    def _apply(self, push: Push) -> Receipt:
        receipt = Receipt(
            sequence=push.sequence,
            position=self._position,
            applied=False,
            staleness=self._staleness(push.base),
            gradient_norm=push.gradient_norm,
        )
        if push.refusal:
            return replace(receipt, refusal=push.refusal)
        try:
            groups = change(self._groups, push.changes)
            gradients, parameters = push.gradients, push.parameters
            self._check_parameters(gradients, parameters, groups)
            update = self._planner.plan(groups, gradients, parameters, self._steps, self._memory)
        except InvalidArgument as error:
            return replace(receipt, refusal=Refusal.of(error))
        self._run(update)
        self._groups = groups
        self._position = replace(self._position, version=self._position.version + 1)
        self._snapshot = None
        if self.spec.holds is Holds.MOMENTS:
            self._present = tuple(gradients)
        return replace(
            receipt,
            position=self._position,
            applied=True,
            learning_rates={group.name: group.optimizer.lr for group in groups},
        )

    def _run(self, update: Update) -> None:
        """Run an update; if that fails half way, nothing is ever read from this set again."""
        self._broken = True
        for work in update.work:
            work.run(self._threads)
        for index, memory in update.memories.items():
            self._steps[index] += 1
            self._memory[index] = memory
        self._broken = False

    def _compile(self) -> None:
        """Compile every loop that this set will need now, by running it on nothing, rather than while somebody waits."""
        dtypes = {tensor.dtype for tensor in self.spec.tensors}
        self._planner.compile(dtypes, self._groups[0])
        nothing = np.empty((0, 3), np.int64)
        for dtype in dtypes:
            guard_loop(dtype)(nothing, np.empty(0), np.empty((0, 2), np.uint32))
            encode_loop(dtype)(nothing, self._parameters[dtype.compute])

    def _check_parameters(
        self, gradients: Container[int], parameters: Container[int], groups: tuple[TensorGroup, ...]
    ) -> None:
        """In a set that holds moments only, weight decay needs the caller's parameters."""
        if self.spec.holds is Holds.PARAMETERS:
            return
        for group in groups:
            if group.optimizer.hyperparameters["weight_decay"] == 0.0:
                continue
            for index in group.members:
                if index in gradients and index not in parameters:
                    raise TensorMismatch(
                        f"set {self.spec.id!r} holds moments only and weight decay reads the parameters: expected those of "
                        f"{self.spec.tensors[index].name!r} beside its gradient; got none. Push parameters=..., or set "
                        "weight_decay=0"
                    )

    def _staleness(self, base: Position | None) -> int | None:
        if base is None or base.incarnation != self._position.incarnation:
            return None
        return max(0, self._position.version - base.version)
