"""Going back to earlier versions, and branching off from them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optserve
from direct import restored
from optserve import optim
from optserve_server import Config, Server

ADAM = optim.Adam(lr=0.01)


def gradients(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return {"w": random.standard_normal((30, 7)), "b": random.standard_normal(5).astype(np.float32)}


START = {"w": np.zeros((30, 7)), "b": np.zeros(5, np.float32)}


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Server]:
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path, checkpoints_kept=3)) as server:
        yield server


@pytest.fixture
def worker(durable: Server) -> Iterator[optserve.Client]:
    with optserve.Client(durable.address) as client:
        yield client


def run(worker: optserve.Client, journal: str = "always") -> tuple[optserve.ParameterSet, list[dict[str, bytes]]]:
    """A set that has had 8 updates, with checkpoints after 3 and 5, and what its parameters were at each version."""
    weights = worker.create_parameter_set("run", START, ADAM, journal=journal)
    versions = [bits(weights.pull())]
    for step in range(8):
        versions.append(bits(weights.step(gradients(step))))
        if step in (2, 4):
            weights.checkpoint()
    return weights, versions


def bits(parameters: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in parameters.items()}


@pytest.mark.parametrize("version", [0, 2, 3, 4, 6, 8])
def test_a_set_goes_back_to_any_version_since_the_oldest_checkpoint(
    version: int, worker: optserve.Client, durable: Server, tmp_path: Path
) -> None:
    weights, versions = run(worker)
    before = weights.pull().position
    position = weights.rewind(version)
    assert position.version == position.durable_version == version
    assert position.incarnation != before.incarnation
    assert bits(weights.pull()) == versions[version]
    again = [bits(weights.step(gradients(step))) for step in range(version, 8)]
    assert again == versions[version + 1 :]
    durable.stop()
    assert bits(view(restored(tmp_path))) == versions[8]


def view(parameter_set: Any) -> dict[str, Any]:
    return parameter_set.capture().entries()["parameters"]  # type: ignore[no-any-return]


def test_without_a_journal_it_goes_back_to_its_checkpoints(worker: optserve.Client) -> None:
    weights, versions = run(worker, journal="off")
    with pytest.raises(optserve.VersionNotKept, match="got 4, and the last one that can be had is 3"):
        weights.rewind(4)
    assert weights.rewind(3).version == 3
    with worker.parameter_set("run") as other:
        assert bits(other.pull()) == versions[3]


def test_a_version_that_is_yet_to_come_or_not_kept_any_more_is_refused(worker: optserve.Client) -> None:
    weights, _ = run(worker)
    with pytest.raises(optserve.VersionNotKept, match="got 9"):
        weights.rewind(9)
    for step in range(3):
        weights.step(gradients(step))
        weights.checkpoint()
    with pytest.raises(optserve.VersionNotKept, match="from 9 on.*got 4.*--checkpoints-kept"):
        weights.rewind(4)
    assert weights.pull().version == 11


def test_history_that_was_undone_is_not_gone_back_to(worker: optserve.Client) -> None:
    """After going back to 4 and on to 6 another way, version 5 is the one of the new way, from before a restart and after."""
    weights, _ = run(worker)
    weights.rewind(4)
    with worker.parameter_set("run") as other:
        fifth = bits(other.step(gradients(100)))
        other.step(gradients(101))
    weights.rewind(5)
    with worker.parameter_set("run") as other:
        assert bits(other.pull()) == fifth


def test_workers_hear_of_it_once_and_a_push_that_comes_again_is_still_a_duplicate(worker: optserve.Client) -> None:
    weights, versions = run(worker)
    with worker.parameter_set("run") as other:
        other.push(gradients(8))
        weights.rewind(4)
        with pytest.raises(optserve.RolledBack):
            other.push(gradients(9))
        assert bits(other.pull()) == versions[4]
        assert other.push(gradients(4)).version == 5


def test_what_was_acknowledged_since_a_worker_heard_of_the_last_rewind_is_there(worker: optserve.Client) -> None:
    counting = optim.SGD(lr=1.0, maximize=True)
    weights = worker.create_parameter_set("run", {"x": np.zeros(6)}, counting, journal="always")
    rewound = threading.Event()

    def push(handle: optserve.ParameterSet, k: int, since: int) -> int:
        """How many pushes are there, after one more."""
        try:
            handle.push({"x": np.eye(6)[k]})
        except optserve.RolledBack:
            return 0
        return since + 1

    def work(k: int) -> int:
        since = 0
        with worker.parameter_set("run") as mine:
            while not rewound.is_set():
                since = push(mine, k, since)
            return push(mine, k, since)

    with ThreadPoolExecutor(6) as pool:
        counts = [pool.submit(work, k) for k in range(6)]
        for version in range(8):
            while weights.describe().version < version + 5:
                pass
            weights.rewind(0)
        rewound.set()
    with worker.parameter_set("run") as other:
        assert other.pull()["x"].tolist() == [count.result() for count in counts]


@pytest.mark.parametrize("version", [None, 3, 6])
def test_a_fork_goes_on_as_the_set_did(
    version: int | None, worker: optserve.Client, durable: Server, tmp_path: Path
) -> None:
    weights, versions = run(worker)
    with weights.fork("fork", version) as fork:
        begun = fork.pull()
        at = 8 if version is None else version
        assert (begun.version, bits(begun)) == (at, versions[at])
        assert fork.describe().spec.optimizer == ADAM
        if version is not None:
            assert [bits(fork.step(gradients(step))) for step in range(version, 8)] == versions[version + 1 :]
        else:
            assert bits(fork.step(gradients(8))) == bits(weights.step(gradients(8)))
    assert weights.pull().version == (9 if version is None else 8)


def test_a_fork_from_a_checkpoint_shares_its_files(worker: optserve.Client, tmp_path: Path) -> None:
    weights, _ = run(worker)
    weights.fork("fork")
    weights.fork("other", optimizer=optim.Adamax())
    files = [path for path in tmp_path.rglob("*.safetensors") if path.stat().st_nlink > 1]
    assert sorted(path.name for path in files) == [
        "exp_avg.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "exp_avg_sq.safetensors",
        "parameters.safetensors", "parameters.safetensors", "parameters.safetensors",
    ]  # fmt: skip


def test_a_fork_with_another_optimizer_begins_with_the_parameters(worker: optserve.Client) -> None:
    weights, versions = run(worker)
    faster, other = weights.fork("faster", 6, optim.Adam(lr=0.1)), weights.fork("other", 6, optim.SGD(lr=0.1))
    assert (faster.pull().version, other.pull().version) == (6, 0)
    assert bits(faster.pull()) == bits(other.pull()) == versions[6]
    fresh = worker.create_parameter_set("fresh", dict(other.pull()), optim.SGD(lr=0.1))
    assert bits(other.step(gradients(0))) == bits(fresh.step(gradients(0)))


def test_in_memory_there_are_forks_of_the_present_only(client: optserve.Client, new_id: Any) -> None:
    weights = client.create_parameter_set(new_id(), START, ADAM)
    weights.step(gradients(0))
    with weights.fork(new_id()) as fork:
        assert bits(fork.step(gradients(1))) == bits(weights.step(gradients(1)))
    with pytest.raises(optserve.NoDataDirectory):
        weights.fork(new_id(), 0)
    with pytest.raises(optserve.NoDataDirectory):
        weights.rewind(0)


def test_a_fork_under_an_id_that_is_taken_is_refused(worker: optserve.Client) -> None:
    weights, _ = run(worker)
    with pytest.raises(optserve.ParameterSetExists):
        weights.fork("run")
    with pytest.raises(optserve.InvalidName):
        weights.fork("/")
