"""Synchronous sets: one push of each worker makes one update of their mean, and nobody waits for ever."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import optserve
from optserve import Sync, formats, optim
from optserve._retry import Retry
from optserve_server import Config, Server
from optserve_server.engine.parameter_set import ParameterSet

Array = np.ndarray[Any, Any]
NewId = Callable[[], str]
PATIENCE = 30.0  # seconds
SIZE = 50_000

START = {"x": np.linspace(-1, 1, SIZE, dtype=np.float32), "y": np.ones((), np.float32)}


def gradients_of(seed: int, start: Mapping[str, Array] = START) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.normal(size=value.shape)).astype(value.dtype) for name, value in start.items()}


def attached(client: optserve.Client, set_id: str, count: int, **choices: Any) -> list[optserve.ParameterSet]:
    return [client.parameter_set(set_id, client_id=f"worker-{k}", **choices) for k in range(count)]


def step_together(
    workers: Sequence[optserve.ParameterSet], gradients: Sequence[Mapping[str, Array]], **options: Any
) -> list[optserve.Parameters]:
    with ThreadPoolExecutor(len(workers)) as pool:
        steps = [pool.submit(worker.step, pushed, **options) for worker, pushed in zip(workers, gradients, strict=True)]
        return [step.result(PATIENCE) for step in steps]


def wait_until_waiting(parameter_set: ParameterSet, count: int) -> None:
    """Until so many pushes wait for others."""
    never = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if len(parameter_set._rounds._waiting) == count:
            return
        never.wait(0.001)
    raise AssertionError(f"{len(parameter_set._rounds._waiting)} pushes wait, not {count}")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_round_is_one_update_with_the_mean(client: optserve.Client, new_id: NewId, count: int) -> None:
    start = {name: value.astype(np.float64) for name, value in START.items()}
    set_id = new_id()
    client.create_parameter_set(set_id, start, optim.Adam(lr=0.1), policy=Sync(count))
    alone = client.create_parameter_set(new_id(), start, optim.Adam(lr=0.1))
    workers = attached(client, set_id, count)
    for version in range(1, 4):
        pushed = [gradients_of(10 * version + k, start) for k in range(count)]
        results = step_together(workers, pushed)
        expected = alone.step({name: np.mean([each[name] for each in pushed], axis=0) for name in start})
        for result, own in zip(results, pushed, strict=True):
            assert result.receipt is not None
            assert result.receipt.applied
            assert result.version == result.receipt.version == version
            norm = np.sqrt(sum(float((value**2).sum()) for value in own.values()))
            np.testing.assert_allclose(result.receipt.gradient_norm, norm)
            for name in start:
                np.testing.assert_allclose(result[name], expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_the_mean_of_equal_gradients_is_that_gradient(client: optserve.Client, new_id: NewId, dtype: Any) -> None:
    start, set_id = {"x": np.zeros(9000, dtype)}, new_id()
    client.create_parameter_set(set_id, start, optim.SGD(lr=1.0), policy=Sync(2))
    alone = client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0))
    pushed = gradients_of(0, start)
    expected = alone.step(pushed)["x"].tobytes()
    for result in step_together(attached(client, set_id, 2), [pushed, pushed]):
        assert result["x"].tobytes() == expected


def test_the_order_of_arrival_does_not_change_a_bit(server: Server, tcp_client: optserve.Client, new_id: NewId) -> None:
    pushed = [gradients_of(k) for k in range(3)]
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        set_id = new_id()
        tcp_client.create_parameter_set(set_id, START, optim.Adam(), policy=Sync(3, deterministic=True))
        workers = attached(tcp_client, set_id, 3)
        with ThreadPoolExecutor(3) as pool:
            steps: list[Future[optserve.Parameters]] = []
            for k in order:
                wait_until_waiting(server._engine.get(set_id), len(steps))
                steps.append(pool.submit(workers[k].step, pushed[k]))
            results.append(steps[0].result(PATIENCE))
    for name in START:
        assert results[0][name].tobytes() == results[1][name].tobytes()


def test_workers_with_different_formats_share_a_round(tcp_client: optserve.Client, new_id: NewId) -> None:
    set_id, ones = new_id(), {"x": np.ones(SIZE, np.float32), "y": np.ones((), np.float32)}
    tcp_client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=Sync(4))
    chosen = [None, formats.BFloat16(), formats.Int8(), formats.Float16()]
    workers = [
        tcp_client.parameter_set(set_id, client_id=f"worker-{k}", push_format=each) for k, each in enumerate(chosen)
    ]
    for result in step_together(workers, [{name: k * ones[name] for name in ones} for k in range(4)]):
        np.testing.assert_allclose(result["x"], START["x"] - 1.5, atol=0.02)


def test_views_stay_until_the_round_of_the_next_step(shared_memory_client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    shared_memory_client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=Sync(2))
    workers = attached(shared_memory_client, set_id, 2)
    buffers = [worker.gradient_buffers() for worker in workers]
    for step in range(1, 4):
        for each in buffers:
            each["x"][:], each["y"][...] = 1, 1
        views = step_together(workers, buffers, copy=False)
        for view in views:
            np.testing.assert_allclose(view["x"], START["x"] - step, atol=1e-5)


def test_moments_are_those_of_the_mean(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), holds="moments", policy=Sync(2))
    workers = attached(client, set_id, 2)
    for updates in step_together(workers, [{"x": START["x"]}, {"x": 3 * START["x"]}]):
        assert updates.keys() == {"x"}
        np.testing.assert_array_equal(updates["x"], -2 * START["x"])


@pytest.mark.parametrize("transport", ["stream", "shared_memory"])
def test_a_round_that_stays_incomplete_is_given_up(
    server: Server, new_id: NewId, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_id = new_id()
    with optserve.Client(server.address, transport=transport) as client:
        client.create_parameter_set(set_id, START, optim.SGD(), policy=Sync(2, deadline=0.05))
        alone = client.parameter_set(set_id, client_id="alone")
        with monkeypatch.context() as patch:
            patch.setattr(Retry, "pause", lambda self, error: False)
            with pytest.raises(optserve.RoundIncomplete, match=r"2 workers within 0\.05 s; 1 came, of 'alone'"):
                alone.push(gradients_of(0))
        assert alone.describe().version == 0
        for result in step_together(attached(client, set_id, 2), [gradients_of(1), gradients_of(2)]):
            assert result.version == result.receipt.sequence == 1  # type: ignore[union-attr]


def test_who_waits_tries_again_until_the_other_comes(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    set_id = new_id()
    tcp_client.create_parameter_set(set_id, START, optim.SGD(), policy=Sync(2, deadline=0.5))
    first, second = attached(tcp_client, set_id, 2)
    rounds = server._engine.get(set_id)._rounds
    given_up = threading.Event()
    give_up = rounds.give_up
    rounds.give_up = lambda error: (give_up(error), given_up.set())  # type: ignore[method-assign, assignment]
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(first.push, gradients_of(0))
        assert given_up.wait(PATIENCE)
        late = pool.submit(second.push, gradients_of(1))
        assert early.result(PATIENCE).version == late.result(PATIENCE).version == 1


def test_nan_is_refused_alone_and_the_others_go_on(server: Server, client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=Sync(2))
    sick, well = attached(client, set_id, 2)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(well.step, {"x": START["x"]})
        with pytest.raises(optserve.NonFiniteValue):
            sick.push({"x": np.full(SIZE, np.nan, np.float32)})
        receipt = sick.push({"x": START["x"]})
        assert (receipt.sequence, receipt.version) == (2, 1)
        np.testing.assert_array_equal(step.result(PATIENCE)["x"], 0)


def test_what_can_not_be_averaged_with_the_others_is_refused(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    set_id = new_id()
    tcp_client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=Sync(2))
    first, second = attached(tcp_client, set_id, 2)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(first.push, {"x": START["x"]}, hyperparameters={"default": {"lr": 0.5}})
        wait_until_waiting(server._engine.get(set_id), 1)
        with pytest.raises(optserve.TensorMismatch, match="the 1 tensors that the others of this round pushed"):
            second.push(START)
        with pytest.raises(optserve.InvalidHyperparameter, match=r"one value of 'lr'.*got 0\.5 and 0\.25"):
            second.push({"x": START["x"]}, hyperparameters={"default": {"lr": 0.25}})
        assert second.describe().version == 0
        receipt = second.push({"x": START["x"]}, hyperparameters={"default": {"lr": 0.5}})
        assert receipt.learning_rate == step.result(PATIENCE).learning_rate == 0.5


def test_a_push_stays_in_its_round_when_its_worker_comes_back(server: Server, new_id: NewId) -> None:
    set_id = new_id()
    with optserve.Client(server.address) as client, optserve.Client(server.address) as reborn:
        weights = client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=Sync(2))
        lost, other = attached(client, set_id, 2)
        again = reborn.parameter_set(set_id, client_id="worker-0")
        with ThreadPoolExecutor(3) as pool:
            old = pool.submit(lost.push, {"x": START["x"]})
            wait_until_waiting(server._engine.get(set_id), 1)
            new = pool.submit(again.step, {"x": 100 * START["x"]})
            other.push({"x": START["x"]})
            assert old.result(PATIENCE).version == 1
            other.pull()
            other.push({"x": -100 * START["x"]})
            assert new.result(PATIENCE).version == 2
        np.testing.assert_allclose(weights.pull()["x"], 0, atol=1e-5)


def test_settling_waits_for_the_round(server: Server, new_id: NewId) -> None:
    set_id = new_id()
    with optserve.Client(server.address) as client:
        client.create_parameter_set(set_id, START, optim.SGD(lr=1.0), policy=Sync(2, deadline=2.0))
    with optserve.Client(server.address, timeout=0.3) as client:
        first, second = attached(client, set_id, 2)
        with pytest.raises(optserve.OutcomeUnknown):
            first.push({"x": START["x"]})
        while True:
            with contextlib.suppress(optserve.DeadlineExceeded):  # as long as it waits
                assert first.settle() is None
                break
        with pytest.raises(optserve.OutcomeUnknown):
            second.push({"x": START["x"]})
        assert second.describe().version == 0


def test_deletion_ends_the_wait(server: Server, tcp_client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    weights = tcp_client.create_parameter_set(set_id, START, optim.SGD(), policy=Sync(2))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tcp_client.parameter_set(set_id).push, START)
        wait_until_waiting(server._engine.get(set_id), 1)
        weights.delete()
        with pytest.raises(optserve.ParameterSetNotFound):
            waiting.result(PATIENCE)


def test_a_stop_ends_the_wait_and_the_round_goes_on_afterwards(tmp_path: Path) -> None:
    listen = "unix:" + str(tmp_path / "socket")
    config = Config(listen=listen, data_dir=tmp_path / "state")
    with optserve.Client(listen) as client, ThreadPoolExecutor(1) as pool:
        with Server(config) as server:
            client.create_parameter_set("a", START, optim.SGD(lr=1.0), policy=Sync(2))
            first, second = attached(client, "a", 2)
            early = pool.submit(first.step, {"x": START["x"]})
            wait_until_waiting(server._engine.get("a"), 1)
        with Server(config):
            assert second.describe().spec.policy == Sync(2)
            np.testing.assert_array_equal(second.step({"x": START["x"]})["x"], 0)
            assert early.result(PATIENCE).version == 1


def test_the_policy_is_part_of_the_set(client: optserve.Client, new_id: NewId) -> None:
    set_id, policy = new_id(), Sync(2, deadline=1.25)
    assert client.create_parameter_set(set_id, START, optim.SGD(), policy=policy).describe().spec.policy == policy
    client.create_parameter_set(set_id, START, optim.SGD(), policy=policy, exist_ok=True)
    with pytest.raises(optserve.SpecificationMismatch, match="other policy"):
        client.create_parameter_set(set_id, START, optim.SGD(), exist_ok=True)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (65_537,), (2.5,), (2, 0), (2, float("inf")), (2, float("nan"))])
def test_a_policy_that_can_not_be_meant_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(optserve.InvalidPolicy, match="expected"):
        Sync(*arguments)


def test_something_else_is_not_a_policy(client: optserve.Client, new_id: NewId) -> None:
    with pytest.raises(optserve.InvalidPolicy, match=r"Sync\(workers=4\); got 'sync'"):
        client.create_parameter_set(new_id(), START, optim.SGD(), policy="sync")  # type: ignore[arg-type]


def test_a_round_that_could_never_fit_is_refused_at_once() -> None:
    config = Config(listen="127.0.0.1:0", max_streams=4, max_bytes_in_flight=1 << 20)
    with Server(config) as server, optserve.Client(server.address) as client:
        with pytest.raises(optserve.InvalidPolicy, match="a round of 5 workers takes 5 streams"):
            client.create_parameter_set("a", {"x": START["y"]}, optim.SGD(), policy=Sync(5))
        kept = Sync(3, deterministic=True)
        with pytest.raises(optserve.InvalidPolicy, match="at most 1,048,576"):
            client.create_parameter_set("a", {"x": np.zeros(1 << 17, np.float32)}, optim.SGD(), policy=kept)
        client.create_parameter_set("a", {"x": np.zeros(1 << 17, np.float32)}, optim.SGD(), policy=Sync(2))


def test_a_member_that_only_watches_is_waited_for_once(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(), policy=Sync(deadline=0.5))
    with weights.worker("monitor"), weights.worker("worker") as worker:
        for version in (1, 2):
            assert worker.step(START).version == version
            assert [each.client_id for each in weights.workers()] == ["worker"]


def test_once_all_have_left_the_next_run_waits_for_all_again(server: Server, new_id: NewId) -> None:
    with optserve.Client(server.address, timeout=1.0) as client:
        weights = client.create_parameter_set(new_id(), START, optim.SGD(), policy=Sync(2, deadline=0.3))
        with weights.worker("a") as first, weights.worker("b") as second:
            step_together([first, second], [START, START])
        with weights.worker("c") as alone, pytest.raises(optserve.OptserveError):
            alone.step(START)
        assert weights.describe().version == 1
