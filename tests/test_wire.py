"""Frames are protobuf: same bytes out, same meaning in, and anything else is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve import InvalidChunk, _wire
from optserve._specification import BLOCK, Run
from optserve._wire import Frame, Payload, pack
from optserve.v1.optimizer_service_pb2 import CreateParameterSetRequest
from optserve.v1.step_pb2 import Open, Parameters, Pull, Push, Receipt, StepRequest, StepResponse
from optserve.v1.tensor_pb2 import Chunk, Segment


@pytest.fixture(autouse=True, scope="module", params=[0, _wire.SMALL], ids=["spliced", "small"])
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    """Payloads in these tests are small; each also goes the way of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_wire, "SMALL", request.param)
        yield


segments = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1)), max_size=5
)
payloads = st.builds(
    lambda runs, data, replace: Payload([Run(*run) for run in runs], data, replace),
    segments,
    st.lists(st.binary(max_size=200), max_size=3),
    st.booleans(),
) | st.builds(lambda runs: Payload([Run(*run) for run in runs], (), in_shared_memory=True), segments)
messages = st.one_of(
    st.builds(
        StepRequest,
        open=st.none() | st.builds(Open, parameter_set_id=st.text(max_size=8), epoch=st.integers(0, 2**64 - 1)),
        push=st.none() | st.builds(Push, sequence=st.integers(0, 2**64 - 1)),
        commit=st.booleans(),
        pull=st.none() | st.builds(Pull, tensors=st.lists(st.text(max_size=8), max_size=3)),
        release=st.booleans(),
    ),
    st.builds(
        StepResponse,
        receipt=st.none() | st.builds(Receipt, sequence=st.integers(0, 2**64 - 1)),
        parameters=st.none() | st.builds(Parameters, tensors=st.lists(st.integers(0, 2**32 - 1), max_size=3)),
        end=st.booleans(),
    ),
    st.builds(CreateParameterSetRequest, exist_ok=st.booleans()),
)


def generated(message: Any, payload: Payload) -> Any:
    """The same message, built from generated code alone."""
    whole = type(message)()
    whole.CopyFrom(message)
    whole.chunk.CopyFrom(
        Chunk(
            segments=[Segment(tensor=run.tensor, offset=run.offset, count=run.size) for run in payload.runs],
            replace=payload.replace,
            data=b"".join(payload.data),
            in_shared_memory=payload.in_shared_memory,
        )
    )
    return whole


@given(messages, payloads)
def test_frames_serialize_to_the_bytes_of_the_generated_code(message: Any, payload: Payload) -> None:
    assert Frame(message, payload).to_bytes() == generated(message, payload).SerializeToString()


@given(messages, payloads)
def test_frames_parse_what_the_generated_code_writes(message: Any, payload: Payload) -> None:
    frame = Frame.from_bytes(type(message), generated(message, payload).SerializeToString())
    assert frame.message == message
    assert frame.payload is not None
    assert list(frame.payload.runs) == list(payload.runs)
    assert frame.payload.replace == payload.replace
    assert bytes(frame.payload.buffer) == b"".join(payload.data)


@given(messages)
def test_a_message_without_a_chunk_has_no_payload(message: Any) -> None:
    assert Frame.from_bytes(type(message), Frame(message).to_bytes()) == Frame(message)


@given(payloads, payloads)
def test_a_chunk_in_two_parts_is_merged_as_protobuf_merges(first: Payload, second: Payload) -> None:
    data = Frame(StepRequest(), first).to_bytes() + Frame(StepRequest(), second).to_bytes()
    frame = Frame.from_bytes(StepRequest, data)
    assert frame.payload is not None
    merged = generated(frame.message, frame.payload)
    assert merged == StepRequest.FromString(data)


@given(messages, payloads, st.data())
def test_any_bytes_parse_as_protobuf_does_or_are_refused(message: Any, payload: Payload, data: st.DataObject) -> None:
    whole = bytearray(Frame(message, payload).to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        frame = Frame.from_bytes(type(message), damaged)
    except InvalidChunk:
        return
    rebuilt = generated(frame.message, frame.payload) if frame.payload else frame.message
    expected = type(message).FromString(damaged)
    for each in (rebuilt, expected):
        each.DiscardUnknownFields()  # of a chunk, which the frame has no place for
    assert rebuilt == expected


def test_parsing_does_not_copy_the_payload() -> None:
    data = Frame(StepRequest(commit=True), Payload([Run(0, 0, 8192)], [bytes(32768)])).to_bytes()
    frame = Frame.from_bytes(StepRequest, data)
    assert frame.payload is not None
    assert np.shares_memory(np.frombuffer(frame.payload.buffer, np.uint8), np.frombuffer(data, np.uint8))


@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.sampled_from([2, 4, 8])), max_size=6),
    st.sampled_from([1 << 15, 1 << 16]),
)
def test_packing_covers_every_element_once_in_bounded_chunks(shapes: list[tuple[int, int]], chunk_bytes: int) -> None:
    tensors = [np.arange(size * itemsize, dtype=np.uint8) for size, itemsize in shapes]
    views = [(k, tensor.data, itemsize) for k, (tensor, (_, itemsize)) in enumerate(zip(tensors, shapes, strict=True))]
    rebuilt = [np.zeros_like(tensor) for tensor in tensors]
    seen = [0] * len(shapes)
    for payload in pack(views, chunk_bytes):
        assert sum(len(part) for part in payload.data) <= chunk_bytes
        for run, part in zip(payload.runs, payload.data, strict=True):
            itemsize = shapes[run.tensor][1]
            assert run.offset == seen[run.tensor]
            assert run.offset % BLOCK == 0
            seen[run.tensor] += run.size
            rebuilt[run.tensor][run.offset * itemsize : (run.offset + run.size) * itemsize] = np.frombuffer(
                part, np.uint8
            )
    assert seen == [size for size, _ in shapes]
    for tensor, copy in zip(tensors, rebuilt, strict=True):
        np.testing.assert_array_equal(tensor, copy)


@pytest.mark.parametrize("kind", [StepRequest, StepResponse, CreateParameterSetRequest])
def test_garbage_is_refused_with_a_typed_error(kind: Any) -> None:
    with pytest.raises(InvalidChunk, match=f"optserve.v1.{kind.__name__}"):
        Frame.from_bytes(kind, b"\xff" * 40)


def test_a_small_payload_does_not_keep_a_large_message_alive() -> None:
    padding = Frame(StepRequest(pull=Pull(tensors=["x" * 100_000]))).to_bytes()
    data = Frame(StepRequest(commit=True), Payload([Run(0, 0, 1)], [bytes(4)])).to_bytes() + padding
    frame = Frame.from_bytes(StepRequest, data)
    assert frame.payload is not None
    assert not np.shares_memory(np.frombuffer(frame.payload.buffer, np.uint8), np.frombuffer(data, np.uint8))
