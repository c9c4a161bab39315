"""Staleness: what each rule makes of a gradient from earlier parameters is its equation, written here a second time."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import optserve
from direct import DirectSet
from optserve import Async, BoundedStaleness, Buffered, Outcome, Policy, Sync, optim, staleness
from optserve_server.engine.staleness import bucket

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NewId = Callable[[], str]

SHAPES = {"w": (23, 5), "b": (7,), "scalar": ()}
WORKERS = ("first", "second", "third")
LR = 0.25

RULES: dict[str, staleness.Staleness | None] = {
    "none": None,
    "Reject": staleness.Reject(1),
    "DivideLearningRate": staleness.DivideLearningRate(),
    "Polynomial": staleness.Polynomial(a=0.7),
    "DelayCompensation": staleness.DelayCompensation(scale=0.3),
    "GapAware": staleness.GapAware(decay=0.8),
}
OPTIMIZERS = {"SGD": optim.SGD(lr=LR), "momentum": optim.Momentum(lr=LR, momentum=0.9), "Adam": optim.Adam(lr=LR)}
TOLERANCES = {np.float64: 1e-13, np.float32: 2e-5, ml_dtypes.bfloat16: 2e-2}  # of the largest magnitude


def drawn(random: np.random.Generator, dtype: Any) -> Tensors:
    return {name: np.asarray(random.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


class Model:
    """A set as the documentation has it, in float64, one element like the other."""

    def __init__(self, start: Tensors, optimizer: optim.Optimizer, policy: Policy, pushes: str) -> None:
        self.now = {name: value.astype(np.float64) for name, value in start.items()}
        self.version = 0
        self.histogram: Counter[int] = Counter()
        self._rule, self._optimizer, self._policy, self._pushes = policy.staleness, optimizer, policy, pushes
        self._bases: dict[str, tuple[int, Tensors]] = {}
        self._first, self._second, self._squares = ({name: 0.0 * v for name, v in self.now.items()} for _ in range(3))
        self._buffer: list[tuple[float, Tensors]] = []

    def pull(self, worker: str) -> Tensors:
        self._bases[worker] = self.version, dict(self.now)
        return self.now

    def push(self, worker: str, pushed: Tensors, loss_scale: float, samples: float) -> tuple[Outcome, int, float]:
        """Outcome, staleness and learning rate."""
        version, base = self._bases[worker]
        tau = self.version - version
        self.histogram[bucket(tau)] += 1
        if isinstance(self._rule, staleness.Reject) and tau > self._rule.bound:
            return Outcome.DISCARDED, tau, float("nan")
        gradient = {name: self._gradient(name, value, base[name]) / loss_scale for name, value in pushed.items()}
        gradient = {name: self._compensated(name, g, base[name]) for name, g in gradient.items()}
        alone, rate = not isinstance(self._policy, Buffered), LR
        weight = (1.0 + tau) ** -self._rule.a if isinstance(self._rule, staleness.Polynomial) else 1.0
        if isinstance(self._rule, staleness.DivideLearningRate):
            rate, weight = (LR / max(1, tau), 1.0) if alone else (LR, 1.0 / max(1, tau))
        self._buffer.append((samples, {name: weight * g for name, g in gradient.items()}))
        if isinstance(self._policy, Buffered) and self._policy.pushes and len(self._buffer) < self._policy.pushes:
            return Outcome.ACCUMULATED, tau, float("nan")
        count = sum(n for n, _ in self._buffer)
        if isinstance(self._policy, Buffered) and self._policy.samples and count < self._policy.samples:
            return Outcome.ACCUMULATED, tau, float("nan")
        mean = {name: sum(n * each[name] for n, each in self._buffer) / count for name in self.now}
        self._buffer.clear()
        self._update(mean, rate)
        return Outcome.APPLIED, tau, rate

    def _gradient(self, name: str, pushed: Array, base: Array) -> Array:
        value = pushed.astype(np.float64)
        return {"gradients": value, "deltas": -value, "parameters": base - value}[self._pushes]

    def _compensated(self, name: str, gradient: Array, base: Array) -> Array:
        moved = self.now[name] - base
        if isinstance(self._rule, staleness.DelayCompensation):
            return gradient + self._rule.scale * gradient**2 * moved
        if isinstance(self._rule, staleness.GapAware) and np.any(moved):
            usual = np.sqrt(self._squares[name] / (1 - self._rule.decay**self.version))
            return gradient / (1 + np.abs(moved) / usual)
        return gradient

    def _update(self, mean: Tensors, rate: float) -> None:
        self.version += 1
        for name, g in mean.items():
            before = self.now[name]
            match self._optimizer:
                case optim.Adam(betas=(one, two), eps=eps):
                    self._first[name] = one * self._first[name] + (1 - one) * g
                    self._second[name] = two * self._second[name] + (1 - two) * g**2
                    m = self._first[name] / (1 - one**self.version)
                    v = self._second[name] / (1 - two**self.version)
                    self.now[name] = before - rate * m / (np.sqrt(v) + eps)
                case optim.Momentum(momentum=momentum):
                    self._first[name] = momentum * self._first[name] + g
                    self.now[name] = before - rate * self._first[name]
                case _:
                    self.now[name] = before - rate * g
            if isinstance(self._rule, staleness.GapAware):
                decay, step = self._rule.decay, self.now[name] - before
                self._squares[name] = decay * self._squares[name] + (1 - decay) * step**2


def assert_follows(
    client: optserve.Client,
    set_id: str,
    optimizer: optim.Optimizer,
    policy: Policy,
    *,
    pushes: str = "gradients",
    dtype: Any = np.float64,
    seed: int = 0,
) -> Counter[Outcome]:
    """That a set does what the model does while workers pull and push in a random order; what became of the pushes."""
    random = np.random.default_rng(seed)
    start = drawn(random, dtype)
    model = Model(start, optimizer, policy, pushes)
    outcomes: Counter[Outcome] = Counter()
    with client.create_parameter_set(set_id, start, optimizer, policy=policy, pushes=pushes) as created:
        handles = {name: client.parameter_set(set_id, client_id=name) for name in WORKERS}
        for worker, handle in handles.items():
            handle.pull()
            model.pull(worker)
        for _ in range(25):
            worker = str(random.choice(WORKERS))
            pushed, samples = drawn(random, dtype), float(random.integers(1, 9))
            scale = 1.0 if pushes == "parameters" else float(random.choice([1.0, 8.0, 0.3]))
            receipt = handles[worker].push(pushed, loss_scale=scale, samples=samples)
            outcome, tau, rate = model.push(worker, pushed, scale, samples)
            assert (receipt.outcome, receipt.staleness, receipt.version) == (outcome, tau, model.version)
            np.testing.assert_equal(receipt.learning_rate, rate)
            outcomes[outcome] += 1
            if random.random() < 0.5:
                worker = str(random.choice(WORKERS))
                assert_near(handles[worker].pull(), model.pull(worker), TOLERANCES[dtype])
        assert_near(created.pull(), model.now, TOLERANCES[dtype])
        assert dict(created.describe().staleness) == dict(model.histogram)
        assert max(model.histogram) > 1
        created.delete()
    return outcomes


def assert_near(ours: optserve.Parameters, expected: Tensors, tolerance: float) -> None:
    for name, each in expected.items():
        error = np.abs(ours[name].astype(np.float64) - each).max()
        assert error <= tolerance * np.abs(each).max(), (name, error)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_stale_push_is_treated_as_the_equation_says(
    client: optserve.Client, new_id: NewId, rule: str, optimizer: str
) -> None:
    outcomes = assert_follows(client, new_id(), OPTIMIZERS[optimizer], Async(staleness=RULES[rule]))
    assert outcomes.keys() == {Outcome.APPLIED} | ({Outcome.DISCARDED} if rule == "Reject" else set())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [{"pushes": 3}, {"samples": 12.0}], ids=str)
def test_in_a_buffer_each_push_has_its_own_staleness_and_weight(
    memory_client: optserve.Client, new_id: NewId, rule: str, size: dict[str, Any]
) -> None:
    policy = Buffered(**size, staleness=RULES[rule])
    outcomes = assert_follows(memory_client, new_id(), OPTIMIZERS["momentum"], policy, seed=1)
    assert outcomes.keys() >= {Outcome.APPLIED, Outcome.ACCUMULATED}


@pytest.mark.parametrize("pushes", ["deltas", "parameters"])
@pytest.mark.parametrize("rule", RULES)
def test_deltas_and_parameters_may_be_stale_as_well(
    memory_client: optserve.Client, new_id: NewId, rule: str, pushes: str
) -> None:
    assert_follows(memory_client, new_id(), OPTIMIZERS["SGD"], Async(staleness=RULES[rule]), pushes=pushes, seed=2)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        ("Polynomial", np.float32),
        ("GapAware", np.float32),
        ("DelayCompensation", ml_dtypes.bfloat16),
    ],
)
def test_in_every_dtype(memory_client: optserve.Client, new_id: NewId, rule: str, dtype: Any) -> None:
    assert_follows(memory_client, new_id(), OPTIMIZERS["SGD"], Async(staleness=RULES[rule]), dtype=dtype, seed=3)


def test_a_bounded_lead_may_have_a_rule_for_the_rest(memory_client: optserve.Client, new_id: NewId) -> None:
    policy = BoundedStaleness(100, staleness=RULES["Polynomial"])
    assert_follows(memory_client, new_id(), OPTIMIZERS["SGD"], policy, seed=4)


def test_late_pushes_of_a_round_may_have_a_rule(memory_client: optserve.Client, new_id: NewId) -> None:
    """Here rounds of one, which are updates of their own."""
    policy = Sync(1, late="carry", staleness=RULES["DelayCompensation"])
    assert_follows(memory_client, new_id(), OPTIMIZERS["SGD"], policy, seed=5)


def test_what_has_not_changed_since_is_not_stale(client: optserve.Client, new_id: NewId) -> None:
    """Workers that push a part of the tensors each do not disturb each other."""
    start, set_id, ones = {"w": np.zeros(3), "b": np.zeros(2)}, new_id(), {"w": np.ones(3), "b": np.ones(2)}
    created = client.create_parameter_set(
        set_id, start, optim.SGD(lr=1.0), policy=Async(staleness=staleness.DivideLearningRate())
    )
    first, second = (client.parameter_set(set_id, client_id=each) for each in ("first", "second"))
    for each in (first, second):
        each.pull()
    for _ in range(3):
        second.push({"b": ones["b"]})
    fresh = first.push({"w": ones["w"]})
    assert (fresh.staleness, fresh.learning_rate, fresh.version) == (0, 1.0, 4)
    stale = first.push(ones)
    assert (stale.staleness, stale.learning_rate) == (4, 0.25)
    assert dict(created.describe().staleness) == {0: 2, 1: 1, 2: 1, 4: 1}
    np.testing.assert_array_equal(created.pull()["w"], -1.25)


def test_updates_that_share_a_pass_have_a_staleness_each() -> None:
    direct = DirectSet({"w": np.zeros(3)}, optim.SGD(lr=1.0), policy=Async(staleness=staleness.DivideLearningRate()))
    receipts = direct.push_together([{"w": np.ones(3)}] * 4, base=direct.set.position)
    assert [each.staleness for each in receipts] == [0, 1, 2, 3]
    assert [each.learning_rate for each in receipts] == [1.0, 1.0, 1 / 2, 1 / 3]
    np.testing.assert_allclose(direct.pull()["w"], -(1 + 1 + 1 / 2 + 1 / 3), rtol=1e-15)


def test_the_histogram_counts_by_powers_of_two_from_sixteen_on(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), {"w": np.zeros(1)}, optim.SGD())
    for _ in range(70):
        weights.push({"w": np.ones(1)})
    assert dict(weights.describe().staleness) == dict.fromkeys(range(16), 1) | {16: 16, 32: 32, 64: 6}


def test_what_has_not_moved_is_compensated_by_nothing_however_large_its_gradient_is(
    memory_client: optserve.Client, new_id: NewId
) -> None:
    set_id, start = new_id(), {"w": np.zeros(2, np.float32)}
    policy = Async(staleness=staleness.DelayCompensation())
    memory_client.create_parameter_set(set_id, start, optim.SGD(lr=1.0), policy=policy)
    first, second = (memory_client.parameter_set(set_id, client_id=each) for each in ("first", "second"))
    for each in (first, second):
        each.pull()
    second.push({"w": np.array([1, 0], np.float32)})
    assert first.push({"w": np.array([0, 3e38], np.float32)}).staleness == 1
    np.testing.assert_array_equal(first.pull()["w"], np.array([-1, -3e38], np.float32))


def test_a_schedule_is_evaluated_first_and_its_value_divided(memory_client: optserve.Client, new_id: NewId) -> None:
    schedule = optserve.schedules.Linear(1.0, 0.5, 10)
    weights = memory_client.create_parameter_set(
        new_id(), {"w": np.zeros(1)}, optim.SGD(lr=schedule), policy=Async(staleness=staleness.DivideLearningRate())
    )
    for tau in range(4):
        receipt = weights.push({"w": np.ones(1)})
        assert receipt.learning_rate == schedule(tau) / max(1, tau)
    assert weights.describe().groups[0].schedules == {"lr": schedule}


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (staleness.Reject, [-1, 1.5, True]),
        (staleness.Polynomial, [0.0, -1.0, float("nan")]),
        (staleness.DelayCompensation, [0.0, float("inf")]),
        (staleness.GapAware, [0.0, 1.0, 1.5]),
    ],
)
def test_a_rule_that_can_not_be_meant_is_refused(rule: Any, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(optserve.InvalidPolicy, match="expected"):
            rule(value)
