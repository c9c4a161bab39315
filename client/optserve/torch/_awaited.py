"""Parameters that come back from a step while the script goes on: what reads one waits for that one."""

import copy
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from optserve._results import Receipt
from optserve.interop._building import Array
from optserve.torch._tensors import assign

# What asks a parameter for something else than its elements.
_PROPERTIES = (
    "grad",
    "requires_grad",
    "is_leaf",
    "grad_fn",
    "shape",
    "ndim",
    "dtype",
    "device",
    "layout",
    "is_cuda",
    "is_cpu",
)
_METHODS = ("size", "dim", "numel", "stride", "is_contiguous", "element_size", "register_hook")
HARMLESS = {
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(torch.Tensor, name).__set__ for name in ("grad", "requires_grad")),
    torch.Tensor.grad.__delete__,
    *(getattr(torch.Tensor, name) for name in _METHODS),
    torch.Tensor.register_post_accumulate_grad_hook,
}

_arrivals: "weakref.WeakSet[Arrival]" = weakref.WeakSet()
_arrival_of: "weakref.WeakValueDictionary[int, Arrival]" = weakref.WeakValueDictionary()  # by the id of a parameter


class Awaited(torch.nn.Parameter):  # type: ignore[misc]
    """What a parameter is until its elements are there: each torch function that is given one waits for them.

    Reference: `__torch_function__`, https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-python-api.
    """

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        if function not in HARMLESS:
            _wait_for((arguments, options))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(options or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        _wait_for(self)
        return copy.deepcopy(self, memo)  # as what it is now

    def __reduce_ex__(self, protocol: Any) -> Any:
        _wait_for(self)
        return self.__reduce_ex__(protocol)


class Arrival:
    """Parameters on their way back from one step; a listener of it.

    `order` is the order in which they are asked for. With `learns`, parameters stay awaited until they are used, so that
    `used` is the order of that.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], order: Iterable[str], *, learns: bool) -> None:
        self.order = list(order)
        self.used: list[str] = []
        self.learns = learns
        self._tensors = dict(tensors)
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._targets = {name: tensor.detach() for name, tensor in tensors.items()}
        self._changed = threading.Condition()
        self._missing = set(tensors)
        self._receipt: Receipt | None = None
        self._error: BaseException | None = None
        self._over = False
        _arrivals.add(self)
        for tensor in tensors.values():
            torch.autograd.graph.increment_version(tensor)  # who has kept one for a backward to come should hear of it
            _arrival_of[id(tensor)] = self
            tensor.__class__ = Awaited

    def decided(self, receipt: Receipt) -> None:
        """The push has a receipt, after which the step may return; or raise, if it was refused, once that has come here."""
        if receipt.refused:
            return
        with self._changed:
            self._receipt = receipt
            self._changed.notify_all()

    def arrived(self, name: str, array: Array) -> None:
        """Take a parameter over, unless it has come before."""
        if name in self._missing:
            assign(self._targets[name], array)
            self._is_there(name)

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more will come: what has not, is as it was; or can't be had, because of an error."""
        with self._changed:
            self._over, self._error = True, error
            self._changed.notify_all()
        if error is None or self._receipt is None:
            for name in list(self._missing):
                self._is_there(name)

    def receipt(self) -> Receipt | None:
        """Wait for that of the push; raises what was raised instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._receipt is not None or self._over)
        if self._receipt is None and self._error is not None:
            raise self._error
        return self._receipt

    def wait(self, *names: str) -> None:
        """Wait for these parameters, by default for the whole step; raises what keeps them from coming."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or (names and self._missing.isdisjoint(names)))
        if self._error is not None and not self._missing.isdisjoint(names or self._tensors):
            raise self._error

    def use(self, tensor: torch.Tensor) -> None:
        """Wait for a parameter, which is then an ordinary one."""
        name = self._names[id(tensor)]
        self.wait(name)
        self.used.append(name)
        self._restore(name)

    def forget(self) -> None:
        """Await nothing any more: what has not come, is as it was."""
        self.wait_over()
        for name in self._tensors:
            self._restore(name)

    def wait_over(self) -> None:
        """Wait for the end of the step, however it ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._over)

    def _is_there(self, name: str) -> None:
        with self._changed:
            self._missing.discard(name)
            self._changed.notify_all()
        if not self.learns:
            self._restore(name)

    def _restore(self, name: str) -> None:
        tensor = self._tensors[name]
        if type(tensor) is Awaited:
            _arrival_of.pop(id(tensor), None)
            tensor.__class__ = torch.nn.Parameter


def may_be_awaited(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these can be something else for a while: not subclasses, and not where `torch.compile` has compiled anything.

    What it compiles is chosen by the classes of parameters, and would be compiled once more, in pieces.
    """
    compiler = sys.modules.get("torch._dynamo.utils")
    compiled = compiler is not None and compiler.counters["stats"]["unique_graphs"] > 0
    return not compiled and all(type(tensor) is torch.nn.Parameter for tensor in tensors)


def _wait_for(values: Any) -> None:
    """Wait for the awaited parameters among the arguments of a function."""
    if type(values) is Awaited:
        if (arrival := _arrival_of.get(id(values))) is not None:
            arrival.use(values)
        else:  # it has just come
            values.__class__ = torch.nn.Parameter
    elif isinstance(values, tuple | list):
        for value in values:
            _wait_for(value)
    elif isinstance(values, dict):
        for value in values.values():
            _wait_for(value)


def _wait_for_all() -> None:
    for arrival in list(_arrivals):
        arrival.wait_over()


# In a forked process, nobody would bring the rest.
os.register_at_fork(before=_wait_for_all)
