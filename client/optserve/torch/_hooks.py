"""Gradients that are sent while backward is still computing others."""

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from optserve._errors import OptserveError
from optserve._rows import RowSparse
from optserve.interop._building import Array
from optserve.torch._tensors import HostCopies, as_gradient

BUCKET = 4 << 20  # bytes of gradients that are sent together

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes

Stage = Callable[[Mapping[str, Array], Sequence[str]], None]


class Taken(NamedTuple):
    """A gradient as it was after its hook, and what was sent of it, if anything was."""

    gradient: torch.Tensor
    version: int
    checksum: torch.Tensor
    array: Array | None

    @classmethod
    def of(cls, gradient: torch.Tensor, array: Array | None) -> "Taken":
        """A gradient as it is now."""
        return cls(gradient, gradient._version, checksum(gradient), array)

    def is_still(self, gradient: torch.Tensor) -> bool:
        """Whether this is that gradient, with the same elements: not all that writes to tensors counts their versions."""
        same = self.gradient is gradient and self.version == gradient._version
        return same and bool(self.checksum == checksum(gradient))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's memory as integers, modulo 2⁶⁴, where the tensor is: as fast as that can be read."""
    tensor = tensor.detach()
    begin = tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and tensor.nbytes % 8 == begin % 8 == 0:
        return tensor.view(-1).view(torch.int64).sum()
    return tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


class GradientHooks:
    """Stages each gradient once backward has accumulated it, in buckets, which fill in the reverse order of use.

    What a step will have is taken to be what the step before had, from as many backward passes; what was changed there after
    its hook, as by clipping, is taken to be changed again, and not sent. Autograd calls from a thread of each device.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], stage: Stage) -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._paused = False
        self._expected: list[str] = []
        self._steady: set[str] = set()  # what was not changed after its hook
        self._passes = 1
        self._counts: Counter[str] = Counter()
        self._bucket: dict[str, Array] = {}
        self._copies = HostCopies()
        self._taken: dict[str, Taken] = {}
        accumulated = weakref.WeakMethod(self._accumulated)
        self._handles = [
            tensor.register_post_accumulate_grad_hook(functools.partial(_call, accumulated, name))
            for name, tensor in tensors.items()
            if tensor.requires_grad
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send nothing ahead that is accumulated meanwhile."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def pushed(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, Array | RowSparse]:
        """What a step pushes of these gradients; those that were staged, and have changed since, are staged again."""
        with self._lock:
            self._send_bucket()
            taken = {name: self._taken[name] for name in gradients if name in self._taken}
            still = {name for name, each in taken.items() if each.is_still(gradients[name])}
            self._steady = self._steady - set(taken) | still
            staged = {name: each.array for name, each in taken.items() if each.array is not None}
            pushed = {
                name: staged[name] if name in staged and name in still else as_gradient(gradient)
                for name, gradient in gradients.items()
            }
            changed = {
                name: array
                for name, array in pushed.items()
                if name in staged and name not in still and not isinstance(array, RowSparse)
            }
            if changed:
                self._send(changed)
            return pushed

    def accepted(self, pushed: Mapping[str, Array | RowSparse]) -> None:
        """The step was made. The next will be as this was, unless it has gradients of some rows: they are others every time."""
        with self._lock:
            sparse = any(isinstance(array, RowSparse) for array in pushed.values())
            self._expected = [] if sparse else list(pushed)
            self._passes = max(self._counts.values(), default=1)
            self._counts.clear()
            self._taken.clear()

    def remove(self) -> None:
        """Call nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _accumulated(self, name: str, tensor: torch.Tensor) -> None:
        with self._lock:
            if self._paused:
                return
            self._counts[name] += 1
            gradient = tensor.grad
            if gradient is None or gradient.layout != torch.strided or self._counts[name] < self._passes:
                return
            array = None
            if name in self._steady and name in self._expected:
                array = self._bucket[name] = self._copies.begin(name, gradient)
            self._taken[name] = Taken.of(gradient, array)
            if sum(each.nbytes for each in self._bucket.values()) >= BUCKET:
                self._send_bucket()

    def _send_bucket(self) -> None:
        if self._bucket:
            self._copies.wait()
            bucket, self._bucket = self._bucket, {}
            self._send(bucket)

    def _send(self, gradients: Mapping[str, Array]) -> None:
        try:
            self._stage(gradients, self._expected)
        except OptserveError:
            self._expected = []  # send nothing more ahead: of what is wrong the push says the same


def _call(accumulated: "weakref.WeakMethod[Any]", name: str, tensor: torch.Tensor) -> None:
    if (method := accumulated()) is not None:  # the optimizer is still there
        method(name, tensor)
