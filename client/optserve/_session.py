"""A session: one worker's pushes into one set, each applied exactly once however often the connection breaks.

Between attempts a push keeps its sequence. A new stream begins with the server saying which sequence it consumed last
and with what receipt, so a push whose answer was lost is settled without sending its tensors again.
"""

import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from optserve._buffers import Buffers
from optserve._carriers import Chunks, Segments
from optserve._choice import Choice, Via
from optserve._compression import CompressedPush
from optserve._errors import (
    ClientClosed,
    DeadlineExceeded,
    NoSharedMemory,
    OptserveError,
    OutcomeUnknown,
    RolledBack,
    ServerBusy,
    ServerDraining,
    ServerError,
    ServerUnavailable,
)
from optserve._local_channel import LocalChannel
from optserve._messages import (
    decode_position,
    decode_receipt,
    decode_tensor,
    encode_changes,
    encode_format,
    encode_position,
    encode_tensors,
)
from optserve._results import Parameters, Position, Receipt
from optserve._retry import Retry
from optserve._rows import Indices, encode_rows
from optserve._shared_memory import WORTHWHILE, Mappings
from optserve._specification import TensorSpec
from optserve._transport import Stream, Transport
from optserve._wire import Frame, spread
from optserve.formats import Format
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse

Arrays = dict[str, np.ndarray[Any, Any]]
Declared = list[tuple[TensorSpec, step_pb2.Role, Format | None, bytes | None]]


@dataclass(frozen=True)
class OutgoingPush:
    """What a worker pushes: C-contiguous arrays by name, and hyperparameters that change with it, by group.

    `rows` says of which rows some gradients are.
    """

    gradients: Arrays
    parameters: Arrays
    changes: Mapping[str, Mapping[str, Any]]
    compressed: CompressedPush | None = None
    loss_scale: float = 1.0
    rows: Mapping[str, Indices] = field(default_factory=dict)

    @functools.cached_property
    def declared(self) -> Declared:
        """Specification, role, format and rows of every array, in the order in which they are sent; raises InvalidTensor."""
        format = self.compressed.compressor.format if self.compressed is not None else None
        return [
            *(
                (
                    TensorSpec.of(name, array),
                    step_pb2.ROLE_GRADIENT,
                    format,
                    self._encoded_rows(name),
                )
                for name, array in self.gradients.items()
            ),
            *(
                (TensorSpec.of(name, array), step_pb2.ROLE_PARAMETER, None, None)
                for name, array in self.parameters.items()
            ),
        ]

    def _encoded_rows(self, name: str) -> bytes | None:
        return encode_rows(self.rows[name]) if name in self.rows else None


@dataclass(frozen=True, slots=True)
class OutgoingPull:
    """What a worker asks for: tensors in order (none: all), and from which position on (None: any).

    Without `copy`, arrays may lie in shared memory and are valid until the next push or pull. With `evaluation`, it asks for
    the parameters to evaluate; with `rows`, for some rows of tensors.
    """

    tensors: tuple[str, ...] = ()
    newer_than: Position | None = None
    copy: bool = True
    evaluation: bool = False
    rows: Mapping[str, Indices] = field(default_factory=dict)


@dataclass(slots=True)
class Exchange:
    """A push, a pull, or both, and how far they have got over all attempts.

    `sequence` is the push's, once it has one; `sent` says that some attempt may have got it through.
    """

    push: OutgoingPush | None
    pull: OutgoingPull | None
    sequence: int | None = None
    sent: bool = False
    receipt: Receipt | None = None

    @property
    def refused(self) -> bool:
        """Whether the push was refused; a pull that came with it is then not answered."""
        return self.receipt is not None and self.receipt.refused


class Session:
    """The identity (set, client, epoch, sequence) and the stream that carries it. One call at a time; others wait.

    `base` is where the parameters come from that the worker has, None before it has any.
    """

    def __init__(
        self,
        transport: Transport,
        set_id: str,
        client_id: str,
        timeout: float,
        choice: Choice,
        base: Position | None = None,
        *,
        moments_only: bool = False,
    ) -> None:
        self._transport = transport
        self._set_id = set_id
        self._client_id = client_id
        self._timeout = timeout
        self._choice = choice
        self._moments_only = moments_only
        self._lock = threading.Lock()
        self._closed = False
        self._stream: Stream | None = None
        self._declared: Declared | None = None  # on this stream
        self._epoch = 0
        self._last_sequence = 0
        self._last_receipt: Receipt | None = None
        self._unsettled: tuple[int, int] | None = None  # epoch and sequence of a push that was given up
        self._uncertain: CompressedPush | None = None  # that push, if it will have left something unsaid
        self._base = base
        self._latest = base  # position that the server last spoke of
        self._tensors: tuple[TensorSpec, ...] = ()
        self._buffers = Buffers()
        self._carrier: Chunks | None = None  # of this stream
        self._without_shared_memory = False  # since it failed before
        self._gradients: dict[str, np.ndarray[Any, Any]] = {}

    def exchange(
        self, push: OutgoingPush | None, pull: OutgoingPull | None
    ) -> tuple[Receipt | None, Parameters | None]:
        """Push, pull, or both; raises the push's refusal, OutcomeUnknown, or what made the call fail for good."""
        with self._lock:
            receipt, parameters = self._until_done(Exchange(push, pull))
            if push is not None and push.compressed is not None and receipt is not None and receipt.refusal is None:
                push.compressed.applied()
        if receipt is not None and receipt.refused and receipt.refusal is not None:
            raise receipt.refusal.error()
        return receipt, parameters

    def settle(self) -> Receipt | None:
        """What became of the push that was given up last: its receipt, or None if it was not applied.

        Also None if no push was given up since the last receipt.
        """
        with self._lock:
            if self._unsettled is None:
                return None
            epoch, sequence = self._unsettled
            self._until_done(Exchange(None, None, sequence, sent=True))
            self._unsettled = None
            if self._epoch != epoch:
                raise OutcomeUnknown(f"the server has forgotten the session of push {sequence} to {self._set_id!r}")
            return self._last_receipt if self._last_sequence >= sequence else None

    def gradient_buffers(self) -> dict[str, np.ndarray[Any, Any]]:
        """An array for the gradient of each tensor: in shared memory, if that is how they travel now."""
        with self._lock:
            self._until_done(Exchange(None, None))
            assert self._carrier is not None
            names = [spec.name for spec in self._tensors]
            if self._carrier.gradients is not None:
                return dict(zip(names, self._carrier.gradients, strict=True))
            if not self._gradients:
                self._gradients = dict(zip(names, Buffers().arrays(self._tensors), strict=True))
            return self._gradients

    def position_at(self, version: int) -> Position | None:
        """A version in the history that this session last saw; None before it saw any."""
        return self._latest and replace(self._latest, version=version)

    def close(self) -> None:
        """End the stream, and with it a call that another thread waits in. The server remembers the session."""
        self._closed = True
        if stream := self._stream:
            stream.close()

    def _until_done(self, exchange: Exchange) -> tuple[Receipt | None, Parameters | None]:
        retry = Retry(self._timeout)
        while True:
            try:
                stream = self._open(retry.deadline, exchange)
                return self._attempt(stream, exchange, retry.deadline)
            except BaseException as error:
                self._disconnect()
                if self._closed:
                    raise ClientClosed(f"the handle on {self._set_id!r} was closed") from error
                if isinstance(error, OptserveError) and error.retryable and retry.pause(error):
                    continue
                self._give_up(error, exchange)
                raise

    def _open(self, deadline: float, exchange: Exchange) -> Stream:
        if self._closed:
            raise ClientClosed(f"the handle on {self._set_id!r} was closed")
        if self._stream is None:
            self._stream = self._transport.open()
            opening = step_pb2.Open(
                parameter_set_id=self._set_id,
                client_id=self._client_id,
                epoch=self._epoch,
                shared_memory=self._choice.shared_memory and not self._without_shared_memory,
            )
            self._stream.send([Frame(StepRequest(open=opening))])
            opened = self._stream.receive(deadline).message.opened
            self._adopt(opened, exchange)
            self._carry(opened)
        return self._stream

    def _carry(self, opened: step_pb2.Opened) -> None:
        """Decide how this stream goes on; raises NoSharedMemory if nothing else was allowed."""
        self._carrier = Chunks(self._tensors, self._buffers, self._choice.pull_format)
        forced = self._choice.transport is Via.SHARED_MEMORY
        if not opened.HasField("shared_memory"):
            if forced:
                raise NoSharedMemory(f"the server offers no shared memory for set {self._set_id!r}")
            return
        assert self._stream is not None
        try:
            self._stream = LocalChannel(opened.shared_memory, self._stream, self._timeout)
            if forced or sum(spec.nbytes for spec in self._tensors) >= WORTHWHILE:
                mappings = Mappings(opened.shared_memory, self._tensors)
                release = functools.partial(self._stream.send, [Frame(StepRequest(release=True))])
                self._carrier = Segments(self._tensors, self._buffers, mappings, release)
        except NoSharedMemory:
            if forced:
                raise

    def _adopt(self, opened: step_pb2.Opened, exchange: Exchange) -> None:
        """Take over what the server knows of this session; raises RolledBack or OutcomeUnknown if it is too little."""
        resumed, acknowledged, before = opened.epoch == self._epoch, self._last_sequence, self._latest
        self._latest = position = decode_position(opened.position)
        self._epoch = opened.epoch
        self._last_sequence = opened.last_sequence
        self._last_receipt = None
        if opened.HasField("last_receipt"):
            self._last_receipt = replace(decode_receipt(opened.last_receipt), duplicate=True)
        if self._uncertain is not None and self._unsettled is not None and resumed:
            sequence, receipt = self._unsettled[1], self._last_receipt
            if receipt is not None and receipt.sequence == sequence and receipt.refusal is None:
                self._uncertain.applied()
        self._uncertain = None
        self._tensors = tuple(map(decode_tensor, opened.tensors))
        self._declared = None
        replaced = before is not None and before.incarnation != position.incarnation
        if (
            before is not None
            and replaced
            and (position.version < before.version or opened.last_sequence < acknowledged)
        ):
            raise RolledBack(
                f"set {self._set_id!r} came back at version {position.version}, from an older state: this handle knew "
                f"version {before.version}, and of its {acknowledged} pushes {opened.last_sequence} are left"
            )
        if exchange.sent and not resumed:
            raise OutcomeUnknown(
                f"push {exchange.sequence} to {self._set_id!r} was sent, but the server has forgotten this session since; "
                "whether the push was applied can't be found out"
            )
        if exchange.sent and self._last_receipt is not None and self._last_sequence == exchange.sequence:
            exchange.receipt = self._last_receipt

    def _attempt(self, stream: Stream, exchange: Exchange, deadline: float) -> tuple[Receipt | None, Parameters | None]:
        answer: Frame[StepResponse] | None = None
        if exchange.push is not None and exchange.receipt is None:
            exchange.sequence = self._last_sequence + 1
            sent_before, exchange.sent = exchange.sent, True
            stream.send(self._requests(exchange.push, exchange.pull, exchange.sequence))
            try:
                answer = stream.receive(deadline)
            except (ServerBusy, ServerDraining):  # the server says that it took nothing in
                exchange.sent = sent_before
                raise
            exchange.receipt = self._received(answer, exchange.sequence)
        elif self._moments_only and exchange.receipt is not None and not exchange.receipt.applied and exchange.pull:
            return exchange.receipt, Parameters({}, exchange.receipt.position, exchange.receipt)  # nothing to add
        elif exchange.pull is not None and not exchange.refused:
            stream.send(self._requests(None, exchange.pull, None))
        if exchange.pull is None or exchange.refused:
            return exchange.receipt, None
        return exchange.receipt, self._receive_parameters(stream, answer, deadline, exchange)

    def _received(self, answer: Frame[StepResponse], sequence: int) -> Receipt:
        receipt = decode_receipt(answer.message.receipt)
        if receipt.sequence != sequence:
            raise ServerError(f"expected the receipt of push {sequence}; got that of {receipt.sequence}")
        self._last_sequence, self._last_receipt, self._latest = sequence, receipt, receipt.position
        self._unsettled = None
        return receipt

    def _give_up(self, error: BaseException, exchange: Exchange) -> None:
        """Say what is known of a push whose exchange failed; raises OutcomeUnknown or DeadlineExceeded, or nothing."""
        if exchange.push is None or not exchange.sent:
            return
        if receipt := exchange.receipt:
            if isinstance(error, OptserveError):
                raise DeadlineExceeded(
                    f"push {exchange.sequence} to {self._set_id!r} is done (version {receipt.version}), but the parameters "
                    f"did not come within {self._timeout:g} s: pull them ({error})"
                ) from error
            return
        self._unsettled = (self._epoch, exchange.sequence or 0)
        self._uncertain = exchange.push.compressed
        if isinstance(error, OptserveError) and (error.retryable or isinstance(error, DeadlineExceeded)):
            raise OutcomeUnknown(
                f"push {exchange.sequence} to {self._set_id!r} was sent, but no receipt came within {self._timeout:g} s "
                f"({error}); settle() finds out whether it was applied"
            ) from error

    def _requests(
        self, push: OutgoingPush | None, pull: OutgoingPull | None, sequence: int | None
    ) -> Iterator[Frame[StepRequest]]:
        """The frames of one exchange; what is small rides with the first chunk and the last."""
        assert self._carrier is not None
        frame = Frame(StepRequest())
        if push is not None:
            frame.message.push.CopyFrom(self._begin(push, sequence or 0))
            frame = yield from spread(frame, self._carrier.payloads(push))
            frame.message.commit = True
        if pull is not None:
            asked = frame.message.pull
            asked.SetInParent()
            asked.tensors.extend(pull.tensors)
            asked.evaluation = pull.evaluation
            for name, rows in pull.rows.items():
                asked.rows.add(tensor=name, rows=encode_rows(rows))
            self._carrier.ask(asked)
            if pull.newer_than is not None:
                asked.newer_than.CopyFrom(encode_position(pull.newer_than))
        yield frame

    def _begin(self, push: OutgoingPush, sequence: int) -> step_pb2.Push:
        message = step_pb2.Push(
            sequence=sequence, hyperparameters=encode_changes(push.changes), loss_scale=push.loss_scale
        )
        if self._base is not None:
            message.base.CopyFrom(encode_position(self._base))
        declared = push.declared
        if declared != self._declared:  # else as in this stream's push before
            specs = encode_tensors([spec for spec, _, _, _ in declared])
            for spec, (_, role, format, rows) in zip(specs, declared, strict=True):
                encoding, fraction = encode_format(format)
                message.tensors.append(
                    step_pb2.PushedTensor(spec=spec, role=role, encoding=encoding, fraction=fraction, rows=rows)
                )
            self._declared = declared
        return message

    def _receive_parameters(
        self, stream: Stream, answer: Frame[StepResponse] | None, deadline: float, exchange: Exchange
    ) -> Parameters | None:
        assert self._carrier is not None
        assert exchange.pull is not None
        if answer is None or not answer.message.HasField("parameters"):
            answer = stream.receive(deadline)
        header = answer.message.parameters
        position = decode_position(header.position)
        if header.unchanged:
            return None
        try:
            answers = _until_end(stream, answer, deadline)
            arrays = self._carrier.receive(header, answers, exchange.pull.rows, copy=exchange.pull.copy)
        except NoSharedMemory as error:  # after a push that is done: fetch them again, another way
            self._without_shared_memory = self._choice.transport is Via.AUTO
            raise ServerUnavailable(str(error)) from error
        self._base = self._latest = position
        names = (self._tensors[index].name for index in header.tensors)
        return Parameters(dict(zip(names, arrays, strict=True)), position, exchange.receipt)

    def _disconnect(self) -> None:
        """After an error the stream's state is not known; the next call opens another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _until_end(stream: Stream, answer: Frame[StepResponse], deadline: float) -> Iterator[Frame[StepResponse]]:
    """An answer to a pull, message by message."""
    yield answer
    while not answer.message.end:
        answer = stream.receive(deadline)
        yield answer
