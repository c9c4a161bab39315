"""History repeated: what a journal has of a set makes the same set again, bit for bit, whatever the set can do."""

import contextlib
import errno
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import optserve
from direct import all_restored
from equality import assert_same
from optserve import (
    Async,
    BoundedStaleness,
    Buffered,
    Sync,
    aggregation,
    formats,
    optim,
    schedules,
    staleness,
)
from optserve._errors import InvalidArgument
from optserve_server import Config, Server
from optserve_server.engine.state import State
from optserve_server.storage import files

Array = np.ndarray[Any, Any]
SHAPES = {"w": (130, 33), "b": (7,), "scalar": ()}
STEPS = 7

SETS: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": optim.SGD(lr=0.1)},
    "AdamW in groups": {
        "optimizer": optim.AdamW(lr=0.01),
        "groups": [optim.Group("slow", "b", lr=0.001)],
    },
    "NAdam, which remembers": {"optimizer": optim.NAdam(lr=0.01)},
    "a schedule": {"optimizer": optim.Adam(lr=schedules.Cosine(0.1, 5))},
    "accumulation": {"optimizer": optim.Adam(lr=0.01), "transforms": optserve.Transforms(accumulate=3)},
    "clipping by the global norm": {
        "optimizer": optim.SGD(lr=0.1),
        "transforms": optserve.Transforms(clip=optserve.ClipGlobalNorm(1.0)),
    },
    "averages": {
        "optimizer": optim.SGD(lr=0.1),
        "transforms": optserve.Transforms(
            lookahead=optserve.Lookahead(every=2), average=optserve.EMA(0.9), nonfinite=optserve.SkipNonFinite()
        ),
    },
    "Muon": {"optimizer": optim.Muon(lr=0.01)},
    "Prodigy": {"optimizer": optim.Prodigy(d0=0.01)},
    "bfloat16 state": {"optimizer": optim.Adam(lr=0.01), "state": "bfloat16"},
    "int8 state": {"optimizer": optim.Adam(lr=0.01), "state": "int8"},
    "moments only": {"optimizer": optim.Adam(lr=0.01), "holds": "moments"},
    "no guard": {"optimizer": optim.Adam(lr=0.01), "guard": False},
}


def tensors(dtype: Any = np.float32, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Server]:
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path / "data", checkpoints_kept=9)) as server:
        yield server


@pytest.fixture
def worker(durable: Server) -> Iterator[optserve.Client]:
    with optserve.Client(durable.address) as worker:
        yield worker


def assert_repeats(durable: Server, tmp_path: Path) -> State:
    """What is on disk now, as after a crash, makes the server's sets again; the state of the first."""
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    theirs = all_restored(tmp_path / "copy")
    for ours, each in zip(durable._engine.list(), theirs, strict=True):
        assert_same(ours, each)
    return theirs[0].capture()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, id=f"{kind}, {dtype.__name__}")
        for kind, options in SETS.items()
        for dtype in (np.float32, np.float64, ml_dtypes.bfloat16)
        if dtype is np.float32 or not options.keys() - {"optimizer", "transforms"}
    ],
)
def test_pushes(kind: str, dtype: Any, durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    """Also refused ones, and such as have a part of the tensors, change hyperparameters or scale the loss."""
    options = dict(SETS[kind])
    weights = worker.create_parameter_set("set", tensors(dtype), options.pop("optimizer"), journal="always", **options)
    parts = "accumulate" not in repr(options.get("transforms", "")) or options["transforms"].accumulate == 1
    for step in range(STEPS):
        gradients = tensors(dtype, seed=step + 1)
        if step == 2 and parts:
            del gradients["b"]
        if step == 3 and options.get("guard", True):
            bad = {**gradients, "b": np.full(7, np.nan, dtype)}
            refused = contextlib.nullcontext() if kind == "averages" else pytest.raises(optserve.NonFiniteValue)
            with refused:
                weights.push(bad)
        weights.push(
            gradients,
            hyperparameters={"default": {"weight_decay": 0.0}} if step == 4 else None,
            loss_scale=128.0 if step == 5 else 1.0,
        )
        if step == 5:
            weights.update(lr=0.003)
    assert_repeats(durable, tmp_path)


def test_tensors_with_names_that_mean_something_to_files(
    durable: Server, worker: optserve.Client, tmp_path: Path
) -> None:
    names = ("__metadata__", "tensor", "tensor-", "tensor-0", "..", "/etc/passwd", "manifest.json", "\N{SNOWMAN}")
    arrays = {name: np.full(k, k, np.float32) for k, name in enumerate(names)}
    weights = worker.create_parameter_set("set", arrays, optim.SGD(), journal="always")
    weights.push(arrays)
    weights.checkpoint()
    weights.push(arrays)
    assert_repeats(durable, tmp_path)


@pytest.mark.parametrize("format", [formats.BFloat16(), formats.Float16(), formats.Int8(), formats.TopK(0.1)], ids=str)
def test_pushes_in_formats(format: formats.Format, durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    weights = worker.create_parameter_set("set", tensors(), optim.Adam(), journal="always", push_format=format)
    for step in range(STEPS):
        weights.push(tensors(seed=step))
    assert_repeats(durable, tmp_path)


@pytest.mark.parametrize(
    "transforms",
    [
        optserve.Transforms(),
        optserve.Transforms(accumulate=2),
        optserve.Transforms(clip=optserve.ClipGlobalNorm(0.5)),
        optserve.Transforms(clip=optserve.ClipAdaptive(0.01)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
def test_rounds_of_which_the_journal_has_the_mean(
    transforms: optserve.Transforms, dtype: Any, durable: Server, worker: optserve.Client, tmp_path: Path
) -> None:
    weights = worker.create_parameter_set(
        "set",
        tensors(dtype),
        optim.Adam(lr=0.01),
        journal="always",
        policy=optserve.Sync(workers=3),
        transforms=transforms,
    )
    handles = [weights, *(worker.parameter_set("set") for _ in range(2))]
    with ThreadPoolExecutor(3) as pool:
        for step in range(5):
            list(pool.map(lambda k: handles[k].push(tensors(dtype, seed=3 * step + k)), range(3)))  # noqa: B023
    journal = sum(path.stat().st_size for path in (tmp_path / "data").rglob("journal-*"))
    assert journal == 1 << 20
    assert_repeats(durable, tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_round_that_the_disk_refuses_leaves_no_trace(
    accumulate: int, durable: Server, worker: optserve.Client, tmp_path: Path
) -> None:
    """It comes again, as its workers send it again, and makes the same bits as rounds that nothing happened to."""
    write, refused = files._write, []

    def full(descriptor: int, buffers: Any, offset: int) -> int:
        refused.append(offset)
        raise OSError(errno.ENOSPC, "no space left")

    options = {"policy": optserve.Sync(workers=2), "transforms": optserve.Transforms(accumulate=accumulate)}
    sets = {}
    for name, journal in (("set", "always"), ("other", "off")):
        weights = worker.create_parameter_set(name, tensors(), optim.SGD(lr=0.1), journal=journal, **options)
        handles = [worker.parameter_set(name, client_id=client) for client in "ab"]  # in whose order they are added up
        with ThreadPoolExecutor(2) as pool:
            for step in range(4):
                disk_is_full = name == "set" and step % 2 == 1
                with mock.patch.object(files, "_write", full) if disk_is_full else contextlib.nullcontext():
                    pushes = [pool.submit(handle.push, tensors(seed=2 * step + k)) for k, handle in enumerate(handles)]
                    while disk_is_full and not refused:
                        assert not any(push.done() for push in pushes)
                refused.clear()
                for push in pushes:
                    push.result()
        sets[name] = {key: array.tobytes() for key, array in weights.pull().items()}
    assert sets["set"] == sets["other"]
    assert files._write is write
    worker.parameter_set("other").delete()
    assert_repeats(durable, tmp_path)


def test_rounds_of_moments_with_parameters_and_weight_decay(
    durable: Server, worker: optserve.Client, tmp_path: Path
) -> None:
    weights = worker.create_parameter_set(
        "set", tensors(), optim.AdamW(), holds="moments", journal="always", policy=optserve.Sync(workers=2)
    )
    handles = [weights, worker.parameter_set("set")]
    with ThreadPoolExecutor(2) as pool:
        for step in range(4):
            list(pool.map(lambda k: handles[k].push(tensors(seed=step + k), parameters=tensors()), range(2)))  # noqa: B023
    assert_repeats(durable, tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_and_tables(workers: int, durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    table = optserve.Table((5,), capacity=64, initial=optserve.Normal(std=0.1, seed=3))
    weights = worker.create_parameter_set(
        "set",
        {"table": table, "rows": np.zeros((40, 3), np.float32), "b": np.zeros(7, np.float32)},
        optim.Adagrad(lr=0.1),
        journal="always",
        policy=optserve.Sync(workers=2) if workers == 2 else optserve.Async(),
    )
    handles = [weights, worker.parameter_set("set")][:workers]

    def push(k: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        keys, rows = random.integers(0, 50, 6), random.integers(0, 40, 4)
        handles[k].push(
            {
                "table": optserve.RowSparse(keys, random.standard_normal((6, 5)).astype(np.float32)),
                "rows": optserve.RowSparse(rows, random.standard_normal((4, 3)).astype(np.float32)),
                "b": random.standard_normal(7).astype(np.float32),
            }
        )

    with ThreadPoolExecutor(workers) as pool:
        for step in range(5):
            list(pool.map(lambda k: push(k, 10 * step + k), range(workers)))  # noqa: B023
    assert_repeats(durable, tmp_path)


def test_pushes_through_shared_memory(durable: Server, tmp_path: Path) -> None:
    with optserve.Client(durable.address, transport="shared_memory") as local:
        weights = local.create_parameter_set("set", {"w": np.zeros(40_000, np.float32)}, optim.Adam(), journal="always")
        for seed in range(3):
            weights.step({"w": np.random.default_rng(seed).standard_normal(40_000).astype(np.float32)}, copy=False)
        assert_repeats(durable, tmp_path)


def test_pushes_that_shared_a_pass(durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    worker.create_parameter_set("set", tensors(), optim.AdamW(lr=0.01), journal="always")

    def work(k: int) -> None:
        with worker.parameter_set("set") as mine:
            for step in range(10):
                mine.push(tensors(seed=100 * k + step))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert assert_repeats(durable, tmp_path).position.version == 60


def test_a_journal_needs_a_data_directory(tcp_client: optserve.Client) -> None:
    with pytest.raises(optserve.NoDataDirectory, match="--data-dir"):
        tcp_client.create_parameter_set("journaled", tensors(), optim.SGD(), journal="always")
    with pytest.raises(InvalidArgument, match="'off', 'everysec', 'always'"):
        tcp_client.create_parameter_set("journaled", tensors(), optim.SGD(), journal="sometimes")


def test_warm_is_resumed_and_not_cold(durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    """A run that goes on after a crash makes the bits that it would have made without; one with fresh moments others."""
    weights = worker.create_parameter_set("set", tensors(), optim.AdamW(lr=0.01), journal="always")
    for step in range(4):
        weights.push(tensors(seed=step))
    parameters = dict(weights.pull())
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with (
        Server(Config(listen="127.0.0.1:0", data_dir=tmp_path / "copy")) as other,
        optserve.Client(other.address) as restarted,
    ):
        resumed = restarted.parameter_set("set").step(tensors(seed=4))
        cold = restarted.create_parameter_set("cold", parameters, optim.AdamW(lr=0.01)).step(tensors(seed=4))
    warm = weights.step(tensors(seed=4))
    assert warm.version == resumed.version == 5
    for name, array in warm.items():
        assert array.tobytes() == resumed[name].tobytes()
        assert array.tobytes() != cold[name].tobytes()


STALENESS = {
    "Reject": staleness.Reject(1),
    "DivideLearningRate": staleness.DivideLearningRate(),
    "Polynomial": staleness.Polynomial(),
    "DelayCompensation": staleness.DelayCompensation(),
    "GapAware": staleness.GapAware(),
}
STATISTICS = {"*w": "average", "b": "replace", "scalar": "freeze"}
CLIPPED = optserve.Transforms(clip=optserve.ClipGlobalNorm(1.0), average=optserve.EMA(0.9))
MORE_TENSORS = {"more": np.linspace(-1, 1, 50, dtype=np.float32)}  # which an optimizer sees beside those

POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"policy": Async(staleness=each)} for name, each in STALENESS.items()},
    "a buffer of pushes": {"policy": Buffered(pushes=3, staleness=staleness.Polynomial())},
    "a buffer of samples": {"policy": Buffered(samples=7.5, staleness=staleness.DivideLearningRate())},
    "a buffer of compensated pushes": {"policy": Buffered(pushes=3, staleness=staleness.DelayCompensation())},
    "accumulated stale pushes": {
        "policy": Async(staleness=staleness.Polynomial()),
        "transforms": optserve.Transforms(accumulate=3),
    },
    "deltas": {"pushes": "deltas", "policy": Async(staleness=staleness.GapAware())},
    "parameters": {"pushes": "parameters", "transforms": optserve.Transforms(clip=optserve.ClipGlobalNorm(1.0))},
    "a buffer of parameters": {"pushes": "parameters", "policy": Buffered(samples=4.0)},
    "statistics": {"buffers": STATISTICS, "transforms": optserve.Transforms(average=optserve.EMA(0.9))},
    "a buffer of statistics": {"buffers": STATISTICS, "policy": Buffered(pushes=3)},
    "ahead by two at most": {"policy": BoundedStaleness(2, staleness=staleness.Polynomial())},
}


def pushed(seed: int) -> dict[str, Array]:
    return tensors(seed=seed) | {"more": np.random.default_rng(seed).standard_normal(50).astype(np.float32)}


@pytest.mark.parametrize("kind", POLICIES)
def test_policies(kind: str, durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    """Of a set whose checkpoint came while pushes wait in a buffer, as does the end, and of one that has its journal only."""
    for set_id in ("journal", "checkpoint"):
        created = worker.create_parameter_set(
            set_id, tensors() | MORE_TENSORS, optim.Adam(lr=0.01), journal="always", **POLICIES[kind]
        )
        handles = [created, worker.parameter_set(set_id, client_id="other")]
        for step in range(11):
            k, scale = step % 2, 1.0 if POLICIES[kind].get("pushes") == "parameters" or step % 5 else 8.0
            if k == 0 or step % 8 == 1:
                handles[k].pull()
            handles[k].push(pushed(step), samples=1 + step % 3, loss_scale=scale)
            if step == 6:
                with pytest.raises(optserve.NonFiniteValue):
                    handles[k].push({"more": np.full(50, np.nan, np.float32)})
                if set_id == "checkpoint":
                    created.checkpoint()
    state = assert_repeats(durable, tmp_path)
    assert bool(state.progress.accumulated) == ("buffer" in kind or "accumulated" in kind)
    assert max(state.progress.staleness) > 0


ROUNDS: dict[str, dict[str, Any]] = {
    "folded": {"policy": Sync(3)},
    "deterministic": {"policy": Sync(3, deterministic=True)},
    "folded statistics": {"policy": Sync(3), "buffers": STATISTICS, "transforms": CLIPPED},
    "folded parameters": {"policy": Sync(3), "pushes": "parameters"},
    "median": {"policy": Sync(3, aggregation=aggregation.Median()), "buffers": STATISTICS},
    "trimmed mean, accumulated": {
        "policy": Sync(3, aggregation=aggregation.TrimmedMean(1)),
        "transforms": optserve.Transforms(accumulate=2),
    },
    "Krum and quarantine": {
        "policy": Sync(3, aggregation=aggregation.Krum(0), quarantine=aggregation.Quarantine(factor=1.5, strikes=1))
    },
    "carried": {"policy": Sync(3, quorum=2, late="carry", staleness=staleness.DelayCompensation())},
    "late": {"policy": Sync(3, quorum=2)},
}


@pytest.mark.parametrize("kind", ROUNDS)
def test_rounds(kind: str, durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    """Of which the third worker is late where there is a quorum; in the middle there is a checkpoint."""
    created = worker.create_parameter_set(
        "set", tensors() | MORE_TENSORS, optim.Adam(lr=0.01), journal="always", **ROUNDS[kind]
    )
    handles = [worker.parameter_set("set", client_id=f"worker-{k}") for k in range(3)]
    outcomes: set[optserve.Outcome] = set()
    quorum = ROUNDS[kind]["policy"].quorum is not None
    with ThreadPoolExecutor(3) as pool:
        for step in range(6):
            if not quorum or step % 2 == 0:
                for handle in handles:
                    handle.pull()
            together = [pool.submit(handles[k].push, pushed(10 * step + k), samples=k + 1.0) for k in range(3 - quorum)]
            outcomes |= {each.result().outcome for each in together}
            if quorum and step % 2:
                outcomes.add(late(kind, handles, pool))
            if step == 2:
                created.checkpoint()
    state = assert_repeats(durable, tmp_path)
    assert (optserve.Outcome.DISCARDED in outcomes) == (kind == "late"), outcomes
    assert state.position.version >= 3


def late(kind: str, handles: Sequence[optserve.ParameterSet], pool: ThreadPoolExecutor) -> optserve.Outcome:
    """What becomes of a push of the third worker, which missed rounds; another makes a quorum of one that is carried."""
    alone = pool.submit(handles[2].push, pushed(99))
    if kind == "carried":
        handles[0].push(pushed(98))
    return alone.result().outcome


def test_policies_that_take_turns(durable: Server, worker: optserve.Client, tmp_path: Path) -> None:
    """Each while something waits in what the one before has begun; and every version of it can be gone back to, and forked."""
    weights = worker.create_parameter_set(
        "set", tensors() | MORE_TENSORS, optim.Adam(lr=0.01), journal="always", buffers=STATISTICS
    )
    other = worker.parameter_set("set", client_id="other")
    policies = [
        Buffered(pushes=4, staleness=staleness.DelayCompensation()),
        Sync(2),
        Buffered(samples=9.0),
        Async(staleness=staleness.GapAware()),
        Async(),
        Buffered(pushes=5),
        Sync(2, deterministic=True),
        BoundedStaleness(4),
    ]
    first: dict[int, tuple[Any, dict[str, bytes]]] = {}

    def note() -> None:
        version = weights.describe().version
        bits = {name: array.tobytes() for name, array in weights.pull().items()}
        assert first.setdefault(version, (weights.describe().policy, bits))[1] == bits

    note()
    with ThreadPoolExecutor(2) as pool:
        for turn, policy in enumerate(policies):
            weights.update(policy=policy)
            if turn in (1, 3, 4, 6):
                weights.checkpoint()
            rounds = 2 if isinstance(policy, Buffered) else 1
            for k in range(rounds):
                pushes = [
                    pool.submit(handle.push, pushed(100 * turn + 10 * k + m), samples=m + 1.0)
                    for m, handle in enumerate((weights, other)[: 2 - k])
                ]
                for each in pushes:
                    each.result()
                note()
            if turn in (0, 2, 5):
                assert durable._engine.get("set").capture().progress.accumulated
                weights.checkpoint()
    assert_repeats(durable, tmp_path)
    for version in sorted(first, reverse=True):
        fork = weights.fork(f"fork-{version}", version)
        policy, bits = first[version]
        assert {name: array.tobytes() for name, array in fork.pull().items()} == bits
        assert fork.describe().policy == policy
        fork.delete()
    for version in sorted(first, reverse=True)[::2]:
        weights.rewind(version)
        policy, bits = first[version]
        assert {name: array.tobytes() for name, array in weights.pull().items()} == bits
        assert weights.describe().policy == policy
    shutil.rmtree(tmp_path / "copy")
    assert_repeats(durable, tmp_path)
