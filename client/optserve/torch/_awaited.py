"""Parameters that come back from a step while the script goes on: what reads one waits for that one."""

import copy
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._functorch import eager_transforms, vmap

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
_watched: "weakref.WeakSet[Arrival]" = weakref.WeakSet()  # of which some parameters are awaited
_arrival_of: "weakref.WeakValueDictionary[int, Arrival]" = weakref.WeakValueDictionary()  # by the id of a parameter
_failed: "set[Arrival]" = set()  # whose parameters can't be read, until others come
_lock = threading.RLock()  # for whose a parameter is


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
            if _wait_for((arguments, options)):
                return function(*arguments, **(options or {}))  # by what other classes among the arguments say
            _wait_for_all()  # one is where nobody looks
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(options or {}))

    def detach(self) -> torch.Tensor:
        _wait_for(self)
        alike = (
            sys._getframe(1).f_code is torch.nn.Parameter.__new__.__code__
        )  # which asks for what is of the same class
        return torch.nn.Parameter(self, requires_grad=False) if alike else self.detach()

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
        self._awaited = set(tensors)  # what is there, too, but may not have been read
        self._receipt: Receipt | None = None
        self._error: BaseException | None = None
        self._over = False
        _watch(self)
        for tensor in tensors.values():
            torch.autograd.graph.increment_version(tensor)  # who has kept one for a backward to come should hear of it
            with _lock:
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
        if error is None or self._receipt is None:
            for name in list(self._missing):
                self._is_there(name)
        else:
            _failed.add(self)
        with self._changed:
            self._over, self._error = True, error
            self._changed.notify_all()

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
        _failed.discard(self)
        for name in self._tensors:
            self._restore(name)

    def settle(self) -> None:
        """Wait until nothing more will come, and let what has come be ordinary parameters."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._missing)
        for name in self._tensors.keys() - self._missing:
            self._restore(name)

    def wait_over(self, timeout: float | None = None) -> bool:
        """Wait for the end of the step, however it ends, at most some seconds; whether it has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._over, timeout)

    def _is_there(self, name: str) -> None:
        with self._changed:
            self._missing.discard(name)
            self._changed.notify_all()
        if not self.learns:
            self._restore(name)

    def _restore(self, name: str) -> None:
        tensor = self._tensors[name]
        with _lock:
            if type(tensor) is Awaited and _arrival_of.get(id(tensor), self) is self:
                _arrival_of.pop(id(tensor), None)
                tensor.__class__ = torch.nn.Parameter
            self._awaited.discard(name)
            if not self._awaited:
                _watched.discard(self)
                _unwatch()


def may_be_awaited(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these can be something else for a while: not subclasses, and not where `torch.compile` has compiled anything.

    What it compiles is chosen by the classes of parameters, and would be compiled once more, in pieces.
    """
    compiler = sys.modules.get("torch._dynamo.utils")
    compiled = compiler is not None and compiler.counters["stats"]["unique_graphs"] > 0
    return not compiled and all(type(tensor) is torch.nn.Parameter for tensor in tensors)


def _wait_for(values: Any) -> bool:
    """Wait for the awaited parameters among the arguments of a function; whether there are any."""
    if type(values) is Awaited:
        if (arrival := _arrival_of.get(id(values))) is not None:
            arrival.use(values)
        else:  # it has just come
            values.__class__ = torch.nn.Parameter
        return True
    if isinstance(values, dict):
        values = list(values.values())
    found = [_wait_for(value) for value in values] if isinstance(values, tuple | list) else []
    return any(found)


def _wait_for_all(*_: object) -> None:
    for arrival in list(_arrivals):
        arrival.settle()


def _asking(function: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*arguments: Any, **options: Any) -> Any:
        _wait_for((arguments, options))
        return function(*arguments, **options)

    return ask


def _before_forward(module: torch.nn.Module, _: object) -> None:
    """What has a faster way in evaluation takes it only if its parameters' class is the usual one."""
    if isinstance(module, _WITH_FAST_PATHS):
        for parameter in module.parameters():
            _wait_for(parameter)


_WITH_FAST_PATHS = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer)
_DOORS = ((eager_transforms, "_wrap_for_grad"), (eager_transforms, "_wrap_functional_tensor"), (vmap, "_add_batch_dim"))
_closing: list[Callable[[], object]] = []  # what takes back what is done while something is awaited


def _watch(arrival: "Arrival") -> None:
    """While anything is awaited, also let those wait that ask no parameter: torch.func, fast paths, the compiler."""
    with _lock:
        _arrivals.add(arrival)
        _watched.add(arrival)
        weakref.finalize(arrival, _unwatch).atexit = False
        if _closing:
            return
        _closing.append(torch.nn.modules.module.register_module_forward_pre_hook(_before_forward).remove)
        for module, name in _DOORS:
            function = getattr(module, name)
            setattr(module, name, _asking(function))
            _closing.append(functools.partial(setattr, module, name, function))
        if (compiler := sys.modules.get("torch._dynamo.callback")) is not None:
            callbacks = compiler.callback_handler.start_callbacks
            callbacks.append(_wait_for_all)
            _closing.append(lambda: _wait_for_all in callbacks and callbacks.remove(_wait_for_all))


def _unwatch() -> None:
    with _lock:
        while _closing and not _watched:
            _closing.pop()()


# In a forked process, nobody would bring the rest.
os.register_at_fork(before=_wait_for_all)
