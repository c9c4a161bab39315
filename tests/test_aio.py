"""The asyncio client: the same calls, and what becomes of those that are cancelled."""

import asyncio
import contextlib
import inspect
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import optserve
from optserve import Outcome, Sync, aio, optim
from optserve_server import Server

NewId = Callable[[], str]
T = TypeVar("T")

COUNTING = optim.SGD(lr=1.0, maximize=True)  # each push of ones adds one
ONES = {"x": np.ones(4, np.float32)}
ZEROS = {"x": np.zeros(4, np.float32)}
CANCELLED = 1_000


@pytest.fixture(params=["memory", "stream", "shared_memory"])
def connected(request: pytest.FixtureRequest, server: Server) -> Callable[[], aio.Client]:
    """A client on each transport in turn."""
    if request.param == "memory":
        return lambda: aio.Client(":memory:")
    return lambda: aio.Client(server.address, transport=request.param)


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


@pytest.mark.parametrize(("twin", "of"), [(aio.Client, optserve.Client), (aio.ParameterSet, optserve.ParameterSet)])
def test_it_has_the_same_methods_in_the_same_order(twin: type, of: type) -> None:
    assert public(twin) == public(of)


@pytest.mark.parametrize(
    "name", [name for name in public(aio.ParameterSet) if name not in ("identity", "pull", "settle")]
)
def test_a_method_has_the_arguments_of_its_twin(name: str) -> None:
    arguments = [
        list(inspect.signature(getattr(kind, name)).parameters) for kind in (aio.ParameterSet, optserve.ParameterSet)
    ]
    assert arguments[0] == arguments[1]


def test_all_calls_of_a_handle(connected: Callable[[], aio.Client], new_id: NewId) -> None:
    async def main() -> None:
        async with connected() as client:
            weights = await client.create_parameter_set(new_id(), ZEROS, COUNTING, policy=Sync(1))
            assert weights.id in [each.id for each in await client.list_parameter_sets()]
            parameters = await weights.step(ONES)
            np.testing.assert_array_equal(parameters["x"], ONES["x"])
            assert (await weights.push(ONES)).outcome is Outcome.APPLIED
            assert await weights.settle() is None
            pulled = await weights.pull()
            assert pulled is not None
            np.testing.assert_array_equal(pulled["x"], 2 * ONES["x"])
            assert await weights.pull(newer_than=pulled) is None
            assert (await weights.identity).sequence == 2
            assert (await weights.update(lr=2.0)).groups[0].optimizer.lr == 2.0
            assert (await weights.state()).version == (await weights.describe()).position.version == 2
            assert list(await weights.gradient_buffers()) == ["x"]
            async with weights.worker("other") as other:
                assert "other" in [each.client_id for each in await other.workers()]
                await other.step(ONES)
            fork = await weights.fork(new_id())
            assert (await fork.describe()).position.version == 3
            await fork.delete()
            handle = await client.parameter_set(weights.id, client_id="third")
            assert handle.client_id == "third"
            await weights.delete()
            with pytest.raises(optserve.ParameterSetNotFound):
                await handle.pull()

    asyncio.run(main())


def test_errors_are_those_of_the_twin(connected: Callable[[], aio.Client], new_id: NewId) -> None:
    async def main() -> None:
        async with connected() as client:
            weights = await client.create_parameter_set(new_id(), ZEROS, COUNTING)
            with pytest.raises(optserve.TensorMismatch):
                await weights.push({"y": np.ones(4, np.float32)})
            with pytest.raises(optserve.NonFiniteValue):
                await weights.step({"x": np.full(4, np.nan, np.float32)})
            with pytest.raises(optserve.ParameterSetNotFound):
                await client.parameter_set(new_id())

    asyncio.run(main())


def test_tasks_of_a_round_wait_without_blocking_the_loop(server: Server, new_id: NewId) -> None:
    async def main() -> None:
        async with aio.Client(server.address) as client:
            set_id = (await client.create_parameter_set(new_id(), ZEROS, COUNTING, policy=Sync(8))).id
            workers = [await client.parameter_set(set_id) for _ in range(8)]
            stepped = await asyncio.gather(*(worker.step(ONES) for worker in workers))
            assert {each.version for each in stepped} == {1}

    asyncio.run(main())


def test_a_cancelled_call_that_waits_for_others_is_made_once_they_come(server: Server, new_id: NewId) -> None:
    async def main() -> None:
        async with aio.Client(server.address) as client:
            set_id = (await client.create_parameter_set(new_id(), ZEROS, COUNTING, policy=Sync(2))).id
            first, second = await client.parameter_set(set_id), await client.parameter_set(set_id)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(first.step(ONES), 0.05)
            await second.step(ONES)
            receipt = await first.settle()
            assert receipt is not None
            assert (receipt.outcome, receipt.version, receipt.sequence) == (Outcome.APPLIED, 1, 1)
            assert await first.settle() is None

    asyncio.run(main())


def test_what_a_cancelled_call_raised_is_raised_by_settle(server: Server, new_id: NewId) -> None:
    async def main() -> None:
        async with aio.Client(server.address) as client:
            weights = await client.create_parameter_set(new_id(), ZEROS, COUNTING)
            await cancelled(weights.push({"x": np.full(4, np.nan, np.float32)}))
            with pytest.raises(optserve.NonFiniteValue):
                await weights.settle()

    asyncio.run(main())


def test_no_push_of_a_thousand_cancelled_steps_is_lost_or_doubled(
    connected: Callable[[], aio.Client], new_id: NewId
) -> None:
    randomness = random.Random(7)

    async def main() -> None:
        async with connected() as client:
            weights = await client.create_parameter_set(new_id(), ZEROS, COUNTING)
            await weights.step(ONES)
            before = resources()
            for step in range(2, CANCELLED + 2):
                over = await cancelled(weights.step(ONES), turns=randomness.randint(1, 60))
                if over and randomness.random() < 0.3:
                    receipt = await weights.settle()
                    assert receipt is not None
                    assert receipt.sequence == receipt.version == step
            parameters = await weights.pull()
            assert parameters is not None
            assert parameters.version == CANCELLED + 1
            np.testing.assert_array_equal(parameters["x"], (CANCELLED + 1) * ONES["x"])
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert resources() <= before  # less, if an earlier test's have ended meanwhile

    asyncio.run(main())


def test_closing_ends_a_call_that_waits_and_every_thread(server: Server, new_id: NewId) -> None:
    before = set(threading.enumerate())

    async def main() -> None:
        async with aio.Client(server.address) as client:
            weights = await client.create_parameter_set(new_id(), ZEROS, COUNTING, policy=Sync(2))
            step = asyncio.ensure_future(weights.step(ONES))
            while not step.done() and not await weights_waiting(client, weights.id):
                await asyncio.sleep(0)
            await weights.close()
            with pytest.raises(optserve.ClientClosed):
                await step

    asyncio.run(main())
    names = {each.name for each in set(threading.enumerate()) - before}
    assert not any(name.startswith("optserve-worker") for name in names)


async def weights_waiting(client: aio.Client, set_id: str) -> bool:
    """Whether a push of a member waits for others."""
    handle = await client.parameter_set(set_id)
    return any(each.waiting for each in await handle.workers())


async def cancelled(call: Awaitable[Any], turns: int = 1) -> bool:
    """Cancel a call after so many turns of the loop; whether it was not done by then."""
    task = asyncio.ensure_future(call)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return task.cancelled()


def resources() -> Counter[str]:
    """Numbers of open files and of threads."""
    return Counter(files=len(list(Path("/proc/self/fd").iterdir())), threads=threading.active_count())
