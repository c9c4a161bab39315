"""A parameter set: tensors, optimizer state, sessions, and the update that changes them together."""

import datetime
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from optserve._dtypes import DType
from optserve._errors import InvalidArgument, ParameterSetNotFound, TensorMismatch
from optserve._results import Description, GroupDescription, Position, Receipt
from optserve._specification import Holds, ParameterSetSpec
from optserve_server.engine import snapshot
from optserve_server.engine.arena import Arena, ComputeType, Layout, copy
from optserve_server.engine.groups import TensorGroup, change, resolve
from optserve_server.engine.loops import UPDATE_COLUMNS, decode_loop, update_loop
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.rules import Memory, preparation, rule_for
from optserve_server.engine.sessions import Session, Sessions
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.staging import Piece, StagedTensor, Staging
from optserve_server.engine.state import State
from optserve_server.engine.threads import Threads

PARAMETERS = "parameters"  # name of that arena beside those of the slots

Ranges = dict[tuple[ComputeType, DType], list[list[int]]]


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
        self._snapshot: Snapshot | None = None
        # In a set that holds moments only, this arena takes the updates of the last push instead.
        self._parameters = self.layout.allocate()
        self._present = tuple(range(len(spec.tensors))) if spec.holds is Holds.PARAMETERS else ()
        initial = self.rule.initial(spec.optimizer)
        self._slots = {slot: self.layout.allocate(initial.get(slot, 0.0)) for slot in self.rule.slots}
        self._steps = np.zeros(len(spec.tensors), np.int64)
        self._memory: list[Memory] = [tuple(self.rule.memory.values())] * len(spec.tensors)
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
                state_bytes=self.layout.nbytes * (1 + len(self._slots)),
                element_count=sum(tensor.size for tensor in self.spec.tensors),
            )

    def load(self, staging: Staging) -> None:
        """Take the initial values of all tensors, before the set is published."""
        tables: Ranges = {}
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
        """Refuse everything from now on."""
        with self._lock:
            self._deleted = True

    def _arenas(self) -> dict[str, Arena]:
        """What outlives a restart."""
        return ({PARAMETERS: self._parameters} if self.spec.holds is Holds.PARAMETERS else {}) | self._slots

    def _check_alive(self) -> None:
        if self._deleted:
            raise ParameterSetNotFound(f"parameter set {self.spec.id!r} was deleted")

    def _apply(self, push: Push) -> Receipt:
        receipt = Receipt(
            sequence=push.sequence,
            position=self._position,
            applied=False,
            staleness=self._staleness(push.base),
            gradient_norm=push.gradient_norm,
        )
        if push.error:
            return replace(receipt, error=push.error)
        try:
            groups = change(self._groups, push.changes)
            self._check_parameters(push, groups)
        except InvalidArgument as error:
            return replace(receipt, error=error)
        self._run(push, groups)
        self._groups = groups
        self._position = replace(self._position, version=self._position.version + 1)
        self._snapshot = None
        return replace(
            receipt,
            position=self._position,
            applied=True,
            learning_rates={group.name: group.optimizer.lr for group in groups},
        )

    def _run(self, push: Push, groups: tuple[TensorGroup, ...]) -> None:
        """Advance the pushed tensors by one update; nothing can fail once the first loop has begun."""
        gradients, parameters = push.gradients, push.parameters
        rows: dict[tuple[int, int, Memory], int] = {}
        scalars: list[tuple[float, ...]] = []
        memories: dict[int, Memory] = {}
        ranges: Ranges = {}
        for number, group in enumerate(groups):
            for index in group.members:
                if index not in gradients:
                    continue
                t = int(self._steps[index]) + 1
                memory = self.rule.remember(group.optimizer, t, self._memory[index])
                row = rows.setdefault((number, t, memory), len(rows))
                if row == len(scalars):
                    scalars.append((*preparation(group.optimizer), *self.rule.scalars(group.optimizer, t, memory)))
                memories[index] = memory
                table = ranges.setdefault((self.layout.places[index].compute, gradients[index].spec.dtype), [])
                table += self._ranges(index, row, gradients[index], parameters.get(index))
        for (compute, dtype), table in ranges.items():
            self._run_loop(compute, dtype, np.array(table, np.int64).reshape(-1, UPDATE_COLUMNS), scalars)
        for index, memory in memories.items():
            self._steps[index] += 1
            self._memory[index] = memory
        if self.spec.holds is Holds.MOMENTS:
            self._present = tuple(gradients)

    def _ranges(self, index: int, row: int, gradient: StagedTensor, parameter: StagedTensor | None) -> list[list[int]]:
        start, size = self.layout.places[index].start, gradient.spec.dtype.itemsize
        if parameter is None:  # any readable memory: what is read there is multiplied by zero, and gradients are finite
            return [[start + piece.offset, piece.size, row, piece.address, piece.address] for piece in gradient.pieces]
        return [
            [start + begin, end - begin, row, left.address + (begin - left.offset) * size,
             right.address + (begin - right.offset) * size]
            for begin, end, left, right in _common(gradient.pieces, parameter.pieces)
        ]  # fmt: skip

    def _run_loop(
        self, compute: ComputeType, dtype: DType, table: np.ndarray[Any, Any], scalars: list[tuple[float, ...]]
    ) -> None:
        loop = update_loop(self.rule, dtype, moments_only=self.spec.holds is Holds.MOMENTS)
        arrays = [self._parameters[compute], *(slot[compute] for slot in self._slots.values())]
        self._threads.run(loop, table, {3: dtype.itemsize, 4: dtype.itemsize}, np.array(scalars, compute), *arrays)

    def _compile(self) -> None:
        """Compile the set's loops now rather than at its first push, by running them on nothing."""
        width = len(preparation(self.spec.optimizer)) + 16  # at least as many scalars as any rule has
        for dtype in {tensor.dtype for tensor in self.spec.tensors}:
            nothing = np.empty((0, UPDATE_COLUMNS), np.int64)
            self._run_loop(dtype.compute, dtype, nothing, [(0.0,) * width])

    def _check_parameters(self, push: Push, groups: tuple[TensorGroup, ...]) -> None:
        """In a set that holds moments only, weight decay needs the caller's parameters."""
        if self.spec.holds is Holds.PARAMETERS:
            return
        for group in groups:
            if group.optimizer.hyperparameters["weight_decay"] == 0.0:
                continue
            for index in group.members:
                if index in push.gradients and index not in push.parameters:
                    raise TensorMismatch(
                        f"set {self.spec.id!r} holds moments only and weight decay reads the parameters: expected those of "
                        f"{self.spec.tensors[index].name!r} beside its gradient; got none. Push parameters=..., or set "
                        "weight_decay=0"
                    )

    def _staleness(self, base: Position | None) -> int | None:
        if base is None or base.incarnation != self._position.incarnation:
            return None
        return max(0, self._position.version - base.version)


def _common(left: list[Piece], right: list[Piece]) -> list[tuple[int, int, Piece, Piece]]:
    """The runs on which two coverings of one tensor both have a single piece: begin, end, and the two."""
    runs = []
    i = j = 0
    while i < len(left) and j < len(right):
        left_end, right_end = left[i].offset + left[i].size, right[j].offset + right[j].size
        runs.append((max(left[i].offset, right[j].offset), min(left_end, right_end), left[i], right[j]))
        i, j = i + (left_end <= right_end), j + (right_end <= left_end)
    return runs
