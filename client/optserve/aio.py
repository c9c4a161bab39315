"""The client for asyncio: the same calls by the same names, to be awaited.

    async with optserve.aio.Client("localhost:50051") as client:
        weights = await client.create_parameter_set("model", parameters, optim.AdamW())
        parameters = await weights.step(gradients)

A handle's calls run in a thread of its own, one after the other; the loop is never blocked. A call that is cancelled, as by
`asyncio.wait_for`, is not taken back: its push is made all the same, once, under the identity that it has, and the next call
of the handle waits for that. `settle` says what became of it.
"""

import asyncio
import functools
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import optserve
from optserve._client import DEFAULT_TIMEOUT
from optserve._errors import OutcomeUnknown
from optserve._identity import Identity
from optserve._results import Parameters, Position, Receipt, Summary

__all__ = ["Client", "ParameterSet"]

P = ParamSpec("P")
T = TypeVar("T")


def _twin(
    method: Callable[Concatenate[optserve.ParameterSet, P], T],
) -> Callable[Concatenate["ParameterSet", P], Coroutine[Any, Any, T]]:
    """The same method, to be awaited."""

    @functools.wraps(method)
    async def call(self: "ParameterSet", /, *arguments: P.args, **options: P.kwargs) -> T:
        return await self._run(functools.partial(method, self._weights, *arguments, **options))

    return call


def _pushing(
    method: Callable[Concatenate[optserve.ParameterSet, P], T],
) -> Callable[Concatenate["ParameterSet", P], Coroutine[Any, Any, T]]:
    """Likewise of a push, which `settle` knows of if it is cancelled."""

    @functools.wraps(method)
    async def call(self: "ParameterSet", /, *arguments: P.args, **options: P.kwargs) -> T:
        self._cancelled = None
        pushed = self._thread.submit(functools.partial(method, self._weights, *arguments, **options))
        try:
            return await _awaited(pushed)
        except asyncio.CancelledError:
            self._cancelled = pushed
            raise

    return call


def _handing_out(
    method: Callable[Concatenate[optserve.Client, P], optserve.ParameterSet],
) -> Callable[Concatenate["Client", P], Coroutine[Any, Any, "ParameterSet"]]:
    """Likewise of one that gives a handle."""

    @functools.wraps(method)
    async def call(self: "Client", /, *arguments: P.args, **options: P.kwargs) -> ParameterSet:
        weights = ParameterSet(await _in_a_thread(functools.partial(method, self._client, *arguments, **options)))
        self._handles.add(weights)
        return weights

    return call


async def _awaited(future: "Future[T]") -> T:
    """What a thread's call gives; it goes on if this is cancelled."""
    return await _shielded(asyncio.wrap_future(future))


async def _in_a_thread(call: Callable[[], T]) -> T:
    return await _shielded(asyncio.get_running_loop().run_in_executor(None, call))


async def _shielded(future: asyncio.Future[T]) -> T:
    future.add_done_callback(_retrieved)
    return await asyncio.shield(future)


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Look at an error that nobody would see if who waits for it is cancelled."""
    if not future.cancelled():
        future.exception()


class ParameterSet:
    """An `optserve.ParameterSet` whose calls are awaited. Get one from `Client`; tasks may share it, and take turns."""

    def __init__(self, weights: optserve.ParameterSet) -> None:
        self._weights = weights
        self._thread = ThreadPoolExecutor(1, f"optserve-{weights.client_id}")
        self._cancelled: Future[Any] | None = None  # the push whose call was cancelled last
        self.id = weights.id
        self.client_id = weights.client_id

    def __repr__(self) -> str:
        return f"aio.{self._weights!r}"

    @property
    def identity(self) -> Awaitable[Identity]:
        """As `optserve.ParameterSet.identity`: `await weights.identity`."""
        return self._run(lambda: self._weights.identity)

    step = _pushing(optserve.ParameterSet.step)
    push = _pushing(optserve.ParameterSet.push)

    async def pull(self, *, newer_than: int | Position | Parameters | None = None, **options: Any) -> Parameters | None:
        """As `optserve.ParameterSet.pull`, whose other arguments it takes; None only if nothing is newer."""
        return await self._run(functools.partial(self._weights.pull, newer_than=newer_than, **options))

    stage = _twin(optserve.ParameterSet.stage)
    gradient_buffers = _twin(optserve.ParameterSet.gradient_buffers)

    async def settle(self) -> Receipt | None:
        """What became of the push of the call that was cancelled last, or as `optserve.ParameterSet.settle`.

        Raises what that call would have raised.
        """
        if (cancelled := self._cancelled) is not None:
            try:
                pushed = await _awaited(cancelled)
            except OutcomeUnknown:
                self._cancelled = None
            else:
                self._cancelled = None
                return pushed.receipt if isinstance(pushed, Parameters) else pushed
        return await self._run(self._weights.settle)

    update = _twin(optserve.ParameterSet.update)
    describe = _twin(optserve.ParameterSet.describe)

    def worker(self, client_id: str | None = None, *, identity: Identity | None = None) -> "ParameterSet":
        """As `optserve.ParameterSet.worker`: `async with weights.worker("gpu-3") as worker:`."""
        return ParameterSet(self._weights.worker(client_id, identity=identity))

    workers = _twin(optserve.ParameterSet.workers)
    barrier = _twin(optserve.ParameterSet.barrier)
    state = _twin(optserve.ParameterSet.state)
    checkpoint = _twin(optserve.ParameterSet.checkpoint)
    rewind = _twin(optserve.ParameterSet.rewind)

    async def fork(
        self, id: str, version: int | None = None, optimizer: optserve.optim.Optimizer | None = None
    ) -> "ParameterSet":
        """As `optserve.ParameterSet.fork`."""
        return ParameterSet(await self._run(functools.partial(self._weights.fork, id, version, optimizer)))

    delete = _twin(optserve.ParameterSet.delete)

    async def close(self) -> None:
        """End this handle's stream, and with it a call that another task waits for."""

        def end() -> None:
            self._weights.close()
            self._thread.shutdown()

        await _in_a_thread(end)

    async def __aenter__(self) -> Self:
        await self._run(self._weights.__enter__)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _run(self, call: Callable[[], T]) -> T:
        return await _awaited(self._thread.submit(call))


class Client:
    """An `optserve.Client` whose calls are awaited, with the same arguments."""

    def __init__(
        self, address: str | Sequence[str], *, timeout: float = DEFAULT_TIMEOUT, transport: str = "auto"
    ) -> None:
        self._client = optserve.Client(address, timeout=timeout, transport=transport)
        self._handles: weakref.WeakSet[ParameterSet] = weakref.WeakSet()
        self.address = self._client.address

    def __repr__(self) -> str:
        return f"aio.{self._client!r}"

    create_parameter_set = _handing_out(optserve.Client.create_parameter_set)
    parameter_set = _handing_out(optserve.Client.parameter_set)

    async def list_parameter_sets(self) -> list[Summary]:
        """As `optserve.Client.list_parameter_sets`."""
        return await _in_a_thread(self._client.list_parameter_sets)

    async def close(self) -> None:
        """Close every handle and the connection."""
        for handle in list(self._handles):
            await handle.close()
        await _in_a_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
