"""A worker that has no SDK, only generated code: it sends a push again until there is a receipt, and counts by itself."""

import queue
from collections.abc import Iterator
from typing import Any, Self

import grpc
import numpy as np

from optserve.v1 import optimizer_service_pb2_grpc, step_pb2, tensor_pb2

Requests = queue.SimpleQueue[step_pb2.StepRequest | None]
QUICK = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100)]


class Plain:
    """Pushes into one tensor of a set, over one stream at a time."""

    def __init__(self, address: str, set_id: str, client_id: str) -> None:
        self._channel = grpc.insecure_channel(address, options=QUICK)
        self._stub: Any = optimizer_service_pb2_grpc.OptimizerServiceStub(self._channel)
        self._opening = step_pb2.Open(parameter_set_id=set_id, client_id=client_id)
        self._requests: Requests | None = None
        self._answers: Any = None

    def push(self, sequence: int, tensor: str, gradient: "np.ndarray[Any, Any]") -> step_pb2.Receipt:
        """Push until there is a receipt; raises grpc.RpcError for what is not a lost connection."""
        spec = tensor_pb2.TensorSpec(name=tensor, dtype=tensor_pb2.DTYPE_FLOAT32, shape=gradient.shape)
        segment = tensor_pb2.Segment(tensor=0, offset=0, count=gradient.size)
        request = step_pb2.StepRequest(
            push=step_pb2.Push(sequence=sequence, tensors=[step_pb2.PushedTensor(spec=spec)]),
            chunk=tensor_pb2.Chunk(segments=[segment], data=gradient.tobytes()),
            commit=True,
        )
        while True:
            try:
                self._open().put(request)
                receipt: step_pb2.Receipt = next(self._answers).receipt
                return receipt
            except grpc.RpcError as error:
                self._end()
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise

    @staticmethod
    def reason(error: Any) -> str:
        """The stable name of what a call was refused with."""
        return str(dict(error.trailing_metadata()).get("optserve-reason", ""))

    def _open(self) -> Requests:
        if self._requests is None:
            self._requests = queue.SimpleQueue()
            self._requests.put(step_pb2.StepRequest(open=self._opening))
            self._answers = self._stub.Step(_until_none(self._requests), wait_for_ready=True)
            self._opening.epoch = next(self._answers).opened.epoch
        return self._requests

    def _end(self) -> None:
        if self._requests is not None:
            self._requests.put(None)
            self._requests = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._channel.close()


def _until_none(requests: Requests) -> Iterator[step_pb2.StepRequest]:
    while (request := requests.get()) is not None:
        yield request
