"""Pushes that wait together are applied in one pass, and nobody can tell: bits, versions and receipts are those of turns."""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import optserve
from direct import DirectSet
from optimizer_table import ROWS
from optserve import Position, Receipt, TensorSpec, optim
from optserve._codecs import codec
from optserve._specification import Run
from optserve._wire import pack
from optserve.formats import BFloat16, Format, Int8
from optserve_server import Server
from optserve_server.engine import threads
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared
from optserve_server.engine.rules import Rule, rule_for
from optserve_server.engine.sessions import Session
from optserve_server.engine.snapshot import Snapshot
from optserve_server.engine.state import State
from optserve_server.engine.threads import INLINE, STRIP, Ranges, Threads, split_in_order

Array = np.ndarray[Any, Any]
PATIENCE = 30.0  # seconds for threads to get where they wait

# A row of each rule for single elements. The others take their pushes one at a time.
ELEMENTWISE = {rule: name for name, row in ROWS.items() if isinstance(rule := rule_for(row.optimizer), Rule)}


@dataclass(frozen=True)
class Pushed:
    """What a worker pushes."""

    gradients: Mapping[str, Array]
    format: Format | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Worker:
    """A session on a set of the engine."""

    def __init__(self, direct: DirectSet, name: str) -> None:
        self._direct = direct
        self._session: Session = direct.set.open(name, 0, self)
        self._sequence = 0
        self.held: Snapshot | None = None

    def read(self) -> None:
        """Hold the current version, until a push is applied."""
        self.held = self._direct.set.snapshot()

    def release(self, snapshot: Snapshot | None) -> None:
        """Let go of a version."""
        if snapshot is not None:
            self._direct.set.release(snapshot)

    def push(self, pushed: Pushed, *, again: bool = False) -> tuple[Receipt, Snapshot | None]:
        """Apply a push under the next sequence, or the last one again; the snapshot is pinned."""
        self._sequence += not again
        declared = [
            Declared(TensorSpec.of(name, array), format=pushed.format) for name, array in pushed.gradients.items()
        ]
        base = Position(incarnation=1, version=0)
        push = self._direct.set.begin(self._sequence, declared, base=base, changes=pushed.changes)
        arrays = pushed.gradients.values()
        if pushed.format is None:
            tensors = ((k, array.reshape(-1).view(np.uint8).data, array.itemsize) for k, array in enumerate(arrays))
            for payload in pack(tensors, self._direct.chunk_bytes):
                push.add(payload.runs, payload.buffer, replace=False)
        else:
            runs = [Run(k, 0, array.size) for k, array in enumerate(arrays)]
            push.add(runs, b"".join(encoded(array, pushed.format) for array in arrays), replace=False)
        push.finish()
        return self._direct.set.push(self._session, self, push, pull=True, held=self.held)


def encoded(array: Array, format: Format) -> bytes:
    """A gradient as it travels."""
    out = np.empty(format.encoded_size(array.size), np.uint8)
    codec(format).encode(array.reshape(-1), None, None, out)
    return out.tobytes()


def push_together(
    parameter_set: ParameterSet, calls: Sequence[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """The results of calls that each push, all of which wait at the set's lock before the first is applied."""
    batches: list[int] = []
    apply = parameter_set._apply

    def counted(commits: Sequence[Any]) -> None:
        batches.append(len(commits))
        apply(commits)

    waiting = threading.Event()
    with ThreadPoolExecutor(len(calls)) as pool, monkeypatch.context() as patch:
        patch.setattr(parameter_set, "_apply", counted)
        with parameter_set._lock:
            futures = [pool.submit(call) for call in calls]
            for _ in range(int(PATIENCE / 0.001)):
                if len(parameter_set._commits) == len(calls) or waiting.wait(0.001):
                    break
            assert len(parameter_set._commits) == len(calls)
        results = [future.result() for future in futures]
    if parameter_set.spec.holds is optserve.Holds.PARAMETERS:
        assert batches == [len(calls)]
    return results


def in_turn(receipts: Sequence[Receipt]) -> list[int]:
    """Which came first: indices in the order of versions; what was refused came after the update that it saw."""
    return sorted(range(len(receipts)), key=lambda k: (receipts[k].version, not receipts[k].applied))


def assert_same_state(left: State, right: State) -> None:
    """Parameters, slots, steps, memory and hyperparameters."""
    assert left.position == right.position
    assert left.optimizers == right.optimizers
    assert left.arenas.keys() == right.arenas.keys()
    for name, arena in left.arenas.items():
        for compute, array in arena.items():
            assert array.tobytes() == right.arenas[name][compute].tobytes(), name
    np.testing.assert_array_equal(left.progress.steps, right.progress.steps)
    assert left.progress.memory == right.progress.memory


def normal(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
    return np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def some_pushes(start: Mapping[str, Array], count: int, randomness: random.Random) -> list[Pushed]:
    """Of different tensors, some as bfloat16 or int8, some with a new learning rate, some to be refused."""
    pushes = []
    for seed in range(count):
        names = randomness.sample(list(start), randomness.randint(1, len(start)))
        gradients = {name: normal(start[name].shape, start[name].dtype, seed) for name in names}
        single = all(array.dtype == np.float32 for array in gradients.values())
        chosen = randomness.random()
        if chosen < 0.15:
            gradients[names[0]].reshape(-1)[-1] = np.nan
        changes: dict[str, dict[str, Any]] = {}
        if 0.15 < chosen < 0.4:
            changes = {"default": {"lr": 0.01 * seed}}
        elif 0.4 < chosen < 0.5:
            changes = {"default": {"lr": -1.0}}
        format = randomness.choice([None, None, BFloat16(), Int8()]) if single else None
        pushes.append(Pushed(gradients, format, changes))
    return pushes


def assert_together_is_in_turn(
    start: Mapping[str, Array],
    optimizer: optim.Optimizer,
    pushes: Sequence[Pushed],
    monkeypatch: pytest.MonkeyPatch,
    *,
    read: bool = False,
    **options: Any,
) -> None:
    """The same pushes by the same workers, on one set together and on another in turn.

    Every worker has pushed something before; the first sends that again instead. With `read`, the others hold the version
    before, and those whose pushes are refused go on holding it.
    """
    together, turns = DirectSet(start, optimizer, **options), DirectSet(start, optimizer, **options)
    workers, twins = ([Worker(each, f"worker-{k}") for k in range(len(pushes))] for each in (together, turns))
    before = [Pushed({name: np.ones_like(array) for name, array in start.items()})] * len(pushes)
    for worker, twin, pushed in zip(workers, twins, before, strict=True):
        for each in (worker, twin):
            each.release(each.push(pushed)[1])
    version, values = together.set.position.version, bits(together.pull())
    for worker in workers[1:] if read else ():
        worker.read()
    pushes = [before[0], *pushes[1:]]
    calls = [
        (lambda worker=worker, pushed=pushed, k=k: worker.push(pushed, again=k == 0))
        for k, (worker, pushed) in enumerate(zip(workers, pushes, strict=True))
    ]
    results = push_together(together.set, calls, monkeypatch)
    receipts = [receipt for receipt, _ in results]
    assert receipts[0].duplicate
    applied = sorted(receipt.version for receipt in receipts[1:] if receipt.applied)
    assert applied == list(range(version + 1, version + 1 + len(applied)))
    for k in in_turn(receipts):
        expected, snapshot = twins[k].push(pushes[k], again=k == 0)
        assert receipts[k] == expected
        twins[k].release(snapshot)
    assert_same_state(together.set.capture(), turns.set.capture())
    for worker, (receipt, snapshot) in zip(workers, results, strict=True):
        assert (snapshot is not None) == receipt.applied
        if snapshot is not None:
            assert snapshot.position == together.set.position
            assert content(together, snapshot) == bits(turns.pull())
        elif worker.held is not None:
            assert content(together, worker.held) == values
        worker.release(snapshot)
        worker.release(worker.held)
    buffers = together.set._buffers
    assert [buffer.pins for buffer in (buffers.current, *buffers._others)] == [0] * len(buffers.memories)


def content(direct: DirectSet, snapshot: Snapshot) -> dict[str, bytes]:
    """The bits of a snapshot of a set."""
    return {spec.name: data.tobytes() for spec, data in zip(direct.set.spec.tensors, snapshot.data, strict=True)}


def bits(tensors: Mapping[str, Array]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.parametrize(("name", "read"), [(name, k % 2 == 0) for k, name in enumerate(ELEMENTWISE.values())])
def test_pushes_that_wait_together_give_what_they_give_in_turn(
    name: str, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every rule that shares a pass: several tensors, several dtypes, refusals, a duplicate, new learning rates."""
    randomness = random.Random(name)
    start = {
        "vector": normal((300,), "float32", 1),
        "scalar": normal((), "float32", 2),
        "matrix": normal((20, 5), ml_dtypes.bfloat16, 3),
    }
    pushes = some_pushes(start, randomness.randint(2, 16), randomness)
    assert_together_is_in_turn(start, ROWS[name].optimizer, pushes, monkeypatch, read=read)


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["nesterov-decay", "adam"])
def test_large_pushes_that_wait_together_give_what_they_give_in_turn(
    name: str, count: int, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two and three threads, in pieces, with gradients as float32, bfloat16 and int8 in the same pass."""
    start = {
        "large": normal((2 * INLINE + STRIP // 2 + 77,), "float32", 1),
        "small": normal((5,), "float32", 2),
        "doubles": normal((INLINE + 1,), "float64", 3),
        "halves": normal((STRIP + 3,), "float16", 4),
    }
    of = lambda seed, *names: {name: normal(start[name].shape, start[name].dtype, seed) for name in names}  # noqa: E731
    pushes = [
        Pushed({}),  # in its place comes a duplicate
        Pushed(of(10, "large", "doubles")),
        Pushed(of(11, "large", "small"), BFloat16()),
        Pushed(of(12, *start), changes={"default": {"lr": 0.5}}),
        Pushed(of(13, "small", "large"), BFloat16()),
        Pushed({"large": np.full(start["large"].shape, np.inf, np.float32)}),
        Pushed(of(14, "halves", "large")),
        Pushed(of(15, "small", "large"), Int8()),
        Pushed(of(16, "large"), Int8()),
    ]
    assert_together_is_in_turn(
        start, ROWS[name].optimizer, pushes, monkeypatch, read=read, threads=count, chunk_bytes=1 << 16
    )


@pytest.mark.parametrize("holds", ["parameters", "moments"])
@pytest.mark.parametrize("size", [100, 3 * INLINE])
@pytest.mark.parametrize("transport", ["stream", "shared_memory"])
def test_steps_over_the_wire_that_wait_together_are_those_of_turns(
    transport: str,
    size: int,
    holds: str,
    server: Server,
    memory_client: optserve.Client,
    new_id: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a set that holds moments only, each worker gets the updates of its own push."""
    start, workers = {"x": normal((size,), "float32", 0), "y": normal((), "float32", 0)}, 8
    gradients = [
        {name: normal(array.shape, array.dtype, seed) for name, array in start.items()} for seed in range(workers)
    ]
    with optserve.Client(server.address, transport=transport) as client:
        weights = client.create_parameter_set(new_id(), start, optim.Adam(lr=0.1), holds=holds)
        twin = memory_client.create_parameter_set(new_id(), start, optim.Adam(lr=0.1), holds=holds)
        handles = [client.parameter_set(weights.id) for _ in range(workers)]
        for handle in handles:
            handle.gradient_buffers()  # opens its stream
        steps = [
            (lambda handle=handle, gradient=gradient: handle.step(gradient))
            for handle, gradient in zip(handles, gradients, strict=True)
        ]
        results = push_together(server._engine.get(weights.id), steps, monkeypatch)
        receipts = [params.receipt for params in results]
        order = in_turn(receipts)
        assert [receipts[k].version for k in order] == list(range(1, workers + 1))
        for k in order:
            expected = twin.step(gradients[k])
            assert receipts[k].gradient_norm == expected.receipt.gradient_norm
            if holds == "moments":
                assert bits(results[k]) == bits(expected)
        if holds == "parameters":
            assert [bits(params) for params in results] == [bits(twin.pull())] * workers


def test_threads_that_push_as_they_like_lose_nothing(client: optserve.Client, new_id: Callable[[], str]) -> None:
    """Bursts of unequal length, with refusals in between: every receipt is its own, every version is given once."""
    workers, size = 8, 3 * INLINE
    weights = client.create_parameter_set(
        new_id(), {"x": np.zeros(size, np.float32), "y": np.zeros(workers)}, optim.SGD(lr=1.0, maximize=True)
    )
    together = threading.Barrier(workers)

    def work(worker: int) -> list[int]:
        randomness, versions = random.Random(worker), []
        with client.parameter_set(weights.id) as mine:
            together.wait()
            for _ in range(10):
                own = np.zeros(workers)
                own[worker] = 1 if randomness.random() < 0.8 else np.nan
                gradients = {"y": own} | ({"x": np.ones(size, np.float32)} if randomness.random() < 0.5 else {})
                try:
                    versions.append(mine.push(gradients).version)
                except optserve.NonFiniteValue:
                    assert np.isnan(own[worker])
        return versions

    with ThreadPoolExecutor(workers) as pool:
        versions = list(pool.map(work, range(workers)))
    assert all(each == sorted(each) for each in versions)
    assert sorted(version for each in versions for version in each) == list(range(1, weights.describe().version + 1))
    assert weights.pull()["y"].tolist() == [len(each) for each in versions]


# -- the cut that keeps order

ITEMSIZE = 4
SMALL_STRIP = 16
rows_of_ranges = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 70)), min_size=1, max_size=12).filter(
    lambda ranges: any(size for _, size in ranges)
)


@given(rows_of_ranges, st.integers(1, 20))
@example([(15, 1), (16, 1), (15, 2), (0, 70), (16, 0)], 8)
def test_a_cut_in_order_covers_every_element_of_every_row_once(ranges: list[tuple[int, int]], parts: int) -> None:
    """Rows that share an element are in one part, in their order; addresses go with the elements."""
    table = np.array([[start, count, row, 1000 * row] for row, (start, count) in enumerate(ranges)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "STRIP", SMALL_STRIP)
        pieces = split_in_order(table, {3: ITEMSIZE}, parts)
    covered: list[tuple[int, int]] = []  # row and element
    acted: dict[int, list[tuple[int, int]]] = {}  # by element, part and row of those that act on it
    for part, rows in enumerate(pieces):
        for start, count, row, address in rows.tolist():
            assert address == 1000 * row + (start - ranges[row][0]) * ITEMSIZE
            for element in range(start, start + count):
                covered.append((row, element))
                acted.setdefault(element, []).append((part, row))
    assert sorted(covered) == [
        (row, element) for row, (start, count) in enumerate(ranges) for element in range(start, start + count)
    ]
    for actions in acted.values():
        assert len({part for part, _ in actions}) == 1
        assert [row for _, row in actions] == sorted(row for _, row in actions)
    assert len(pieces) <= parts


@given(rows_of_ranges, st.integers(1, 4))
def test_running_in_order_acts_on_every_element_in_the_order_of_rows(ranges: list[tuple[int, int]], count: int) -> None:
    """Whatever the number of threads, with something that does not commute."""
    table = np.array([[start, size, row] for row, (start, size) in enumerate(ranges)], np.int64)

    def loop(rows: Ranges, values: Array) -> None:
        for start, size, row in rows.tolist():
            values[start : start + size] = values[start : start + size] * 3 + row

    expected, values = (np.ones(200, np.int64) for _ in range(2))
    loop(table, expected)
    pool = Threads(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "STRIP", SMALL_STRIP)
        pool.run_in_order(loop, table, {}, values, inline=1)
    pool.close()
    np.testing.assert_array_equal(values, expected)
