"""Policies that change while workers push: nothing is lost, nothing counts twice, nobody hangs."""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import event

import optserve
from direct import all_restored
from equality import assert_same
from optserve import (
    EMA,
    Async,
    BoundedStaleness,
    Buffered,
    ClipGlobalNorm,
    Outcome,
    Policy,
    Sync,
    Transforms,
    aggregation,
    optim,
    staleness,
)
from optserve_server import Config, Server
from optserve_server.engine import aggregation as aggregates
from optserve_server.engine import averages, bases, clipping, mean, pipeline
from optserve_server.engine.parameter_set import ParameterSet

Array = np.ndarray[Any, Any]
PATIENCE = 120.0  # seconds
WORKERS, SIZE = 3, 8

POLICIES: list[Policy] = [
    Async(),
    Sync(WORKERS),
    Sync(deterministic=True),
    Sync(WORKERS, quorum=2, late="carry"),
    BoundedStaleness(1),
    Buffered(pushes=4),
    Buffered(samples=9.0),
]


def every_pair(count: int) -> Iterator[int]:
    """A walk on which each of so many follows each other one, once."""
    for first in range(count):
        for second in range(first + 1, count):
            yield first
            yield second
    yield 0


def await_version(weights: optserve.ParameterSet, version: int) -> int:
    """The version once it is at least that."""
    never = threading.Event()
    while (present := weights.describe().version) < version:
        assert not never.wait(0.002)
    return present


Pushed = tuple[optserve.Receipt, float, Array]


def test_between_all_policies_nothing_is_lost_and_nobody_hangs(tmp_path: Path) -> None:
    """The parameters are the sum of what the receipts say: of the mean of each update. So they are after a restart."""
    walk = list(every_pair(len(POLICIES)))
    assert len(set(pairwise(walk))) == len(POLICIES) * (len(POLICIES) - 1)
    config = Config(listen="127.0.0.1:0", data_dir=tmp_path)
    with Server(config) as server, optserve.Client(server.address, transport="stream") as client:
        weights = client.create_parameter_set(
            "set", {"x": np.zeros(SIZE)}, optim.SGD(lr=1.0, maximize=True), journal="everysec"
        )
        stop = threading.Event()

        def work(number: int) -> list[Pushed]:
            random, pushed = np.random.default_rng(number), []
            with client.parameter_set("set", client_id=f"worker-{number}") as mine:
                mine.pull()
                while not stop.is_set():
                    gradient, samples = random.normal(size=SIZE), float(random.integers(1, 5))
                    receipt = mine.step({"x": gradient}, samples=samples).receipt
                    assert receipt is not None
                    pushed.append((receipt, samples, gradient))
            return pushed

        with ThreadPoolExecutor(WORKERS) as pool:
            working = [pool.submit(work, number) for number in range(WORKERS)]
            version = 0
            for each in walk:
                weights.update(policy=POLICIES[each])
                version = await_version(weights, version + 2)
            stop.set()
            pushed = [each for worker in working for each in worker.result(PATIENCE)]
        assert weights.describe().policy == Async()
        end = weights.pull()
        np.testing.assert_allclose(end["x"], sum_of_means(pushed, end.version), rtol=0, atol=1e-9)
        (ours,) = server._engine.list()
        server.stop()
        (theirs,) = all_restored(tmp_path)
        assert_same(ours, theirs)


def sum_of_means(pushed: list[Pushed], version: int) -> Array:
    """The parameters, if each push is in the update that its receipt says, weighted by samples; or too late for any."""
    updates: dict[int, list[Pushed]] = defaultdict(list)
    for each in pushed:
        receipt = each[0]
        if receipt.outcome is Outcome.DISCARDED:
            assert receipt.refusal is not None
            assert "round that is over" in receipt.refusal.message
        else:
            assert receipt.outcome in (Outcome.APPLIED, Outcome.ACCUMULATED), receipt
            updates[receipt.version + (receipt.outcome is Outcome.ACCUMULATED)].append(each)
    assert sorted(updates) == list(range(1, version + 1))
    total = np.zeros(SIZE)
    for together in updates.values():
        total += np.average([g for _, _, g in together], axis=0, weights=[n for _, n, _ in together])
    return total


FRESH = [
    (aggregates, "sorted_mean_loop"),
    (aggregates, "distances_loop"),
    (averages, "blend_loop"),
    (bases, "step_loop"),
    (clipping, "guard_loop"),
    (mean, "compensated_mean_loop"),
    (mean, "mean_loop"),
    (mean, "scale_loop"),
    (pipeline, "guard_loop"),
]


class Compiled(event.Listener):  # type: ignore[misc]
    """Takes note of what is compiled while a set is locked, so that all its workers wait for it."""

    def __init__(self) -> None:
        self.watched: ParameterSet | None = None
        self.loops: list[str] = []

    def on_start(self, event: Any) -> None:
        if self.watched is not None and self.watched._lock.locked():
            self.loops.append(event.data["dispatcher"].py_func.__qualname__)

    def on_end(self, event: Any) -> None:
        pass


def test_nobody_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch, new_id: Callable[[], str]) -> None:
    """What a policy needs is compiled when the set is created or, after a change, before the first push is let in."""
    loops: dict[str, Any] = {}
    for module, name in FRESH:
        monkeypatch.setattr(module, name, loops.setdefault(name, functools.cache(getattr(module, name).__wrapped__)))
    policies: list[tuple[Policy, int]] = [
        (Async(staleness=staleness.GapAware()), 1),
        (Async(staleness=staleness.DelayCompensation()), 1),
        (Buffered(samples=3.0), 1),
        (Sync(3, aggregation=aggregation.Krum(0)), 3),
    ]
    transforms = Transforms(clip=ClipGlobalNorm(1.0), average=EMA(0.9))
    compiled = Compiled()
    with optserve.Client(":memory:") as client, event.install_listener("numba:compile", compiled):
        weights = client.create_parameter_set(new_id(), {"x": np.zeros(3)}, optim.SGD(), transforms=transforms)
        compiled.watched = client._transport._engine.get(weights.id)  # type: ignore[attr-defined]
        with ThreadPoolExecutor(3) as pool:
            for policy, workers in policies:
                weights.update(policy=policy)
                handles = [client.parameter_set(weights.id, client_id=f"worker-{k}") for k in range(workers)]
                for handle in handles:
                    handle.pull()
                for _ in range(2):
                    pushes = [pool.submit(handle.push, {"x": np.ones(3)}, samples=1.7) for handle in handles]
                    for each in pushes:
                        each.result(PATIENCE)
    assert compiled.loops == []
    assert all(each.cache_info().currsize for each in loops.values())
