"""Gradients as what a push takes, and parameters back."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from optserve._errors import InvalidTensor
from optserve._rows import RowSparse
from optserve.interop._building import Array
from optserve.interop.torch import as_array


def as_gradient(gradient: torch.Tensor) -> Array | RowSparse:
    """A gradient as a push takes it: that of an embedding with `sparse=True` as some of its rows. Raises InvalidTensor."""
    if gradient.layout != torch.sparse_coo:
        return _contiguous(gradient)
    if gradient.sparse_dim() != 1:
        raise InvalidTensor(
            f"expected a sparse gradient that has whole rows, as an embedding's; got one with {gradient.sparse_dim()} "
            "sparse dimensions"
        )
    gradient = gradient.coalesce()
    return RowSparse(as_array(gradient.indices()[0]), as_array(gradient.values()))


def _contiguous(gradient: torch.Tensor) -> Array:
    return np.ascontiguousarray(as_array(gradient)).reshape(gradient.shape)


class HostCopies:
    """Gradients in the host's memory: their own, or pinned copies, which are made beside what a GPU computes."""

    def __init__(self) -> None:
        self._pinned: dict[str, torch.Tensor] = {}
        self._streams: dict[torch.device, Any] = {}

    def begin(self, name: str, gradient: torch.Tensor) -> Array:
        """A dense gradient as a C-contiguous array; of one on a GPU, its elements are there after `wait`."""
        if gradient.device.type != "cuda":
            return _contiguous(gradient)
        if name not in self._pinned:
            self._pinned[name] = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        if gradient.device not in self._streams:
            self._streams[gradient.device] = torch.cuda.Stream(gradient.device)
        stream = self._streams[gradient.device]
        stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(stream):
            self._pinned[name].copy_(gradient, non_blocking=True)
        gradient.record_stream(stream)
        return as_array(self._pinned[name])

    def wait(self) -> None:
        """Wait for the copies that have begun."""
        for stream in self._streams.values():
            stream.synchronize()


def assign(tensor: torch.Tensor, array: Array) -> None:
    """Let a tensor that autograd does not follow have the values of an array."""
    if tensor.device.type == "cpu":
        np.copyto(as_array(tensor), array)
    else:
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        np.copyto(as_array(staged), array)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)  # who reads what was there before, on whatever stream
        tensor.copy_(staged)


def digest(*values: Any) -> bytes:
    """What is another one if a number or a tensor among nested values is, on whatever device tensors are."""
    found = hashlib.blake2b()
    for part in _parts(values):
        found.update(part)
    return found.digest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)};".encode()
        yield np.ascontiguousarray(as_array(value)).reshape(-1).view(np.uint8).data
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"{key!r}:".encode()
            yield from _parts(value[key])
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _parts(each)
    else:
        yield f"{value!r};".encode()
