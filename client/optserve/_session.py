"""A session: one worker's pushes into one set, each applied exactly once however often the connection breaks.

Between attempts a push keeps its sequence. A new stream begins with the server saying which sequence it consumed last
and with what receipt, so a push whose answer was lost is settled without sending its tensors again.
"""

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
    RoundIncomplete,
    ServerBusy,
    ServerDraining,
    ServerError,
    ServerUnavailable,
    SessionSuperseded,
    TensorMismatch,
)
from optserve._exchange import Ahead, Arrays, Declared, Exchange, Listener, OutgoingPull, OutgoingPush
from optserve._heart import Heart
from optserve._identity import Identity
from optserve._ledger import Ledger
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
from optserve._policy_messages import seconds_of
from optserve._process import Owner
from optserve._results import Parameters, Position, Receipt
from optserve._retry import Retry
from optserve._rows import encode_rows
from optserve._shared_memory import WORTHWHILE, Mappings
from optserve._specification import TensorSpec
from optserve._transport import Stream, Transport
from optserve._window import KeptPush, Window
from optserve._wire import Frame, Payload, spread
from optserve.v1 import step_pb2
from optserve.v1.step_pb2 import StepRequest, StepResponse

log = logging.getLogger("optserve")

FAREWELL = 1.0  # seconds that a member takes to leave at most
MOST_AHEAD = 2  # times the size of a push that may be sent ahead of it, again and again; the server takes four


class Session:
    """The identity (set, client, epoch, sequence) and the stream that carries it. One call at a time; others wait.

    `base` is where the parameters come from that the worker has, None before it has any. With an `identity` of the same
    client, the session of an earlier process goes on. A worker that `joins` is a member of the set from the start, others are
    from their first push.
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
        identity: Identity | None = None,
        replay_window_bytes: int = 0,
        joins: bool = False,
        heart: Heart,
    ) -> None:
        self._transport = transport
        self._set_id = set_id
        self._client_id = client_id
        self._timeout = timeout
        self._choice = choice
        self._moments_only = moments_only
        self._owner = Owner()
        self._lock = threading.Lock()
        self._closed = False
        self._heart = heart
        self._member = joins
        self._barriers = 0  # that the set has had, as far as this worker knows
        self.lease = math.inf  # seconds of silence until the server counts it as gone
        self._stream: Stream | None = None
        self._declared: Declared | None = None  # on this stream
        self._ahead: Ahead | None = None  # on this stream
        self._window = Window(replay_window_bytes)
        self._ledger = Ledger(set_id, base, identity, self._window)
        self._uncertain: CompressedPush | None = None  # the unsettled push, if it will have left something unsaid
        self._base = base
        self._tensors: tuple[TensorSpec, ...] = ()
        self._buffers = Buffers()
        self._carrier: Chunks | None = None  # of this stream
        self._without_shared_memory = False  # since it failed before
        self._gradients: dict[str, np.ndarray[Any, Any]] = {}

    def exchange(
        self, push: OutgoingPush | None, pull: OutgoingPull | None
    ) -> tuple[Receipt | None, Parameters | None]:
        """Push, pull, or both; raises the push's refusal, OutcomeUnknown, or what made the call fail for good."""
        with self._turn():
            receipt, parameters = self._until_done(Exchange(push, pull))
            if receipt is not None or self._member:
                self._joined()
        if receipt is not None and receipt.refused and receipt.refusal is not None:
            raise receipt.refusal.error()
        return receipt, parameters

    def stage(self, gradients: Arrays, expected: Sequence[str]) -> None:
        """Send gradients of the next push ahead of it, where there is a stream to do so; raises TensorMismatch."""
        with self._turn():
            if self._stream is None or self._closed:
                return
            specs = {spec.name: spec for spec in self._tensors}
            self._check_staged(gradients, expected, specs)
            try:
                self._stream.send(list(self._staged(gradients, [specs[name] for name in expected])))
            except OptserveError:
                self._disconnect()

    def settle(self) -> Receipt | None:
        """What became of the push that was given up last: its receipt, or None if it was not applied.

        Also None if no push was given up since the last receipt. Raises OutcomeUnknown.
        """
        with self._turn():
            if (attempt := self._ledger.unsettled) is None:
                return None
            push = f"push {attempt.sequence} to {self._set_id!r}"
            try:
                self._until_done(Exchange(None, None, attempt))
            except SessionSuperseded as error:
                raise OutcomeUnknown(f"what became of {push} can't be found out: {error}") from error
            if self._ledger.epoch != attempt.epoch:
                raise OutcomeUnknown(f"what became of {push} can't be found out: the server has forgotten its session")
            if attempt.repeated:
                raise OutcomeUnknown(
                    f"{push} repeats one that was consumed before: push it again, and its first receipt comes back"
                )
            self._ledger.unsettled = None
            return self._ledger.outcome(attempt)

    def join(self) -> None:
        """Become a member of the set, which others wait for."""
        with self._turn():
            self._member = True
            self._until_done(Exchange(None, None))
            self._joined()

    def barrier(self) -> None:
        """Wait until all members have come to a barrier; raises RoundIncomplete."""
        with self._turn():
            self._member = True
            exchange = Exchange(None, None, barrier=True)
            self._until_done(exchange)
            self._joined()

    def beat(self) -> None:
        """Say that this worker is alive, unless it is talking with the server."""
        if self._lock.acquire(blocking=False):
            try:
                if self._stream is not None:
                    self._stream.send([Frame(StepRequest(heartbeat=True))])
            except OptserveError:
                self._disconnect()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The only call for a while; raises FailedPrecondition in a forked process, where nobody frees locks."""
        self._owner.check()
        with self._lock:
            yield

    def _joined(self) -> None:
        self._member = True
        if self.lease < math.inf:
            self._heart.add(self)

    def identity(self) -> Identity:
        """Who this worker is, and its last push that is known to be consumed; asks the server if it has not yet."""
        with self._turn():
            if not self._ledger.epoch:
                self._until_done(Exchange(None, None))
            return Identity(self._client_id, self._ledger.epoch, self._ledger.sequence)

    def gradient_buffers(self) -> dict[str, np.ndarray[Any, Any]]:
        """An array for the gradient of each tensor: in shared memory, if that is how they travel now."""
        with self._turn():
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
        return self._ledger.position and replace(self._ledger.position, version=version)

    def rewound(self, position: Position, rewinds: int) -> None:
        """This worker itself has rewound the set."""
        with self._lock:
            self._disconnect()
            self._ledger.rewound(position, rewinds)

    def close(self) -> None:
        """End the stream, and with it a call that another thread waits in. A member leaves; its session is remembered."""
        if not self._owner.here:
            return
        self._heart.remove(self)
        if self._member and self._lock.acquire(blocking=False):
            try:
                self._leave()
            finally:
                self._lock.release()
        self._closed = True
        if stream := self._stream:
            stream.close()

    def _leave(self) -> None:
        if self._stream is not None and not self._closed:
            with contextlib.suppress(OptserveError):  # then the lease ends
                self._stream.send([Frame(StepRequest(leave=True))])
                self._stream.receive(time.monotonic() + FAREWELL)

    def _until_done(self, exchange: Exchange) -> tuple[Receipt | None, Parameters | None]:
        retry, said = Retry(self._timeout), ""
        while True:
            try:
                if self._ahead is not None and exchange.push is None:
                    self._disconnect()  # the server expects the rest of a push
                stream = self._open(retry.deadline, exchange)
                return self._attempt(stream, exchange, retry.deadline)
            except BaseException as error:
                connected = self._ledger.epoch != 0
                self._disconnect()
                if self._closed:
                    raise ClientClosed(f"the handle on {self._set_id!r} was closed") from error
                over = exchange.barrier and isinstance(error, RoundIncomplete)  # for good: it had its own deadline
                if isinstance(error, OptserveError) and error.retryable and not over and retry.pause(error):
                    said = f"; what was said before: {error}" if isinstance(error, ServerBusy) else ""
                    continue
                if isinstance(error, DeadlineExceeded) and (said or connected):
                    hint = (
                        "; as its policy has it, it may wait for other workers, of whom `workers()` says who is there"
                    )
                    late = DeadlineExceeded(f"{error}{said or hint}")
                    self._give_up(late, exchange)
                    raise late from error
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
                epoch=self._ledger.epoch,
                shared_memory=self._choice.shared_memory and not self._without_shared_memory,
                join=self._member,
            )
            self._stream.send([Frame(StepRequest(open=opening))])
            opened = self._stream.receive(deadline).message.opened
            self.lease = seconds_of(opened.lease) if opened.HasField("lease") else math.inf
            self._barriers = min(self._barriers, opened.barriers) if exchange.barrier else opened.barriers
            missing = self._adopt(opened, exchange)
            self._carry(opened)
            self._send_again(missing, exchange, deadline)
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

    def _adopt(self, opened: step_pb2.Opened, exchange: Exchange) -> list[KeptPush]:
        """Take over what the server knows of this session; returns pushes that it lost, raises RolledBack or OutcomeUnknown."""
        try:
            missing = self._ledger.adopt(opened, exchange.attempt)
        finally:
            receipt = self._ledger.outcome(self._ledger.unsettled)
            if self._uncertain is not None and receipt is not None:
                self._uncertain.decided(taken=receipt.refusal is None)
            self._uncertain = None
        if exchange.receipt is None and (receipt := self._ledger.outcome(exchange.attempt)) is not None:
            exchange.decided(receipt)
        self._tensors = tuple(map(decode_tensor, opened.tensors))
        self._declared = None
        return missing

    def _send_again(self, missing: list[KeptPush], exchange: Exchange, deadline: float) -> None:
        """Push what the server came back without, under the same sequences; what was acknowledged gets a new receipt."""
        assert self._stream is not None
        for kept in missing:
            self._stream.send(self._requests(kept.push, None, kept.sequence, kept.base))
            receipt = self._received(self._stream.receive(deadline), kept.sequence)
            if receipt.refusal is not None:
                outcome = receipt.outcome.name.lower()
                log.warning(
                    "push %d to %r, sent again, was %s: %s", kept.sequence, self._set_id, outcome, receipt.refusal
                )
            if exchange.attempt is not None and exchange.attempt.sequence == kept.sequence:
                exchange.receipt = receipt

    def _attempt(self, stream: Stream, exchange: Exchange, deadline: float) -> tuple[Receipt | None, Parameters | None]:
        if exchange.barrier:
            stream.send([Frame(StepRequest(barrier=self._barriers))])
            self._barriers = stream.receive(deadline).message.barriers
            return None, None
        answer: Frame[StepResponse] | None = None
        if exchange.push is not None and exchange.receipt is None:
            before, attempt = exchange.attempt, self._ledger.attempt()
            exchange.attempt = attempt
            ahead, self._ahead = self._ahead, None
            stream.send(self._requests(exchange.push, exchange.pull, attempt.sequence, self._base, ahead))
            if exchange.kept != attempt:
                self._window.keep(attempt.sequence, exchange.push, self._base)  # while it travels
                exchange.kept = attempt
            try:
                answer = stream.receive(deadline)
            except (ServerBusy, ServerDraining):  # the server says that it took nothing in
                exchange.attempt = before
                raise
            exchange.decided(self._received(answer, attempt.sequence))
            self._ledger.unsettled = None
        elif self._moments_only and exchange.receipt is not None and not exchange.receipt.applied and exchange.pull:
            return exchange.receipt, Parameters({}, exchange.receipt.position, exchange.receipt)  # nothing to add
        elif exchange.pull is not None and not exchange.refused:
            stream.send(self._requests(None, exchange.pull, 0, None))
        if exchange.pull is None or exchange.refused:
            return exchange.receipt, None
        return exchange.receipt, self._receive_parameters(stream, answer, deadline, exchange)

    def _received(self, answer: Frame[StepResponse], sequence: int) -> Receipt:
        receipt = decode_receipt(answer.message.receipt)
        if receipt.sequence != sequence:
            raise ServerError(f"expected the receipt of push {sequence}; got that of {receipt.sequence}")
        self._ledger.received(receipt)
        return receipt

    def _give_up(self, error: BaseException, exchange: Exchange) -> None:
        """Say what is known of a push whose exchange failed; raises OutcomeUnknown or DeadlineExceeded, or nothing."""
        if exchange.push is None or exchange.attempt is None:
            return
        push = f"push {exchange.attempt.sequence} to {self._set_id!r}"
        rolled_back = isinstance(error, RolledBack)  # also what had a receipt may be lost
        if exchange.receipt is not None and not rolled_back:
            if isinstance(error, OptserveError):
                raise DeadlineExceeded(
                    f"{push} is done (version {exchange.receipt.version}), but the parameters did not come within "
                    f"{self._timeout:g} s: pull them ({error})"
                ) from error
            return
        self._ledger.unsettled = exchange.attempt
        self._uncertain = exchange.push.compressed
        if isinstance(error, OptserveError) and (error.retryable or isinstance(error, DeadlineExceeded)):
            raise OutcomeUnknown(
                f"{push} was sent, but no receipt came within {self._timeout:g} s ({error}); settle() finds out whether it "
                "was applied"
            ) from error

    def _requests(
        self,
        push: OutgoingPush | None,
        pull: OutgoingPull | None,
        sequence: int,
        base: Position | None = None,
        ahead: Ahead | None = None,
    ) -> Iterator[Frame[StepRequest]]:
        """The frames of one exchange; what is small rides with the first chunk and the last."""
        assert self._carrier is not None
        frame = Frame(StepRequest())
        if push is not None:
            frame.message.push.CopyFrom(self._begin(push, sequence, base))
            if ahead is not None and ahead.declared == push.declared:
                missing = {name: each for name, each in push.gradients.items() if not ahead.has(name, each)}
                frame = yield from spread(frame, self._part(ahead, missing))
            else:
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

    def _begin(self, push: OutgoingPush, sequence: int, base: Position | None) -> step_pb2.Push:
        message = step_pb2.Push(
            sequence=sequence,
            hyperparameters=encode_changes(push.changes),
            loss_scale=push.loss_scale,
            samples=push.samples,
        )
        if base is not None:
            message.base.CopyFrom(encode_position(base))
        if push.declared != self._declared:  # else as in this stream's push before
            self._declare(message, push.declared)
        return message

    def _declare(self, message: step_pb2.Push, declared: Declared) -> None:
        specs = encode_tensors([spec for spec, _, _, _ in declared])
        for spec, (_, role, format, rows) in zip(specs, declared, strict=True):
            encoding, fraction = encode_format(format)
            message.tensors.append(
                step_pb2.PushedTensor(spec=spec, role=role, encoding=encoding, fraction=fraction, rows=rows)
            )
        self._declared = declared

    def _check_staged(self, gradients: Arrays, expected: Sequence[str], specs: Mapping[str, TensorSpec]) -> None:
        for name in expected:
            if name not in specs:
                raise TensorMismatch(f"set {self._set_id!r}: expected tensors of the set; got {name!r}")
        for name, array in gradients.items():
            if name not in expected:
                raise TensorMismatch(f"set {self._set_id!r}: expected gradients that the push will have; got {name!r}")
            if (spec := TensorSpec.of(name, array)) != specs[name]:
                raise TensorMismatch(f"set {self._set_id!r}: expected {specs[name]}; got {spec}")

    def _staged(self, gradients: Arrays, expected: Sequence[TensorSpec]) -> Iterator[Frame[StepRequest]]:
        """The frames that carry some gradients of a push that may have begun before."""
        frame, ahead = Frame(StepRequest()), self._ahead
        beginning = Ahead.of(self._ledger.attempt().sequence, expected)
        most = MOST_AHEAD * sum(spec.nbytes for spec in expected)
        if ahead is None or ahead.declared != beginning.declared or ahead.nbytes > most:
            self._ahead = ahead = beginning
            frame.message.push.sequence = ahead.sequence
            self._declare(frame.message.push, ahead.declared)
        yield (yield from spread(frame, self._part(ahead, gradients)))

    def _part(self, ahead: Ahead, gradients: Arrays) -> Iterator[Payload]:
        """Gradients of a push; what it had of them before, they replace."""
        assert self._carrier is not None
        places = ahead.places
        missing = {name: (places[name], each) for name, each in gradients.items() if name not in ahead.gradients}
        changed = {name: (places[name], each) for name, each in gradients.items() if name in ahead.gradients}
        yield from self._carrier.part(missing)
        for payload in self._carrier.part(changed):
            payload.replace = True
            yield payload
        ahead.add(gradients)

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
            listener = exchange.pull.listener
            arrived = functools.partial(self._arrived, listener) if listener is not None else None
            arrays = self._carrier.receive(
                header, answers, exchange.pull.rows, copy=exchange.pull.copy, arrived=arrived
            )
        except NoSharedMemory as error:  # after a push that is done: fetch them again, another way
            self._without_shared_memory = self._choice.transport is Via.AUTO
            raise ServerUnavailable(str(error)) from error
        self._base = self._ledger.position = position
        names = (self._tensors[index].name for index in header.tensors)
        return Parameters(dict(zip(names, arrays, strict=True)), position, exchange.receipt)

    def _arrived(self, listener: Listener, index: int, array: np.ndarray[Any, Any]) -> None:
        listener.arrived(self._tensors[index].name, array)

    def _disconnect(self) -> None:
        """After an error the stream's state is not known; the next call opens another."""
        self._ahead = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _until_end(stream: Stream, answer: Frame[StepResponse], deadline: float) -> Iterator[Frame[StepResponse]]:
    """An answer to a pull, message by message."""
    yield answer
    while not answer.message.end:
        answer = stream.receive(deadline)
        yield answer
