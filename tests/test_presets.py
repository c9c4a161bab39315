"""Presets, against their papers written out anew: workers that train on their own, with unequal numbers of samples."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import optserve
from direct import DirectSet
from optserve import Async, Buffered, Outcome, Pushes, Sync, optim, presets, staleness

Array = np.ndarray[Any, Any]
NewId = Callable[[], str]
Server = Callable[[Array, Array], Array]  # (parameters, mean of how far workers have come) -> parameters

PATIENCE = 30.0  # seconds
ROUNDS = 6
SAMPLES = (5.0, 1.0, 2.5)
START = np.random.default_rng(0).normal(size=17)
OPTIMA = START + 10.0 ** np.random.default_rng(1).uniform(-3, 0, (len(SAMPLES), 17))
MEAN = np.array(SAMPLES) / sum(SAMPLES)


def trained(parameters: Array, worker: int) -> Array:
    """Where a worker's steps on its own loss, a quadratic, have led it."""
    for _ in range(5):
        parameters = parameters - 0.1 * (parameters - OPTIMA[worker])
    return parameters


def train(
    client: optserve.Client, set_id: str, preset: presets.Preset, weights: tuple[float, ...] = SAMPLES
) -> list[Array]:
    """The parameters after each round of all workers."""
    client.create_parameter_set(set_id, {"x": START}, **preset)
    handles = [client.parameter_set(set_id, client_id=f"worker-{k}") for k in range(len(weights))]
    present, versions = [handle.pull()["x"] for handle in handles], []

    def step(k: int) -> Array:
        local = trained(present[k], k)
        pushed = local if Pushes(preset["pushes"]) is Pushes.PARAMETERS else local - present[k]
        return handles[k].step({"x": pushed}, samples=weights[k])["x"]

    with ThreadPoolExecutor(len(handles)) as pool:
        for _ in range(ROUNDS):
            present = list(pool.map(step, range(len(handles)), timeout=PATIENCE))
            for other in present[1:]:
                np.testing.assert_array_equal(other, present[0])
            versions.append(present[0])
    return versions


def expected(server: Server, weights: Array = MEAN) -> list[Array]:
    """The same, on one machine."""
    parameters, versions = START, []
    for _ in range(ROUNDS):
        deltas = [trained(parameters, k) - parameters for k in range(len(weights))]
        parameters = server(parameters, np.average(deltas, axis=0, weights=weights))
        versions.append(parameters)
    return versions


def assert_equal(ours: list[Array], theirs: list[Array]) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert np.abs(theirs[-1] - START).max() > 0.01


def torch_server(**options: Any) -> Server:
    """`torch.optim.SGD`, whose gradient is where workers began less where they have come to."""
    parameter = torch.nn.Parameter(torch.from_numpy(START.copy()))
    theirs = torch.optim.SGD([parameter], **options)

    def server(parameters: Array, delta: Array) -> Array:
        parameter.grad = torch.from_numpy(-delta)
        theirs.step()
        return parameter.detach().numpy().copy()

    return server


def fedopt(rule: str, lr: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Server:
    """Algorithm 2 of arXiv:2003.00295."""
    m, v = np.zeros_like(START), np.full_like(START, tau**2)

    def server(parameters: Array, delta: Array) -> Array:
        nonlocal m, v
        m = beta1 * m + (1 - beta1) * delta
        match rule:
            case "adagrad":
                v = v + delta**2
            case "yogi":
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            case "adam":
                v = beta2 * v + (1 - beta2) * delta**2
        return parameters + lr * m / (np.sqrt(v) + tau)

    return server


def of_flower(rule: str, eta: float, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> Server:
    """As in Flower's FedAdagrad, FedAdam and FedYogi, whose rounds are counted from 1."""
    server_round = 0
    m_t = v_t = np.zeros_like(START)

    def server(parameters: Array, delta_t: Array) -> Array:
        nonlocal server_round, m_t, v_t
        server_round += 1
        eta_norm = eta
        m_t = beta_1 * m_t + (1 - beta_1) * delta_t
        if rule == "adagrad":
            v_t = v_t + delta_t**2
        elif rule == "yogi":
            v_t = v_t - (1.0 - beta_2) * (delta_t**2) * np.sign(v_t - delta_t**2)
        else:
            v_t = beta_2 * v_t + (1 - beta_2) * (delta_t**2)
            power = server_round + 1.0
            eta_norm = eta * np.sqrt(1 - np.power(beta_2, power)) / (1 - np.power(beta_1, power))
        return parameters + eta_norm * m_t / (np.sqrt(v_t) + tau)

    return server


def of_tff(rule: str, lr: float, beta_1: float, beta_2: float, epsilon: float, initial: float) -> Server:
    """As in TensorFlow Federated's optimizers, which take the gradient −Δ."""
    step, acc, s = 0, np.zeros_like(START), np.full_like(START, initial)

    def server(parameters: Array, delta: Array) -> Array:
        nonlocal step, acc, s
        step, g = step + 1, -delta
        acc = acc + (g - acc) * (1 - beta_1)
        s = s + (1 - beta_2) * (np.sign(g**2 - s) * g**2 if rule == "yogi" else g**2 - s)
        normalized = lr * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        return parameters - normalized * acc / (np.sqrt(s) + epsilon)

    return server


class TestRounds:
    def test_diloco_is_sgd_with_nesterov_on_pseudo_gradients(self, client: optserve.Client, new_id: NewId) -> None:
        theirs = expected(torch_server(lr=0.7, momentum=0.9, nesterov=True), np.ones(3) / 3)
        assert_equal(train(client, new_id(), presets.diloco(workers=3), (1.0, 1.0, 1.0)), theirs)

    def test_diloco_on_the_engine(self) -> None:
        direct = DirectSet({"x": START}, presets.diloco()["optimizer"])

        def server(parameters: Array, delta: Array) -> Array:
            direct.push({"x": -delta})
            return direct.pull()["x"]

        assert_equal(expected(server), expected(torch_server(lr=0.7, momentum=0.9, nesterov=True)))

    @pytest.mark.parametrize(
        ("preset", "algorithm"),
        [
            (presets.fedavg(3), lambda: torch_server(lr=1.0)),
            (presets.fedavgm(3), lambda: torch_server(lr=1.0, momentum=0.9)),
            (presets.fedadagrad(3), lambda: fedopt("adagrad", lr=0.1, beta1=0.0)),
            (presets.fedadam(3), lambda: fedopt("adam", lr=0.1)),
            (presets.fedyogi(3), lambda: fedopt("yogi", lr=0.01)),
        ],
        ids=["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"],
    )
    def test_each_is_its_papers_algorithm_weighted_by_samples(
        self, preset: presets.Preset, algorithm: Callable[[], Server], tcp_client: optserve.Client, new_id: NewId
    ) -> None:
        assert_equal(train(tcp_client, new_id(), preset), expected(algorithm()))

    def test_federated_averaging_ends_a_round_at_the_mean_of_the_workers(
        self, memory_client: optserve.Client, new_id: NewId
    ) -> None:
        first = train(memory_client, new_id(), presets.fedavg(3))[0]
        mean = np.average([trained(START, k) for k in range(3)], axis=0, weights=SAMPLES)
        np.testing.assert_allclose(first, mean, rtol=0, atol=1e-12)

    def test_parameters_may_be_pushed_for_deltas(self, memory_client: optserve.Client, new_id: NewId) -> None:
        preset = presets.fedadam(3)
        deltas, parameters = (
            train(memory_client, new_id(), each) for each in (preset, preset | {"pushes": "parameters"})
        )
        np.testing.assert_allclose(parameters, deltas, rtol=0, atol=1e-12)

    def test_streaming_diloco_moves_one_fragment_at_a_time(self, memory_client: optserve.Client, new_id: NewId) -> None:
        fragments = [{"a": START, "b": 2 * START}, {"c": 3 * START}]
        set_id = new_id()
        memory_client.create_parameter_set(set_id, fragments[0] | fragments[1], **presets.streaming_diloco(2))
        workers = [memory_client.parameter_set(set_id, client_id=f"worker-{k}") for k in range(2)]
        servers = {name: torch_server(lr=0.4, momentum=0.9, nesterov=True) for name in "abc"}
        moved = {name: np.zeros_like(START) for name in "abc"}
        with ThreadPoolExecutor(2) as pool:
            for k in range(4):
                deltas = [
                    {name: np.random.default_rng([k, worker]).normal(size=17) for name in fragments[k % 2]}
                    for worker in range(2)
                ]
                results = list(pool.map(lambda worker, delta: worker.step(delta), workers, deltas, timeout=PATIENCE))
                for name in fragments[k % 2]:
                    mean = (deltas[0][name] + deltas[1][name]) / 2
                    moved[name] = servers[name](START, mean) - START
                for name, start in (fragments[0] | fragments[1]).items():
                    np.testing.assert_allclose(results[0][name] - start, moved[name], rtol=0, atol=1e-12)


class TestSwitches:
    @pytest.mark.parametrize(
        ("optimizer", "algorithm"),
        [
            (optim.FedAdagrad(initial_accumulator_value=0.0), lambda: of_flower("adagrad", 0.1, beta_1=0.0)),
            (optim.FedAdam(initial_accumulator_value=0.0, bias_correction="flower"), lambda: of_flower("adam", 0.1)),
            (optim.FedYogi(initial_accumulator_value=0.0), lambda: of_flower("yogi", 0.01)),
        ],
        ids=lambda each: getattr(each, "rule", ""),
    )
    def test_flowers(
        self, optimizer: optim.Optimizer, algorithm: Callable[[], Server], memory_client: optserve.Client, new_id: NewId
    ) -> None:
        ours = train(memory_client, new_id(), presets.fedavg(3) | {"optimizer": optimizer})
        assert_equal(ours, expected(algorithm()))

    @pytest.mark.parametrize("rule", ["adam", "yogi"])
    def test_tensorflow_federateds(self, rule: str, memory_client: optserve.Client, new_id: NewId) -> None:
        kind, epsilon, initial = (optim.FedAdam, 1e-7, 0.0) if rule == "adam" else (optim.FedYogi, 1e-3, 1e-6)
        optimizer = kind(0.05, (0.9, 0.999), tau=epsilon, initial_accumulator_value=initial, bias_correction="tff")
        ours = train(memory_client, new_id(), presets.fedavg(3) | {"optimizer": optimizer})
        assert_equal(ours, expected(of_tff(rule, 0.05, 0.9, 0.999, epsilon, initial)))


class TestWithoutRounds:
    def test_fedbuff_divides_by_the_number_of_pushes_and_the_root_of_their_age(
        self, memory_client: optserve.Client, new_id: NewId
    ) -> None:
        set_id = new_id()
        memory_client.create_parameter_set(set_id, {"x": START}, **presets.fedbuff(pushes=2))
        fast, slow = (memory_client.parameter_set(set_id, client_id=each) for each in ("fast", "slow"))
        old = slow.pull()["x"]
        deltas = np.random.default_rng(2).normal(size=(4, 17))
        fast.pull()
        assert fast.push({"x": deltas[0]}).outcome is Outcome.ACCUMULATED
        parameters = fast.step({"x": deltas[1]})["x"]
        np.testing.assert_allclose(parameters, old + (deltas[0] + deltas[1]) / 2, rtol=0, atol=1e-12)
        fast.push({"x": deltas[2]})
        after = slow.step({"x": deltas[3]})["x"]
        np.testing.assert_allclose(after, parameters + (deltas[2] + deltas[3] / np.sqrt(2)) / 2, rtol=0, atol=1e-12)

    def test_delayed_nesterov_is_diloco_once_all_have_pushed(self, client: optserve.Client, new_id: NewId) -> None:
        set_id = new_id()
        client.create_parameter_set(set_id, {"x": START}, **presets.delayed_nesterov(workers=3))
        workers = [client.parameter_set(set_id, client_id=f"worker-{k}") for k in range(3)]
        server, theirs = torch_server(lr=0.7, momentum=0.9, nesterov=True), START
        for deltas in np.random.default_rng(3).normal(size=(4, 3, 17)):
            versions = [worker.step({"x": delta}) for worker, delta in zip(workers, deltas, strict=True)]
            np.testing.assert_allclose(versions[1]["x"], versions[0]["x"] + 0.7 / 3 * deltas[1], rtol=0, atol=1e-12)
            theirs = server(theirs, deltas.mean(axis=0))
            np.testing.assert_allclose(versions[2]["x"], theirs, rtol=0, atol=1e-12)


def test_settings_are_those_of_the_papers() -> None:
    rounds = Sync(4, deadline=600.0)
    preconditioned: Mapping[str, Any] = {"betas": (0.9, 0.99), "tau": 1e-3}
    assert {name: getattr(presets, name)(4) for name in presets.__all__ if name != "Preset"} == {
        name: {"optimizer": optimizer, "policy": policy, "pushes": Pushes.DELTAS}
        for name, optimizer, policy in (
            ("fedavg", optim.SGD(lr=1.0), rounds),
            ("fedavgm", optim.SGD(lr=1.0, momentum=0.9), rounds),
            ("fedadagrad", optim.FedAdagrad(lr=0.1, beta1=0.0, tau=1e-3), rounds),
            ("fedadam", optim.FedAdam(lr=0.1, **preconditioned), rounds),
            ("fedyogi", optim.FedYogi(lr=0.01, **preconditioned), rounds),
            ("diloco", optim.SGD(lr=0.7, momentum=0.9, nesterov=True), rounds),
            ("streaming_diloco", optim.SGD(lr=0.4, momentum=0.9, nesterov=True), rounds),
            ("fedbuff", optim.SGD(lr=1.0), Buffered(4, staleness=staleness.Polynomial(0.5))),
            ("delayed_nesterov", optim.DelayedNesterov(lr=0.7, momentum=0.9, every=4), Async()),
        )
    }
    assert presets.fedbuff()["policy"] == Buffered(10, staleness=staleness.Polynomial(0.5))
    assert presets.diloco()["policy"] == Sync(deadline=600.0)
