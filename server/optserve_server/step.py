"""One Step stream: messages in, answers out, in the order that `step.proto` lays down."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from optserve._errors import InvalidArgument, MessageOrder
from optserve._messages import (
    decode_changes,
    decode_position,
    decode_tensor,
    encode_position,
    encode_receipt,
    encode_tensors,
)
from optserve._results import Receipt
from optserve._specification import check_client_id
from optserve._wire import Frame, pack
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve_server.engine.engine import Engine
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.sessions import Session
from optserve_server.engine.snapshot import Snapshot
from optserve_server.gate import Gate

Answers = Iterator[Frame[StepResponse]]


class StepStream:
    """The state of one stream. A push occupies the gate from its first message to its last answer."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate
        self._set: ParameterSet | None = None
        self._session: Session | None = None
        self._push: Push | None = None
        self._declared: Sequence[Declared] = ()

    def serve(self, frames: Iterator[Frame[StepRequest]]) -> Answers:
        """Answer frames until they end."""
        with ExitStack() as busy:
            for frame in frames:
                message = frame.message
                if message.HasField("open"):
                    yield self._open(message.open)
                if message.HasField("push"):
                    size = self._begin(message.push)
                    busy.enter_context(self._gate.room(size))
                if frame.payload is not None:
                    self._pushing("chunk").add(frame.payload.runs, frame.payload.buffer, replace=frame.payload.replace)
                if message.commit:
                    yield from self._commit(message.pull if message.HasField("pull") else None)
                    busy.close()
                elif message.HasField("pull"):
                    parameter_set, _ = self._opened("pull")
                    if self._push is not None:
                        raise MessageOrder(f"expected `commit` of push {self._push.sequence}; got `pull`")
                    yield from _answer_pull(parameter_set, parameter_set.snapshot(), message.pull)

    def _open(self, message: step_pb2.Open) -> Frame[StepResponse]:
        if self._set is not None:
            raise MessageOrder("expected `open` once, in a stream's first message; got it again")
        self._set = self._engine.get(message.parameter_set_id)
        self._session = session = self._set.open(check_client_id(message.client_id), message.epoch, self)
        opened = step_pb2.Opened(
            epoch=session.epoch,
            last_sequence=session.last_sequence,
            last_receipt=encode_receipt(session.last_receipt) if session.last_receipt else None,
            position=encode_position(self._set.position),
            tensors=encode_tensors(self._set.spec.tensors),
        )
        return Frame(StepResponse(opened=opened))

    def _begin(self, message: step_pb2.Push) -> int:
        """Begin a push; returns the bytes that it will hold."""
        parameter_set, _ = self._opened("push")
        if self._push is not None:
            raise MessageOrder(f"expected `commit` of push {self._push.sequence}; got `push` {message.sequence}")
        if message.tensors:
            self._declared = [_decode_declared(each) for each in message.tensors]
        self._push = parameter_set.begin(
            message.sequence,
            self._declared,
            base=decode_position(message.base) if message.HasField("base") else None,
            changes=decode_changes(message.hyperparameters),
        )
        return self._push.nbytes

    def _commit(self, pull: step_pb2.Pull | None) -> Answers:
        parameter_set, session = self._opened("commit")
        push = self._pushing("commit")
        push.finish(pull.tensors if pull is not None else ())
        receipt, snapshot = parameter_set.push(session, self, push, pull=pull is not None)
        self._push = push = None  # type: ignore[assignment]  # let go of the received messages
        if pull is None or snapshot is None:
            yield Frame(StepResponse(receipt=encode_receipt(receipt)))
        else:
            yield from _answer_pull(parameter_set, snapshot, pull, receipt)

    def _opened(self, what: str) -> tuple[ParameterSet, Session]:
        if self._set is None or self._session is None:
            raise MessageOrder(f"expected `open` in a stream's first message; got `{what}`")
        return self._set, self._session

    def _pushing(self, what: str) -> Push:
        if self._push is None:
            raise MessageOrder(f"expected `push` first; got `{what}`")
        return self._push


def _decode_declared(message: step_pb2.PushedTensor) -> Declared:
    if message.role not in (step_pb2.ROLE_UNSPECIFIED, step_pb2.ROLE_GRADIENT, step_pb2.ROLE_PARAMETER):
        raise InvalidArgument(f"expected a role of 0, 1 or 2; got {message.role}")
    return Declared(decode_tensor(message.spec), message.role == step_pb2.ROLE_PARAMETER)


def _answer_pull(
    parameter_set: ParameterSet, snapshot: Snapshot, pull: step_pb2.Pull, receipt: Receipt | None = None
) -> Answers:
    """Send a snapshot; the receipt, if any, rides with the first chunk, and `end` with the last."""
    frame = Frame(StepResponse(parameters=step_pb2.Parameters(position=encode_position(snapshot.position))))
    if receipt is not None:
        frame.message.receipt.CopyFrom(encode_receipt(receipt))
    specs = parameter_set.spec.tensors
    if pull.HasField("newer_than") and not snapshot.position.newer_than(decode_position(pull.newer_than)):
        frame.message.parameters.unchanged = True
    else:
        indices = snapshot.select(parameter_set.spec, parameter_set.indices, pull.tensors)
        frame.message.parameters.tensors.extend(indices)
        tensors = ((k, snapshot.data[index].data, specs[index].dtype.itemsize) for k, index in enumerate(indices))
        for payload in pack(tensors):
            if frame.payload is not None:
                yield frame
                frame = Frame(StepResponse())
            frame.payload = payload
    frame.message.end = True
    yield frame
