"""Members over the wire: who is there, who is waited for and for how long, and what becomes of those who come back."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import optserve
from optserve import Async, BoundedStaleness, Identity, Outcome, Sync, optim
from optserve_server import Config, Server
from puppet import puppet

NewId = Callable[[], str]
PATIENCE = 60.0  # seconds
LEASE = 1.5  # seconds
START = {"x": np.zeros((), np.float64)}
ONE = {"x": np.ones((), np.float64)}


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    """A server that soon counts as gone who says nothing."""
    with Server(Config(listen="127.0.0.1:0", lease=LEASE)) as server:
        yield server


@pytest.fixture(scope="module")
def patient() -> Iterator[Server]:
    """A server that never does within a test."""
    with Server(Config(listen="127.0.0.1:0", lease=3600)) as server:
        yield server


@pytest.fixture
def here(mortal: Server) -> Iterator[optserve.Client]:
    """A client of the first."""
    with optserve.Client(mortal.address, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def there(patient: Server) -> Iterator[optserve.Client]:
    """A client of the second."""
    with optserve.Client(patient.address, timeout=PATIENCE) as client:
        yield client


def until(condition: Callable[[], bool]) -> None:
    """Look until something is so."""
    never, end = threading.Event(), time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to be so"
        never.wait(0.005)


def names(weights: optserve.ParameterSet) -> list[str]:
    """The members of a set."""
    return [worker.client_id for worker in weights.workers()]


def waiting(weights: optserve.ParameterSet) -> list[str]:
    """Those that wait for others."""
    return [worker.client_id for worker in weights.workers() if worker.waiting]


def created(client: optserve.Client, set_id: str, policy: optserve.Policy) -> optserve.ParameterSet:
    """A set of one number, with a handle that is no member."""
    return client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=policy)


def test_workers_see_each_other(there: optserve.Client, new_id: NewId) -> None:
    weights = created(there, new_id(), Async())
    assert weights.workers() == []
    with weights.worker("early") as early, weights.worker("other"):
        early.pull()
        early.push(ONE)
        early.push(ONE)
        named = there.parameter_set(weights.id, client_id="by-its-first-push")
        named.pull()
        assert names(weights) == ["early", "other"]
        named.push(ONE)
        first, second, third = early.workers()
        assert (first.client_id, first.pushes, first.staleness) == ("by-its-first-push", 1, 0)
        assert (second.client_id, second.pushes, second.staleness) == ("early", 2, 1)
        assert (third.client_id, third.pushes, third.staleness) == ("other", 0, None)
        assert third.join_time <= first.join_time
        assert 0 <= third.idle < math.inf


def test_heartbeats_keep_the_idle(here: optserve.Client, mortal: Server, new_id: NewId) -> None:
    weights = created(here, new_id(), Async())
    with weights.worker("idle"), puppet(mortal.address, weights.id, "also-idle"):
        assert names(weights) == ["also-idle", "idle"]
        joined = [worker.join_time for worker in weights.workers()]
        begin = time.monotonic()
        while time.monotonic() < begin + 3 * LEASE:
            assert [worker.join_time for worker in weights.workers()] == joined


def test_nobody_waits_for_a_killed_worker_longer_than_its_lease(
    here: optserve.Client, mortal: Server, new_id: NewId
) -> None:
    weights = created(here, new_id(), Sync(2))
    with weights.worker("alive") as alive, puppet(mortal.address, weights.id, "doomed") as doomed:
        doomed.begin("push", 3)
        assert alive.step(ONE)["x"] == -2
        assert doomed.answer()["outcome"] == "APPLIED"
        doomed.signal(signal.SIGKILL)
        assert alive.step(ONE)["x"] == -3  # long before the deadline
        assert names(weights) == ["alive"]
        with ThreadPoolExecutor(1) as pool, weights.worker("next"):
            step = pool.submit(alive.step, ONE)
            until(lambda: waiting(weights) == ["alive"])
            with puppet(mortal.address, weights.id, "next") as replacement:
                assert replacement.do("push", 5)["version"] == 3
            assert step.result(PATIENCE)["x"] == -6


def test_a_stopped_worker_is_dropped_and_takes_part_again(here: optserve.Client, mortal: Server, new_id: NewId) -> None:
    weights = created(here, new_id(), Sync())
    with weights.worker("alive") as alive, puppet(mortal.address, weights.id, "slow") as slow:
        assert slow.do("pull") == {"version": 0, "x": 0.0}
        slow.signal(signal.SIGSTOP)
        slow.begin("push", 100)
        assert alive.step(ONE)["x"] == -1
        assert names(weights) == ["alive"]
        slow.signal(signal.SIGCONT)
        assert slow.answer() == {"outcome": "DISCARDED", "version": 1, "reason": "TOO_STALE"}
        assert names(weights) == ["alive", "slow"]
        assert slow.do("pull") == {"version": 1, "x": -1.0}
        slow.begin("push", 3)
        assert alive.step(ONE)["x"] == -3
        assert slow.answer() == {"outcome": "APPLIED", "version": 2, "reason": None}


def test_what_leaves_is_waited_for_no_more(there: optserve.Client, new_id: NewId) -> None:
    weights = created(there, new_id(), Sync())
    with ThreadPoolExecutor(1) as pool, weights.worker("stays") as stays:
        with weights.worker("goes"):
            step = pool.submit(stays.step, ONE)
            until(lambda: waiting(weights) == ["stays"])
            assert names(weights) == ["goes", "stays"]
        assert names(weights) == ["stays"]
        assert step.result(PATIENCE).version == 1


def test_a_client_that_closes_leaves(there: optserve.Client, patient: Server, new_id: NewId) -> None:
    weights = created(there, new_id(), Async())
    with optserve.Client(patient.address) as client:
        handle = client.parameter_set(weights.id, client_id="by-its-first-push")
        handle.push(ONE)
        worker = handle.worker("by-its-name")
        worker.push(ONE)
        assert names(weights) == ["by-its-first-push", "by-its-name"]
    assert names(weights) == []


def test_without_a_lease_who_closes_leaves(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = created(memory_client, new_id(), Sync())
    with ThreadPoolExecutor(1) as pool, weights.worker("stays") as stays:
        with weights.worker("goes"):
            step = pool.submit(stays.step, ONE)
            until(lambda: waiting(weights) == ["stays"])
        assert step.result(PATIENCE).version == 1


def test_an_older_handle_does_not_take_its_successor_with_it(
    there: optserve.Client, patient: Server, new_id: NewId
) -> None:
    weights = created(there, new_id(), Async())
    with optserve.Client(patient.address) as client:
        client.parameter_set(weights.id, client_id="worker").push(ONE)
        successor = there.parameter_set(weights.id, client_id="worker")
        successor.push(ONE)
    assert names(weights) == ["worker"]


def test_a_barrier_opens_when_the_last_comes(there: optserve.Client, new_id: NewId) -> None:
    weights = created(there, new_id(), Async())
    with weights.worker("a") as a, weights.worker("b") as b, weights.worker("c") as c, ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            others = [pool.submit(a.barrier), pool.submit(b.barrier)]
            until(lambda: waiting(weights) == ["a", "b"])
            assert not any(each.done() for each in others)
            c.barrier()
            for each in others:
                each.result(PATIENCE)


def test_a_barrier_shrinks(here: optserve.Client, mortal: Server, new_id: NewId) -> None:
    weights = created(here, new_id(), Async())
    with weights.worker("a") as a, puppet(mortal.address, weights.id, "b") as b, ThreadPoolExecutor(1) as pool:
        with weights.worker("c"):
            barrier = pool.submit(a.barrier)
            until(lambda: waiting(weights) == ["a"])
            b.signal(signal.SIGKILL)
            until(lambda: names(weights) == ["a", "c"])
            assert not barrier.done()
        barrier.result(PATIENCE)
        assert names(weights) == ["a"]


def test_a_barrier_of_the_living_is_not_held_up_by_one_whose_lease_has_ended_before(
    here: optserve.Client, mortal: Server, new_id: NewId
) -> None:
    weights = created(here, new_id(), Async())
    with puppet(mortal.address, weights.id, "gone"):
        session = mortal._engine.get(weights.id)._members._members["gone"].session
    until(lambda: time.monotonic() > session.seen + LEASE)
    weights.barrier()
    assert len(weights.workers()) == 1


def test_who_comes_late_waits_at_the_next_barrier(there: optserve.Client, new_id: NewId) -> None:
    weights = created(there, new_id(), Async())
    late = there.parameter_set(weights.id, client_id="late")
    late.pull()  # so that it knows of no barrier
    with weights.worker("early") as early, ThreadPoolExecutor(1) as pool:
        early.barrier()
        early.barrier()
        barrier = pool.submit(late.barrier)
        until(lambda: waiting(weights) == ["late"])
        early.barrier()
        barrier.result(PATIENCE)


def test_a_barrier_says_so_at_its_deadline(there: optserve.Client, patient: Server, new_id: NewId) -> None:
    weights = created(there, new_id(), Sync(deadline=0.2))
    with (
        weights.worker("absent"),
        optserve.Client(patient.address, timeout=0.5) as client,
        client.parameter_set(weights.id, client_id="there") as there_alone,
        pytest.raises(
            optserve.RoundIncomplete, match="all 2 members at a barrier within 0.2 s; 1 did not come, of 'absent'"
        ),
    ):
        there_alone.barrier()


def test_who_is_killed_and_comes_back_goes_on_exactly_once(
    here: optserve.Client, mortal: Server, new_id: NewId
) -> None:
    weights = created(here, new_id(), Sync(2))
    with weights.worker("alive") as alive, ThreadPoolExecutor(1) as pool:
        with puppet(mortal.address, weights.id, "killed") as killed:
            identity = Identity(**killed.do("identity"))
            killed.begin("push", 3)
            until(lambda: waiting(weights) == ["killed"])
        again = here.parameter_set(weights.id, identity=identity)
        repeated = pool.submit(again.push, {"x": np.float64(3)})  # waits: what it pushed before is in the round
        assert alive.step(ONE)["x"] == -2
        receipt = repeated.result(PATIENCE)
        assert (receipt.duplicate, receipt.outcome, receipt.version) == (True, Outcome.APPLIED, 1)
        again.pull()
        step = pool.submit(again.step, ONE)
        assert alive.step(ONE)["x"] == step.result(PATIENCE)["x"] == -3
        assert names(weights) == ["alive", "killed"]


def test_nobody_is_further_ahead_than_the_bound_of_one_who_lives(
    here: optserve.Client, mortal: Server, new_id: NewId
) -> None:
    weights = created(here, new_id(), BoundedStaleness(1))
    with weights.worker("fast") as fast, puppet(mortal.address, weights.id, "slow") as slow:
        assert slow.do("push", 1)["version"] == 1
        assert fast.step(ONE).version == 2
        assert fast.step(ONE).version == 3
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(fast.step, ONE)
            until(lambda: waiting(weights) == ["fast"])
            assert weights.pull().version == 4
            assert not step.done()
            slow.do("push", 1)
            assert step.result(PATIENCE).version == 5
        slow.signal(signal.SIGKILL)
        assert fast.step(ONE).version == 6
        assert names(weights) == ["fast"]


def test_who_is_too_slow_is_dismissed_and_what_it_pushes_then_is_discarded(
    there: optserve.Client, new_id: NewId
) -> None:
    weights = created(there, new_id(), BoundedStaleness(1, deadline=0.3))
    with weights.worker("slow") as slow, weights.worker("fast") as fast:
        slow.pull()
        fast.step(ONE)
        assert names(weights) == ["fast", "slow"]
        fast.step(ONE)
        assert names(weights) == ["fast"]
        receipt = slow.push(ONE)
        assert (receipt.outcome, receipt.version, receipt.staleness) == (Outcome.DISCARDED, 2, 2)
        slow.pull()
        assert slow.push(ONE).applied
        assert names(weights) == ["fast", "slow"]
