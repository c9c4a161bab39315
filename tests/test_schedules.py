"""Schedules: torch's and optax' numbers, the same for every worker; and a record of what was changed by hand."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import optserve
from direct import DirectSet
from optserve import optim, schedules
from optserve._messages import decode_optimizer, decode_value, encode_optimizer, encode_value
from optserve.v1 import optimizer_pb2
from optserve_server import Config, Server
from optserve_server.engine.parameter_set import CHANGES_KEPT

jax.config.update("jax_enable_x64", True)

NewId = Callable[[], str]
Array = np.ndarray[Any, Any]

COUNTS = range(60)  # beyond the end of every schedule below
START = {"w": np.linspace(-1, 1, 5), "b": np.ones(3)}
DECAY = schedules.Linear(0.5, 0.0, transition_steps=10)

values = st.floats(1e-3, 1.0)
steps = st.integers(1, 20)
begins = st.integers(0, 10)
constants = st.builds(schedules.Constant, values)
linear = st.builds(schedules.Linear, values, values, steps, begins)
polynomial = st.builds(schedules.Polynomial, values, values, st.floats(0.1, 4.0), steps, begins)
exponential = st.builds(
    schedules.Exponential, values, steps, st.floats(0.1, 1.2), begins, st.booleans(), st.none() | values
)
step = st.builds(schedules.Step, values, steps, st.floats(0.1, 1.2))
boundaries = st.lists(steps, min_size=2, max_size=2, unique=True).map(sorted)
piecewise = st.builds(schedules.Piecewise, st.tuples(values, values, values), boundaries)
cosine = st.builds(schedules.Cosine, values, steps, values)
warmup_cosine = st.builds(
    lambda warmup, rest, *levels: schedules.WarmupCosine(levels[0], warmup, warmup + rest, *levels[1:]),
    st.integers(0, 20), steps, values, values, values,
)  # fmt: skip
restarts = st.builds(schedules.WarmRestarts, values, st.integers(1, 9), st.integers(1, 3), values)
one_cycle = st.builds(
    schedules.OneCycle, values, st.integers(10, 50), st.floats(0.11, 0.5), st.sampled_from(["cos", "linear"]),
    st.floats(1.0, 50.0), st.floats(1.0, 1e4), st.booleans(),
)  # fmt: skip
joined = st.builds(schedules.Joined, st.tuples(linear, cosine, restarts), boundaries)
anything = st.one_of(
    constants, linear, polynomial, exponential, step, piecewise, cosine, warmup_cosine, restarts, one_cycle, joined
)


def by_torch(rate: float, make: Callable[[Any], lr_scheduler.LRScheduler], counts: range = COUNTS) -> list[float]:
    """What a scheduler of torch gives for a number of updates."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler, rates = make(optimizer), []
    for _ in counts:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < len(counts):
            scheduler.step()
    return rates


def by_optax(schedule: schedules.Schedule) -> Callable[[Any], Any]:
    """The schedule of optax that ours says it equals."""
    arguments = schedule.arguments
    match schedule:
        case schedules.Constant():
            return optax.constant_schedule(**arguments)
        case schedules.Linear():
            return optax.linear_schedule(**arguments)
        case schedules.Polynomial():
            return optax.polynomial_schedule(**arguments)
        case schedules.Exponential():
            return optax.exponential_decay(**arguments)
        case schedules.Cosine(first, length, last):
            return optax.cosine_decay_schedule(first, length, alpha=last / first)
        case schedules.WarmupCosine():
            return optax.warmup_cosine_decay_schedule(**arguments)
        case schedules.Piecewise((first, second, third), (left, right)):
            return optax.piecewise_constant_schedule(first, {left: second / first, right: third / second})
        case schedules.Joined(parts, places):
            return optax.join_schedules([by_optax(part) for part in parts], places)
    raise AssertionError(schedule)


def check(schedule: schedules.Schedule, expected: Any, counts: range = COUNTS) -> None:
    ours = [schedule(count) for count in counts]
    assert {type(value) for value in ours} == {float}
    np.testing.assert_allclose(ours, np.broadcast_to(expected, len(counts)), rtol=1e-10, atol=1e-12)


@settings(max_examples=150)
@given(
    st.one_of(constants, linear, polynomial, exponential, cosine, warmup_cosine, piecewise)
    | st.builds(schedules.Joined, st.tuples(linear, cosine, exponential), boundaries)
)
def test_values_are_those_of_optax(schedule: schedules.Schedule) -> None:
    check(schedule, by_optax(schedule)(np.arange(len(COUNTS))))


@given(values, values, steps)
def test_linear_and_polynomial_are_torchs(first: float, last: float, length: int) -> None:
    made = by_torch(1.0, lambda o: lr_scheduler.LinearLR(o, first, last, length))
    check(schedules.Linear(first, last, length), made)
    made = by_torch(first, lambda o: lr_scheduler.PolynomialLR(o, length, power=2.0))
    check(schedules.Polynomial(first, 0.0, 2.0, length), made)


@given(step)
def test_step_and_exponential_are_torchs(schedule: schedules.Step) -> None:
    rate, size, gamma = schedule.arguments.values()
    check(schedule, by_torch(rate, lambda o: lr_scheduler.StepLR(o, size, gamma)))
    check(schedules.Exponential(rate, 1, gamma), by_torch(rate, lambda o: lr_scheduler.ExponentialLR(o, gamma)))


@given(values, boundaries)
def test_piecewise_is_torchs_with_values_for_factors(rate: float, at: list[int]) -> None:
    made = by_torch(rate, lambda o: lr_scheduler.MultiStepLR(o, at, gamma=0.5))
    check(schedules.Piecewise([rate, rate / 2, rate / 4], at), made)


@given(restarts)
def test_warm_restarts_are_torchs(schedule: schedules.WarmRestarts) -> None:
    rate, period, factor, last = schedule.arguments.values()
    made = by_torch(rate, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, period, factor, last))
    check(schedule, made)


@given(cosine)
def test_cosine_is_torchs_until_that_comes_back(schedule: schedules.Cosine) -> None:
    rate, length, last = schedule.arguments.values()
    counts = range(length + 1)
    made = by_torch(rate, lambda o: lr_scheduler.CosineAnnealingLR(o, length, last), counts)
    np.testing.assert_allclose([schedule(count) for count in counts], made, rtol=1e-7)  # torch's is a recurrence


@given(one_cycle)
def test_one_cycle_is_torchs_and_then_stays(schedule: schedules.OneCycle) -> None:
    peak, *others = schedule.arguments.values()
    names = list(schedule.arguments)[1:]
    options = dict(zip(names, others, strict=True))
    counts = range(schedule.total_steps)
    made = by_torch(peak, lambda o: lr_scheduler.OneCycleLR(o, peak, cycle_momentum=False, **options), counts)
    check(schedule, made, counts)
    assert {schedule(count) for count in (len(counts), 10**6, 2**63)} == {schedule(counts[-1])}


@given(anything)
def test_schedules_travel(schedule: schedules.Schedule) -> None:
    message = optimizer_pb2.Value.FromString(encode_value(schedule).SerializeToString())
    assert decode_value(message) == schedule
    optimizer = optim.SGD(lr=schedule, momentum=0.9)
    assert decode_optimizer(encode_optimizer(optimizer)) == optimizer
    assert hash(optimizer) == hash(decode_optimizer(encode_optimizer(optimizer)))


@given(anything, st.integers(0, 2**64))
def test_schedules_have_a_value_at_any_count(schedule: schedules.Schedule, count: int) -> None:
    assert isinstance(schedule(count), float)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "text for a number": (lambda: schedules.Constant("fast"), "value to be a finite number; got 'fast'"),
    "flag for a number": (lambda: schedules.Constant(True), "value to be a finite number; got True"),
    "infinity": (lambda: schedules.Cosine(np.inf, 10), "init_value to be a finite number; got inf"),
    "too large for a float": (lambda: schedules.Cosine(10**400, 10), "init_value to be a finite number"),
    "no steps": (lambda: schedules.Linear(1, 0, 0), "transition_steps to be a whole number, at least 1; got 0"),
    "half a step": (lambda: schedules.Step(1, 2.5), "step_size to be a whole number, at least 1; got 2.5"),
    "too many steps": (lambda: schedules.Cosine(1, 2**63), "decay_steps to be a whole number"),
    "negative begin": (lambda: schedules.Linear(1, 0, 5, -1), "transition_begin to be a whole number, at least 0"),
    "no rate": (lambda: schedules.Exponential(1, 10, 0), "decay_rate to be above 0; got 0"),
    "number for a flag": (lambda: schedules.Exponential(1, 10, 0.5, staircase=1), "staircase to be True or False"),
    "one value": (lambda: schedules.Piecewise(1.0, [10]), "values to be several in order; got 1.0"),
    "boundaries that descend": (lambda: schedules.Piecewise([1, 2, 3], [10, 5]), r"boundaries to ascend; got \(10, 5\)"),
    "a value too few": (lambda: schedules.Piecewise([1, 2], [5, 10]), "one more of values than boundaries; got 2 and 2"),
    "a part too few": (lambda: schedules.Joined([DECAY], [5]), "one more of schedules than boundaries; got 1 and 1"),
    "parts that are numbers": (lambda: schedules.Joined([DECAY, 0.1], [5]), r"schedules\[1\] to be a schedule; got 0.1"),
    "nothing but warm-up": (lambda: schedules.WarmupCosine(1, 10, 10), "fewer warmup_steps than decay_steps"),
    "no way up": (lambda: schedules.OneCycle(1, 10, pct_start=0.1), "pct_start times total_steps to be above 1"),
    "share above one": (lambda: schedules.OneCycle(1, 10, 1.5), "pct_start to be above 0 and at most 1; got 1.5"),
    "unknown strategy": (lambda: schedules.OneCycle(1, 10, anneal_strategy="sin"), "'cos' or 'linear'; got 'sin'"),
    "a flag of an optimizer": (lambda: optim.Adam(maximize=DECAY), "maximize to be a value: only numbers.*got Linear"),
    "a pair": (lambda: optim.Adam(betas=DECAY), "betas to be a value: only numbers.*got Linear"),
    "in a pair": (lambda: optim.Adam(betas=(DECAY, 0.999)), r"betas\[0\] to be a number; got Linear"),
    "a convention": (lambda: optim.Adam(convention=DECAY), "convention to be a value"),
    "what does not change live": (lambda: optim.Rprop(lr=DECAY), "lr to be a value: only numbers that may change live"),
    "too large to travel": (
        lambda: encode_value(schedules.Piecewise([0.5] * 101, range(1, 101))), "at most 1024 bytes.*got Piecewise of 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused_where_it_is_written(make: Callable[[], object], message: str) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match=message):
        make()


def schedule_message(name: str, **arguments: Any) -> optimizer_pb2.Value:
    encoded = {key: encode_value(value) for key, value in arguments.items()}
    return optimizer_pb2.Value(schedule=optimizer_pb2.Schedule(name=name, arguments=encoded))


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (schedule_message("Cosin"), "a schedule among Constant, .*got 'Cosin'"),
        (schedule_message("Constant"), "the arguments value of Constant; got none"),
        (schedule_message("Step", init_value=1.0, step_size=1, begin=2), r"step_size, gamma \(optional\) of Step; got begin"),
        (schedule_message("Constant", value=None), "value to be a finite number; got None"),
        (schedule_message("Piecewise", values=[0.5] * 101, boundaries=[]), "at most 1024 bytes"),
    ],
)  # fmt: skip
def test_messages_that_no_schedule_makes_are_refused(message: optimizer_pb2.Value, refusal: str) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match=refusal):
        decode_value(message)


def gradients(count: int) -> dict[str, Array]:
    rng = np.random.default_rng(count)
    return {name: rng.normal(size=array.shape) for name, array in START.items()}


def default(**hyperparameters: Any) -> dict[str, dict[str, Any]]:
    return {"default": hyperparameters}


def assert_equal(left: Mapping[str, Array], right: Mapping[str, Array]) -> None:
    for name in START:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.SGD(lr=schedules.OneCycle(0.1, 10), momentum=schedules.Linear(0.0, 0.9, 4)),
        optim.RMSprop(lr=0.01, momentum=schedules.Cosine(0.9, 5)),
        optim.AdamW(lr=schedules.WarmupCosine(0.1, 3, 7), weight_decay=schedules.Step(0.1, 2)),
        optim.Lion(lr=schedules.Joined([schedules.Linear(0, 0.1, 3), schedules.WarmRestarts(0.1, 2)], [3])),
    ],
    ids=lambda optimizer: optimizer.rule,
)
def test_an_update_has_the_bits_of_one_whose_values_were_pushed(optimizer: optim.Optimizer) -> None:
    plain = optimizer.replace(**dict.fromkeys(optimizer.schedules, 0.5))
    ours, theirs = DirectSet(START, optimizer), DirectSet(START, plain)
    for count in range(10):
        now = {name: schedule(count) for name, schedule in optimizer.schedules.items()}
        if now.get("momentum") == 0.0:
            now["momentum"] = 5e-324  # by itself, a value of 0 would be another rule
        receipts = ours.push(gradients(count)), theirs.push(gradients(count), default(**now))
        assert all(receipt.applied for receipt in receipts)
        assert receipts[0].learning_rate == optimizer.at(count).lr
        assert_equal(ours.pull(), theirs.pull())


def test_groups_follow_their_own_schedules(client: optserve.Client, new_id: NewId) -> None:
    warmup = schedules.WarmupCosine(0.1, warmup_steps=4, decay_steps=8, init_value=0.01)
    optimizer = optim.AdamW(lr=warmup, weight_decay=schedules.Linear(0.0, 0.2, 6))
    group = optim.Group("bias", "b", lr=DECAY, weight_decay=0.0)
    weights = client.create_parameter_set(new_id(), START, optimizer, groups=[group])
    twin = client.create_parameter_set(
        new_id(), START, optim.AdamW(), groups=[optim.Group("bias", "b", weight_decay=0.0)]
    )
    for count in range(12):
        described = weights.describe()
        now, bias = (each.optimizer for each in described.groups)
        assert (now, bias) == (optimizer.at(count), optimizer.replace(lr=DECAY(count), weight_decay=0.0))
        assert described.groups[0].schedules == {"lr": warmup, "weight_decay": optimizer.weight_decay}
        assert described.groups[1].schedules == {"lr": DECAY}
        explicit = default(lr=now.lr, weight_decay=now.weight_decay) | {"bias": {"lr": DECAY(count)}}
        params = weights.step(gradients(count))
        assert_equal(params, twin.step(gradients(count), hyperparameters=explicit))
        assert params.receipt is not None
        assert params.receipt.learning_rates == {"default": warmup(count), "bias": DECAY(count)}
    assert weights.describe().spec.optimizer == optimizer
    assert weights.describe().spec.groups == (group,)
    assert weights.describe().changes == ()


def test_workers_that_push_at_once_agree(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    workers = [client.create_parameter_set(set_id, START, optim.SGD(lr=DECAY), exist_ok=True) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda worker: [worker.push(START) for _ in range(5)], workers))
    for receipt in (each for every in receipts for each in every):
        assert receipt.learning_rate == DECAY(receipt.version - 1)


def test_a_round_is_one_update_of_the_schedule(client: optserve.Client, new_id: NewId) -> None:
    set_id, policy = new_id(), optserve.Sync(workers=2, deadline=60)
    workers = [
        client.create_parameter_set(set_id, START, optim.SGD(lr=DECAY), policy=policy, exist_ok=True) for _ in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        for count in range(3):
            receipts = list(pool.map(lambda worker: worker.push(START), workers))
            assert [receipt.learning_rate for receipt in receipts] == [DECAY(count)] * 2


def test_a_schedule_begins_where_the_set_is(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(lr=1.0))
    weights.push(START)
    weights.push(START)
    assert weights.update(lr=DECAY).groups[0].optimizer.lr == DECAY(2)
    assert weights.push(START).learning_rate == DECAY(2)
    other = schedules.Constant(0.25)
    assert weights.push(START, hyperparameters=default(weight_decay=other, lr=DECAY)).applied
    assert weights.describe().groups[0].schedules == {"lr": DECAY, "weight_decay": other}
    assert weights.update(lr=0.125).groups[0].schedules == {"weight_decay": other}
    assert weights.push(START).learning_rate == 0.125
    assert weights.describe().changes == (
        optserve.Change(2, "default", {"lr": DECAY}),
        optserve.Change(3, "default", {"weight_decay": other}),
        optserve.Change(4, "default", {"lr": 0.125}),
    )


@pytest.mark.parametrize("value", [0.1, DECAY(1), schedules.Constant(0.1)], ids=["other", "the same now", "schedule"])
def test_a_push_can_not_take_a_value_from_its_schedule(client: optserve.Client, new_id: NewId, value: Any) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(lr=DECAY))
    first = weights.step(START)
    message = r"lr follows a schedule on the server; got .*use update\(\) to replace Linear"
    with pytest.raises(optserve.InvalidHyperparameter, match=message):
        weights.push(START, hyperparameters=default(lr=value, weight_decay=0.5))
    assert_equal(weights.pull(), first)
    assert weights.describe().groups[0].optimizer == optim.SGD(lr=DECAY(1))
    assert weights.push(START, hyperparameters=default(lr=DECAY)).learning_rate == DECAY(1)
    assert weights.describe().changes == ()


def test_a_schedule_that_leaves_its_range_stops_updates_until_it_is_replaced(
    client: optserve.Client, new_id: NewId
) -> None:
    falling = schedules.Exponential(0.5, 1, 0.5, end_value=0.25)
    below = schedules.Joined([falling, schedules.Constant(-1.0)], [2])
    group = optim.Group("bias", "b", lr=0.5)
    weights = client.create_parameter_set(new_id(), START, optim.SGD(lr=below), groups=[group])
    weights.push(START)
    last = weights.step(START)
    for _ in range(2):
        with pytest.raises(
            optserve.InvalidHyperparameter, match=r"after 2 updates: expected lr .*at least 0; got -1.0"
        ):
            weights.push(START, hyperparameters={"bias": {"lr": 0.1}})
    assert_equal(weights.pull(), last)
    described = weights.describe()
    assert (described.version, described.changes) == (2, ())
    assert [each.optimizer.lr for each in described.groups] == [below, 0.5]
    with pytest.raises(optserve.InvalidHyperparameter, match="after 2 updates"):
        weights.update(lr=schedules.Constant(-2.0))
    assert weights.update(group="bias", lr=0.25).groups[1].optimizer.lr == 0.25
    assert weights.update(lr=falling).groups[0].optimizer.lr == falling(2)
    assert weights.push(START).learning_rates == {"default": 0.25, "bias": 0.25}


def test_a_set_whose_first_update_would_be_refused_is_not_created(client: optserve.Client, new_id: NewId) -> None:
    group = optim.Group("bias", "b", lr=schedules.Linear(-0.1, 0.1, 10))
    with pytest.raises(optserve.InvalidHyperparameter, match=r"after 0 updates: expected lr .*got -0.1"):
        client.create_parameter_set(new_id(), START, optim.SGD(), groups=[group])


def test_a_schedule_can_not_change_which_state_there_is(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD())
    with pytest.raises(optserve.InvalidHyperparameter, match="values that keep the state"):
        weights.update(momentum=DECAY)
    with pytest.raises(optserve.InvalidHyperparameter, match="nesterov to be a value"):
        weights.update(nesterov=DECAY)
    assert weights.describe().groups[0].optimizer == optim.SGD()


def test_weight_decay_that_begins_later_asks_for_the_parameters_then(client: optserve.Client, new_id: NewId) -> None:
    later = schedules.Piecewise([0.0, 0.1], [1])
    moments = client.create_parameter_set(new_id(), START, optim.SGD(weight_decay=later), holds="moments")
    moments.push(START)
    with pytest.raises(optserve.TensorMismatch, match="weight decay reads the parameters"):
        moments.push(START)
    assert moments.push(START, parameters=START).applied


def test_schedules_and_changes_survive_a_restart(tmp_path: Path) -> None:
    config = Config(listen="127.0.0.1:0", data_dir=tmp_path)
    optimizer = optim.AdamW(lr=schedules.OneCycle(0.1, 10), weight_decay=schedules.Piecewise([0.1, 0.2], [4]))
    undisturbed = DirectSet(START, optimizer)
    changes = default(betas=[0.8, 0.99], eps=DECAY)
    for count in range(3):
        undisturbed.push(gradients(count), changes if count == 2 else None)
    with Server(config) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a", START, optimizer)
        for count in range(3):
            weights.push(gradients(count), hyperparameters=changes if count == 2 else None)
        weights.checkpoint()
        before = weights.describe()
    with Server(config) as server, optserve.Client(server.address) as client:
        weights = client.parameter_set("a")
        after = weights.describe()
        assert (after.spec, after.groups, after.changes) == (before.spec, before.groups, before.changes)
        assert after.changes == (optserve.Change(2, "default", {"betas": (0.8, 0.99), "eps": DECAY}),)
        for count in range(3, 12):
            expected, params = undisturbed.push(gradients(count)), weights.step(gradients(count))
            assert params.receipt is not None
            assert params.receipt.learning_rates == expected.learning_rates
            assert_equal(params, undisturbed.pull())


def test_changes_are_recorded_with_the_version_that_they_followed(client: optserve.Client, new_id: NewId) -> None:
    group = optim.Group("bias", "b", lr=0.5)
    weights = client.create_parameter_set(new_id(), START, optim.SGD(lr=1.0), groups=[group])
    weights.push(START, hyperparameters=default(lr=1.0) | {"bias": {"lr": 0.5}})  # what they are already
    weights.push(START, hyperparameters=default(lr=0.5, weight_decay=0.0) | {"bias": {"lr": 0.25}})
    with pytest.raises(optserve.NonFiniteValue):
        weights.push({"b": np.full(3, np.nan)}, hyperparameters=default(lr=2.0))
    with pytest.raises(optserve.InvalidHyperparameter):
        weights.update(lr=-1.0)
    assert weights.update(lr=0.5).changes == weights.describe().changes
    weights.update(lr=0.75, maximize=True)
    assert weights.describe().changes == (
        optserve.Change(1, "default", {"lr": 0.5}),
        optserve.Change(1, "bias", {"lr": 0.25}),
        optserve.Change(2, "default", {"lr": 0.75, "maximize": True}),
    )


def test_the_last_thousand_changes_are_kept() -> None:
    direct = DirectSet(START, optim.SGD(lr=1.0))
    for count in range(CHANGES_KEPT + 5):
        direct.set.update(default(lr=0.5 + count))
    recorded = direct.set.describe().changes
    assert [change.values["lr"] for change in recorded] == [0.5 + count for count in range(5, CHANGES_KEPT + 5)]
