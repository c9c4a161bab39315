"""Events of a set's history as bytes, and back: a message of `journal.proto`, then the elements as they came."""

from collections.abc import Sequence
from typing import Any

from optserve._messages import (
    decode_changes,
    decode_pushed_tensor,
    decode_receipt,
    encode_changes,
    encode_pushed_tensor,
    encode_receipt,
)
from optserve._policy_messages import decode_policy, encode_policy
from optserve._specification import Run
from optserve.v1 import journal_pb2, tensor_pb2
from optserve_server.engine.history import Content, Event, Pushed
from optserve_server.engine.push import Declared
from optserve_server.engine.staging import Received


def encode(event: Event) -> tuple[bytes, Sequence[Any]]:
    """The event's message, and what follows it as bytes-like objects."""
    message = journal_pb2.Event(
        number=event.number,
        version=event.version,
        pushes=[_encode_push(each) for each in event.pushes],
        hyperparameters=encode_changes(event.changes),
    )
    if event.policy is not None:
        message.policy.CopyFrom(encode_policy(event.policy))
    if event.content is None:
        return message.SerializeToString(), ()
    content = event.content
    data: list[Any] = []
    message.gathered, message.loss_scale = content.gathered, content.loss_scale
    for each in content.declared:
        message.tensors.append(
            encode_pushed_tensor(each.spec, is_parameter=each.is_parameter, format=each.format, rows=each.rows)
        )
    for received in content.received:
        chunk = message.chunks.add(replace=received.replace)
        for run in received.runs:
            chunk.segments.add(tensor=run.tensor, offset=run.offset, count=run.size)
        message.sizes.append(sum(memoryview(part).nbytes for part in received.data))
        data += received.data
    return message.SerializeToString(), data


def decode(encoded: bytes, data: memoryview) -> Event:
    """The event that `encode` made these of; raises ValueError for others."""
    message = journal_pb2.Event.FromString(encoded)
    return Event(
        message.number,
        message.version,
        [_decode_push(each) for each in message.pushes],
        _decode_content(message, data) if message.tensors else None,
        decode_changes(message.hyperparameters),
        decode_policy(message.policy) if message.HasField("policy") else None,
    )


def _decode_content(message: journal_pb2.Event, data: memoryview) -> Content:
    received, begin = [], 0
    for chunk, size in zip(message.chunks, message.sizes, strict=True):
        received.append(Received(_runs(chunk), [data[begin : begin + size]], chunk.replace))
        begin += size
    if begin != len(data):
        raise ValueError(f"expected {begin} bytes of elements; got {len(data)}")
    declared = [Declared(*decode_pushed_tensor(each)) for each in message.tensors]
    return Content(declared, received, message.loss_scale, message.gathered)


def _runs(chunk: tensor_pb2.Chunk) -> list[Run]:
    return [Run(segment.tensor, segment.offset, segment.count) for segment in chunk.segments]


def _encode_push(pushed: Pushed) -> journal_pb2.JournaledPush:
    return journal_pb2.JournaledPush(
        client_id=pushed.client_id,
        epoch=pushed.epoch,
        digest=pushed.digest,
        receipt=encode_receipt(pushed.receipt),
        samples=pushed.samples,
    )


def _decode_push(message: journal_pb2.JournaledPush) -> Pushed:
    receipt = decode_receipt(message.receipt)
    return Pushed(message.client_id, message.epoch, message.digest, receipt, message.samples or 1.0)
