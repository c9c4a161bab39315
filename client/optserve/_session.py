"""A session: one worker's pushes into one set, each applied exactly once however often the connection breaks.

Between attempts a push keeps its sequence. A new stream begins with the server saying which sequence it consumed last and with
what receipt, so a push whose answer was lost is settled without sending its tensors again.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from optserve._buffers import Buffers
from optserve._errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidChunk,
    OptserveError,
    OutcomeUnknown,
    RolledBack,
    TensorMismatch,
)
from optserve._messages import (
    decode_position,
    decode_receipt,
    decode_tensor,
    encode_changes,
    encode_position,
    encode_tensors,
)
from optserve._results import Parameters, Position, Receipt
from optserve._retry import Retry
from optserve._specification import TensorSpec
from optserve._transport import Stream, Transport
from optserve._wire import Frame, pack
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class OutgoingPush:
    """What a worker pushes: C-contiguous arrays by name, and hyperparameters that change with it, by group."""

    gradients: Arrays
    parameters: Arrays
    changes: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class OutgoingPull:
    """What a worker asks for: tensors in order (none: all), and from which position on (None: any)."""

    tensors: tuple[str, ...] = ()
    newer_than: Position | None = None


class Session:
    """The identity (set, client, epoch, sequence) and the stream that carries it. One call at a time; others wait."""

    def __init__(self, transport: Transport, set_id: str, client_id: str, timeout: float) -> None:
        self._transport = transport
        self._set_id = set_id
        self._client_id = client_id
        self._timeout = timeout
        self._lock = threading.Lock()
        self._closed = False
        self._stream: Stream | None = None
        self._epoch = 0
        self._last_sequence = 0
        self._last_receipt: Receipt | None = None
        self._base: Position | None = None  # of the parameters that the worker has; at first, of the set when opened
        self._tensors: tuple[TensorSpec, ...] = ()
        self._buffers = Buffers()

    def exchange(
        self, push: OutgoingPush | None, pull: OutgoingPull | None
    ) -> tuple[Receipt | None, Parameters | None]:
        """Push, pull, or both; raises the push's refusal, OutcomeUnknown, or what made the call fail for good."""
        with self._lock:
            if self._closed:
                raise ClientClosed(f"the handle on {self._set_id!r} was closed")
            retry = Retry(self._timeout)
            sequence: int | None = None
            while True:
                try:
                    stream = self._open(retry.deadline, sequence)
                    receipt = None
                    if push is not None:
                        receipt = self._settled(sequence)
                        sequence = sequence or self._last_sequence + 1
                    return self._attempt(stream, push, pull, sequence, receipt, retry.deadline)
                except BaseException as error:
                    self._disconnect(error)
                    if isinstance(error, OptserveError) and error.retryable and retry.pause():
                        continue
                    if (
                        sequence is not None
                        and isinstance(error, OptserveError)
                        and (error.retryable or isinstance(error, DeadlineExceeded))
                    ):
                        raise OutcomeUnknown(
                            f"push {sequence} to {self._set_id!r} was sent, but no receipt came within {self._timeout:g} s "
                            f"({error}); the next push finds out whether it was applied"
                        ) from error
                    raise

    def position_at(self, version: int) -> Position | None:
        """A version in the history that this session last saw; None before it saw any."""
        return self._base and replace(self._base, version=version)

    def close(self) -> None:
        """End the stream. The server remembers the session."""
        self._closed = True
        if stream := self._stream:
            stream.close()

    def _open(self, deadline: float, pending: int | None) -> Stream:
        if self._stream is not None:
            return self._stream
        self._stream = stream = self._transport.open()
        opening = step_pb2.Open(parameter_set_id=self._set_id, client_id=self._client_id, epoch=self._epoch)
        stream.send([Frame(StepRequest(open=opening))])
        self._adopt(stream.receive(deadline).message.opened, pending)
        return stream

    def _adopt(self, opened: step_pb2.Opened, pending: int | None) -> None:
        """Take over what the server knows of this session; raises RolledBack or OutcomeUnknown if it is too little."""
        resumed, acknowledged = opened.epoch == self._epoch, self._last_sequence
        position = decode_position(opened.parameter_set.position)
        replaced = self._base is not None and self._base.incarnation != position.incarnation
        self._epoch = opened.epoch
        self._last_sequence = opened.last_sequence
        self._last_receipt = decode_receipt(opened.last_receipt) if opened.HasField("last_receipt") else None
        self._tensors = tuple(map(decode_tensor, opened.parameter_set.spec.tensors))
        if self._base is None or replaced:
            self._base = position
        if replaced and self._last_sequence < acknowledged:
            raise RolledBack(
                f"set {self._set_id!r} came back at version {position.version}, from an older state: of this handle's "
                f"{acknowledged} pushes it knows {self._last_sequence}"
            )
        if pending is not None and not resumed:
            raise OutcomeUnknown(
                f"push {pending} to {self._set_id!r} was sent, but the server has forgotten this session since; whether "
                "the push was applied can't be found out"
            )

    def _settled(self, sequence: int | None) -> Receipt | None:
        """The receipt of a push that an earlier attempt got through, if it did."""
        if sequence is None or self._last_sequence < sequence or self._last_receipt is None:
            return None
        return replace(self._last_receipt, duplicate=True)

    def _attempt(
        self,
        stream: Stream,
        push: OutgoingPush | None,
        pull: OutgoingPull | None,
        sequence: int | None,
        receipt: Receipt | None,
        deadline: float,
    ) -> tuple[Receipt | None, Parameters | None]:
        pending = push if receipt is None else None
        stream.send(self._requests(pending, pull, sequence))
        answer: Frame[StepResponse] | None = None
        if pending is not None:
            answer = stream.receive(deadline)
            receipt = decode_receipt(answer.message.receipt)
            self._last_sequence, self._last_receipt = receipt.sequence, receipt
        if receipt is not None and receipt.error is not None:
            raise receipt.error
        if pull is None:
            return receipt, None
        return receipt, self._receive_parameters(stream, answer, deadline, receipt)

    def _requests(
        self, push: OutgoingPush | None, pull: OutgoingPull | None, sequence: int | None
    ) -> Iterator[Frame[StepRequest]]:
        """The frames of one exchange; what is small rides with the first chunk and the last."""
        frame = Frame(StepRequest())
        if push is not None:
            frame.message.push.CopyFrom(self._begin(push, sequence or 0))
            arrays = [*push.gradients.values(), *push.parameters.values()]
            tensors = (
                (index, array.reshape(-1).view(np.uint8).data, array.itemsize) for index, array in enumerate(arrays)
            )
            for payload in pack(tensors):
                if frame.payload is not None:
                    yield frame
                    frame = Frame(StepRequest())
                frame.payload = payload
            frame.message.commit = True
        if pull is not None:
            asked = step_pb2.Pull(tensors=pull.tensors)
            if pull.newer_than is not None:
                asked.newer_than.CopyFrom(encode_position(pull.newer_than))
            frame.message.pull.CopyFrom(asked)
        yield frame

    def _begin(self, push: OutgoingPush, sequence: int) -> step_pb2.Push:
        message = step_pb2.Push(sequence=sequence, hyperparameters=encode_changes(push.changes))
        if self._base is not None:
            message.base.CopyFrom(encode_position(self._base))
        for arrays, role in ((push.gradients, step_pb2.ROLE_GRADIENT), (push.parameters, step_pb2.ROLE_PARAMETER)):
            specs = [TensorSpec.of(name, array) for name, array in arrays.items()]
            message.tensors.extend(step_pb2.PushedTensor(spec=spec, role=role) for spec in encode_tensors(specs))
        return message

    def _receive_parameters(
        self, stream: Stream, answer: Frame[StepResponse] | None, deadline: float, receipt: Receipt | None
    ) -> Parameters | None:
        if answer is None or not answer.message.HasField("parameters"):
            answer = stream.receive(deadline)
        header = answer.message.parameters
        position = decode_position(header.position)
        if header.unchanged:
            return None
        specs = [self._tensors[index] for index in header.tensors]
        arrays = self._buffers.arrays(specs)
        remaining = sum(spec.size for spec in specs)
        while True:
            if answer.payload is not None:
                remaining -= _copy(answer, arrays)
            if answer.message.end:
                break
            answer = stream.receive(deadline)
        if remaining:
            raise InvalidChunk(f"expected every element of the pulled tensors; {remaining} did not come")
        self._base = position
        return Parameters({spec.name: array for spec, array in zip(specs, arrays, strict=True)}, position, receipt)

    def _disconnect(self, error: BaseException) -> None:
        """After any error but a receipt's refusal the stream's state is not known."""
        refused = self._last_receipt is not None and error is self._last_receipt.error
        if self._stream is not None and not refused:
            self._stream.close()
            self._stream = None


def _bytes_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.reshape(-1).view(np.uint8)


def _copy(answer: Frame[StepResponse], arrays: list[np.ndarray[Any, Any]]) -> int:
    """Copy a chunk into the arrays; returns the number of elements."""
    assert answer.payload is not None
    source = np.frombuffer(answer.payload.buffer, np.uint8)
    begin = count = 0
    for run in answer.payload.runs:
        if run.tensor >= len(arrays) or run.offset + run.size > arrays[run.tensor].size:
            raise TensorMismatch(f"the server sent elements outside of the pulled tensors: {run}")
        itemsize = arrays[run.tensor].itemsize
        target = _bytes_of(arrays[run.tensor])[run.offset * itemsize : (run.offset + run.size) * itemsize]
        target[:] = source[begin : begin + target.size]
        begin, count = begin + target.size, count + run.size
    return count
