"""One Step stream: messages in, answers out, in the order that `step.proto` lays down."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from optserve._errors import InvalidArgument, InvalidTensor, MessageOrder, ServerBusy, ServerDraining, ServerUnavailable
from optserve._messages import (
    decode_changes,
    decode_position,
    decode_pushed_tensor,
    decode_smaller_dtype,
    encode_position,
    encode_receipt,
    encode_tensors,
)
from optserve._rows import Indices, check_count, decode_rows
from optserve._specification import check_client_id
from optserve._wire import Frame, Payload, bytes_of, pack, spread
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve_server.engine.engine import Engine
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.sessions import Session
from optserve_server.engine.snapshot import Snapshot
from optserve_server.gate import Gate
from optserve_server.shared_memory import Attachment, Segment, SharedMemory
from optserve_server.stalls import Watch

Answers = Iterator[Frame[StepResponse]]


class StepStream:
    """The state of one stream. A push occupies the gate from its first message to its last answer."""

    def __init__(self, engine: Engine, gate: Gate, watch: Watch, shared_memory: SharedMemory | None) -> None:
        self._engine = engine
        self._gate = gate
        self._watch = watch
        self._shared_memory = shared_memory
        self._set: ParameterSet | None = None
        self._session: Session | None = None
        self._attachment: Attachment | None = None
        self._push: Push | None = None
        self._declared: Sequence[Declared] = ()
        self._local = False
        self._lasting = ExitStack()
        self._held: Snapshot | None = None  # what the worker reads in shared memory

    def serve(self, frames: Iterator[Frame[StepRequest]]) -> Answers:
        """Answer frames until they end."""
        with ExitStack() as self._lasting:
            self._lasting.callback(self._forget)
            yield from self._serve(frames, local=False)

    def serve_locally(self, frames: Iterator[Frame[StepRequest]]) -> Answers:
        """Take over: answer frames that come another way, while the stream stays open."""
        self._local = True
        return self._serve(frames, local=True)

    def _serve(self, frames: Iterator[Frame[StepRequest]], *, local: bool) -> Answers:
        with ExitStack() as busy:
            for frame in frames:
                self._watch.rest()
                self._heard()
                if self._local and not local:
                    raise MessageOrder(
                        "expected messages on the local channel only, since it has taken over this stream"
                    )
                message = frame.message
                if message.HasField("open"):
                    yield self._open(message.open)
                if message.HasField("push"):
                    self._begin(message.push, busy)
                if frame.payload is not None:
                    self._add(frame.payload)
                if message.commit:
                    yield from self._commit(message.pull if message.HasField("pull") else None, busy)
                elif message.HasField("pull"):
                    parameter_set, _ = self._opened("pull")
                    if self._push is not None:
                        raise MessageOrder(f"expected `commit` of push {self._push.sequence}; got `pull`")
                    self._await_turn()
                    yield from self._answer(parameter_set, message.pull)
                if message.release:
                    self._let_go()
                if message.HasField("barrier"):
                    yield self._barrier(message.barrier)
                if message.leave:
                    parameter_set, session = self._opened("leave")
                    parameter_set.leave(session, self)
                    yield Frame(StepResponse(left=True))
                self._heard()
                if self._push is not None:
                    self._watch.progress()

    def _open(self, message: step_pb2.Open) -> Frame[StepResponse]:
        if self._set is not None:
            raise MessageOrder("expected `open` once, in a stream's first message; got it again")
        self._set = self._engine.get(message.parameter_set_id)
        client_id = check_client_id(message.client_id)
        self._session = session = self._set.open(client_id, message.epoch, self, joins=message.join)
        last_receipt = self._set.last_receipt(session)
        opened = step_pb2.Opened(
            epoch=session.epoch,
            last_sequence=session.last_sequence,
            last_receipt=encode_receipt(last_receipt) if last_receipt else None,
            position=encode_position(self._set.position),
            tensors=encode_tensors(self._set.spec.tensors),
            durable_sequence=session.durable_sequence,
            rewinds=self._set.rewinds,
            barriers=self._set.barriers,
        )
        if self._set.lease < math.inf:
            opened.lease.FromNanoseconds(round(self._set.lease * 1e9))
        if message.shared_memory and self._shared_memory is not None:
            attached = self._shared_memory.attached(self._set, self.serve_locally)
            self._attachment = self._lasting.enter_context(attached)
            opened.shared_memory.CopyFrom(self._attachment.offer)
        return Frame(StepResponse(opened=opened))

    def _begin(self, message: step_pb2.Push, busy: ExitStack) -> None:
        """Begin a push, and occupy the gate with the bytes that it will hold; or begin it anew, or amend it."""
        parameter_set, _ = self._opened("push")
        said: dict[str, Any] = {
            "base": decode_position(message.base) if message.HasField("base") else None,
            "changes": decode_changes(message.hyperparameters),
            "loss_scale": message.loss_scale or 1.0,
            "samples": message.samples or 1.0,
        }
        if self._push is not None:
            if message.sequence != self._push.sequence:
                raise MessageOrder(f"expected `commit` of push {self._push.sequence}; got `push` {message.sequence}")
            if not message.tensors:
                self._push.say(**said)
                return
            self._push = None
            busy.close()
        if message.tensors:
            self._declared = [Declared(*decode_pushed_tensor(each)) for each in message.tensors]
            check_count(each.rows for each in self._declared if each.rows is not None)
        push = parameter_set.begin(message.sequence, self._declared, **said)
        busy.enter_context(self._gate.room(push.nbytes))
        self._push = push

    def _add(self, payload: Payload) -> None:
        push = self._pushing("chunk")
        if not payload.in_shared_memory:
            push.add(payload.runs, payload.buffer, replace=payload.replace)
        elif self._attachment is None or self._attachment.gradients is None:
            raise MessageOrder("expected chunks with their elements: this stream shares no memory with the server")
        else:
            memory = self._attachment.gradients.array
            push.add_shared(payload.runs, memory, self._attachment.offsets, replace=payload.replace)

    def _commit(self, pull: step_pb2.Pull | None, busy: ExitStack) -> Answers:
        parameter_set, session = self._opened("commit")
        push = self._pushing("commit")
        push.finish(pull.tensors if pull is not None else ())
        if pull is not None:
            try:
                _rows(parameter_set, pull)
            except InvalidArgument as error:
                push.refuse(error)
        together = pull is not None and not (pull.evaluation or pull.rows) and not parameter_set.takes_turns
        dtype = decode_smaller_dtype(pull.dtype) if pull is not None else None
        push.released = busy.close
        self._await_turn()
        receipt, snapshot = parameter_set.push(session, self, push, pull=together, dtype=dtype, held=self._held)
        self._push = push = None  # type: ignore[assignment]  # let go of the received messages
        busy.close()
        if pull is not None and not receipt.refused:
            self._await_turn()
        if pull is None or receipt.refused:
            yield Frame(StepResponse(receipt=encode_receipt(receipt)))
        else:
            yield from self._answer(parameter_set, pull, encode_receipt(receipt), snapshot)

    def _answer(
        self,
        parameter_set: ParameterSet,
        pull: step_pb2.Pull,
        receipt: step_pb2.Receipt | None = None,
        snapshot: Snapshot | None = None,
    ) -> Answers:
        """Answer a pull; the receipt, if any, rides with the first message, and `end` with the last."""
        frame = Frame(StepResponse())
        if receipt is not None:
            frame.message.receipt.CopyFrom(receipt)
        with ExitStack() as reading:
            if snapshot is not None:
                reading.callback(parameter_set.release, snapshot)
            if pull.HasField("newer_than") and not (position := parameter_set.position).newer_than(
                decode_position(pull.newer_than)
            ):
                frame.message.parameters.position.CopyFrom(encode_position(position))
                frame.message.parameters.unchanged = frame.message.end = True
                yield frame
                return
            if snapshot is None:
                snapshot = self._snapshot(parameter_set, pull, reading)
                reading.callback(parameter_set.release, snapshot)
            frame.message.parameters.position.CopyFrom(encode_position(snapshot.position))
            # In a set of moments there is nothing after a push without an update. A snapshot of rows has nothing else.
            nothing, chosen = receipt is not None and not snapshot.tensors, () if pull.rows else pull.tensors
            indices = () if nothing else snapshot.select(parameter_set.spec, parameter_set.indices, chosen)
            frame.message.parameters.tensors.extend(indices)
            segment = snapshot.buffer.memory.segment if snapshot.buffer is not None else None
            if pull.in_shared_memory and self._attachment is not None and isinstance(segment, Segment):
                frame.message.parameters.segment = segment.number
                self._let_go()
                self._held = snapshot
                reading.pop_all()
            else:
                tensors = [
                    (k, snapshot.data[index].data, snapshot.dtypes[index].itemsize) for k, index in enumerate(indices)
                ]
                for place, index in enumerate(indices):
                    if index in snapshot.keys:
                        keys = snapshot.keys[index]
                        frame.message.parameters.tables.add(tensor=place, count=len(keys))
                        tensors.append((len(tensors), bytes_of(keys), keys.itemsize))
                frame = yield from spread(frame, self._taken(pack(tensors)))
            frame.message.end = True
            yield frame

    def _snapshot(self, parameter_set: ParameterSet, pull: step_pb2.Pull, reading: ExitStack) -> Snapshot:
        """What the set has now; a copy of it is counted as bytes in flight as long as it is read."""
        dtype, rows = decode_smaller_dtype(pull.dtype), _rows(parameter_set, pull)
        if rows:
            whole = [parameter_set.indices[name] for name in pull.tensors]
            self._enter(reading, parameter_set.rows_nbytes(whole, rows, dtype))
            return parameter_set.rows(whole, rows, dtype, evaluation=pull.evaluation)
        reader = self._session
        snapshot = parameter_set.snapshot(reader=reader) if dtype is None and not pull.evaluation else None
        if snapshot is not None:
            return snapshot
        self._enter(reading, parameter_set.snapshot_nbytes(dtype))
        copied = parameter_set.snapshot(pinned=False, dtype=dtype, evaluation=pull.evaluation, reader=reader)
        assert copied is not None
        return copied

    def _enter(self, reading: ExitStack, nbytes: int) -> None:
        """Occupy the gate as long as something is read."""
        try:
            reading.enter_context(self._gate.room(nbytes))
        except (ServerBusy, ServerDraining) as error:  # but this must not read as if nothing had been taken in
            raise ServerUnavailable(f"no room for another copy of the parameters: {error}") from None

    def _barrier(self, known: int) -> Frame[StepResponse]:
        parameter_set, session = self._opened("barrier")
        return Frame(StepResponse(barriers=parameter_set.barrier(session, self, known)))

    def _await_turn(self) -> None:
        """Wait for slower workers, as the policy has it."""
        parameter_set, session = self._opened("pull")
        parameter_set.await_turn(session, self)

    def _heard(self) -> None:
        """Take note of the worker's being alive."""
        if self._session is not None:
            self._session.heard(self, waits=False)

    def _taken(self, payloads: Iterable[Payload]) -> Iterator[Payload]:
        """Payloads: that the next one is asked for says that the worker takes them."""
        for payload in payloads:
            self._heard()
            yield payload

    def _let_go(self) -> None:
        """What the worker held in shared memory may change."""
        if self._set is not None and self._held is not None:
            self._set.release(self._held)
            self._held = None

    def _forget(self) -> None:
        """Let go of everything: the session remembers its last stream for long."""
        self._let_go()
        self._push = self._attachment = None
        if self._set is not None and self._session is not None:
            self._set.disconnected(self._session, self)

    def _opened(self, what: str) -> tuple[ParameterSet, Session]:
        if self._set is None or self._session is None:
            raise MessageOrder(f"expected `open` in a stream's first message; got `{what}`")
        return self._set, self._session

    def _pushing(self, what: str) -> Push:
        if self._push is None:
            raise MessageOrder(f"expected `push` first; got `{what}`")
        return self._push


def _rows(parameter_set: ParameterSet, pull: step_pb2.Pull) -> dict[int, Indices]:
    """The rows that a pull asks for, by the tensor's index; raises InvalidArgument kinds for what can't be had."""
    rows = {each.tensor: decode_rows(each.rows) for each in pull.rows}
    if len(rows) < len(pull.rows):
        raise InvalidTensor(f"expected the rows of each tensor once in a pull; {len(pull.rows)} came of {len(rows)}")
    check_count(rows.values())
    return dict(parameter_set.check_pull(pull.tensors, rows, evaluation=pull.evaluation))
