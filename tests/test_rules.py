"""Every rule against an independent implementation, on the engine; `test_rules_everywhere` has the other paths into it."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import numpy as np
import pytest
import torch

from direct import DirectSet
from optimizer_table import ROWS, Array, Row, Step, torch_in_float64
from optserve import optim
from optserve_server.engine.rules import (
    RULES,
    Preparation,
    Rule,
    TensorRule,
    adam,
    adaptive,
    automatic,
    factored,
    federated,
    layerwise,
    momentum,
    orthogonal,
    preparation,
    rule_for,
)

ONE = np.ones((), np.float32)
OTHER = optim.Group("other", "y")  # or rules that see whole groups would see it
STEPS = 100
SMALL, SIZE = 17, 4097
MORE_SIZES = (1, 15, 100_003)  # of some rows
VARIED = (
    "nesterov",
    "lion-decay",
    "rmsprop-centered-momentum",
    "ftrl-options",
    "adamw-decay",
    "adan-decay",
    "keras-amsgrad",
)
BEYOND = 1e-3  # of a tensor's elements, where a rule is chaotic


def history(row: Row, size: int, dtype: type = np.float64) -> tuple[Array, list[Step]]:
    """Parameters, and what is pushed: noise around a drift, with scales from 1e-3 to 1e1 over the elements.

    One element in eight has gradients near 1e-8, the epsilon of most rules; one has none but zeros, of either sign; and one
    begins with the root of where Yogi's average begins. The tensor is absent at step 30, the learning rate falls to 0.3 of
    itself at step 50, and gradients fall 100-fold at step 70.
    """
    shape = row.shapes.get(size, (size,))
    size = math.prod(shape)
    rng = np.random.default_rng(size)
    parameters = rng.normal(size=size)
    scale = 10.0 ** rng.uniform(-3, 1, size)
    parameters[0], scale[0] = 4.0, 0.01  # lest the largest magnitude is nothing, where there is one element
    scale[3::8] = 1e-8
    scale[5:6] = 0.0
    steps = []
    for k in range(STEPS):
        gradient = scale * (rng.normal(size=size) + 0.3) * (0.01 if k >= 70 else 1.0)
        if k == 0:
            gradient[7:8] = 1e-3
        lr = row.optimizer.lr * (0.3 if row.live and k >= 50 else 1.0)
        steps.append(Step(None if k == 30 else gradient.reshape(shape).astype(dtype), lr))
    return parameters.reshape(shape).astype(dtype), steps


def in_float64(steps: list[Step]) -> list[Step]:
    """The same steps, with the same values."""
    return [Step(None if step.gradient is None else step.gradient.astype(np.float64), step.lr) for step in steps]


def distances(left: Array, right: Array) -> Array:
    """Differences, relative to the tensor's largest magnitude."""
    return np.abs(left.astype(np.float64) - right) / np.abs(right).max()


def pushes(row: Row, steps: list[Step]) -> Iterator[tuple[dict[str, Array], dict[str, dict[str, float]]]]:
    """What a worker pushes: gradients, and the changes of hyperparameters with them."""
    lr = row.optimizer.lr
    for step in steps:
        gradients = {"y": ONE} | ({} if step.gradient is None else {"x": step.gradient})
        yield gradients, {"default": {"lr": step.lr}} if step.lr != lr else {}
        lr = step.lr


def pulled(row: Row, pull: Callable[..., Mapping[str, Array]]) -> Array:
    """The parameters; or those and the ones to evaluate."""
    return np.stack([pull()["x"], pull(evaluation=True)["x"]]) if row.evaluates else pull()["x"]


def run_direct(row: Row, parameters: Array, steps: list[Step], threads: int = 2) -> Array:
    direct = DirectSet({"x": parameters, "y": ONE}, row.optimizer, threads=threads, groups=[OTHER])
    for gradients, changes in pushes(row, steps):
        receipt = direct.push(gradients, changes)
        assert receipt.applied, receipt.refusal
    return pulled(row, direct.pull)


def name_of(value: object) -> str:
    """A row's name, or a size, or a dtype."""
    return value.name if isinstance(value, Row) else str(getattr(value, "__name__", value))


varied = [ROWS[name] for name in VARIED]
rules = {rule_for(row.optimizer): row for row in ROWS.values()}.values()  # one row of each
EVERY = [*product(ROWS.values(), (SIZE,)), *product(rules, (SMALL,)), *product(varied, MORE_SIZES)]


@pytest.mark.parametrize(("row", "size"), EVERY, ids=name_of)
def test_float64_equals_the_oracle_to_1e_12(row: Row, size: int) -> None:
    parameters, steps = history(row, size)
    assert distances(run_direct(row, parameters, steps), row.oracle(parameters, steps)).max() <= 1e-12


@pytest.mark.parametrize(("row", "size"), EVERY, ids=name_of)
def test_float32_is_as_close_to_float64_as_the_oracle_is(row: Row, size: int) -> None:
    parameters, steps = history(row, size, np.float32)
    exact = row.oracle(parameters.astype(np.float64), in_float64(steps))
    ours, theirs = (
        distances(each, exact) for each in (run_direct(row, parameters, steps), row.oracle(parameters, steps))
    )
    if row.chaotic:
        assert np.mean(ours > 2e-6) <= max(BEYOND, 1.5 * np.mean(theirs > 2e-6))
        return
    assert ours.max() <= 2e-6
    if size >= 4097:
        assert ours.max() <= 1.5 * theirs.max()


def test_every_optimizer_of_the_catalogue_is_in_the_table() -> None:
    assert {row.optimizer.rule for row in ROWS.values()} == {name for name in optim.catalogue() if hasattr(optim, name)}


def test_every_variant_of_a_rule_is_in_the_table() -> None:
    modules = (adam, adaptive, automatic, factored, federated, layerwise, momentum, orthogonal)
    values = [value for module in modules for value in vars(module).values()]
    values += [*adaptive.RMSPROPS.values(), *RULES.values()]
    known = {value for value in values if isinstance(value, Rule | TensorRule)}
    assert {rule_for(row.optimizer) for row in ROWS.values()} == known


def test_an_optimizer_descends_and_does_not_decay_unless_it_says_so() -> None:
    assert preparation(optim.Optimizer()) == Preparation(scale=1.0, bound=0.0, l2=0.0, shrink=0.0)


def test_asgd_averages_as_torch_does() -> None:
    """What its parameters do not tell."""
    optimizer = optim.ASGD(lr=0.05, t0=20.0)
    parameters, steps = history(ROWS["asgd"], 17)
    direct = DirectSet({"x": parameters}, optimizer)
    with torch_in_float64():
        tensor = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
        theirs = torch.optim.ASGD([tensor], lr=0.05, t0=20.0, foreach=False)
        for gradient in (step.gradient for step in steps if step.gradient is not None):
            tensor.grad = torch.from_numpy(gradient.copy())
            theirs.step()
            direct.push({"x": gradient})
            assert distances(direct.slot("x", "ax"), theirs.state[tensor]["ax"].numpy()).max() <= 1e-12


def test_momenta_agree_while_the_learning_rate_is_constant_and_differ_once_it_changes() -> None:
    parameters, steps = history(ROWS["sgd"], 17)
    gradients = [step.gradient for step in steps if step.gradient is not None]
    buffered = DirectSet({"x": parameters}, optim.Momentum(lr=0.01))
    velocity = DirectSet({"x": parameters}, optim.VelocityMomentum(lr=0.01))
    for step, gradient in enumerate(gradients):
        if step == 50:
            np.testing.assert_allclose(buffered.pull()["x"], velocity.pull()["x"], rtol=1e-12, atol=1e-12)
            buffered.set.update({"default": {"lr": 0.001}})
            velocity.set.update({"default": {"lr": 0.001}})
        buffered.push({"x": gradient})
        velocity.push({"x": gradient})
    assert np.abs(buffered.pull()["x"] - velocity.pull()["x"]).max() > 1e-3


def test_delayed_nesterov_is_nesterov_with_the_mean_of_n_gradients() -> None:
    gradients = np.random.default_rng(0).normal(size=(4, 5, 17))
    delayed = DirectSet({"x": np.zeros(17)}, optim.DelayedNesterov(lr=0.3, every=5))
    nesterov = DirectSet({"x": np.zeros(17)}, optim.Nesterov(lr=0.3))
    for some in gradients:
        for gradient in some:
            delayed.push({"x": gradient})
        nesterov.push({"x": some.mean(axis=0)})
        assert distances(delayed.pull()["x"], nesterov.pull()["x"]).max() <= 1e-12


def test_delayed_nesterov_goes_on_after_a_checkpoint_at_any_update() -> None:
    gradients = np.random.default_rng(0).normal(size=(8, 17))
    optimizer = optim.DelayedNesterov(every=4, c=0.1)
    expected = DirectSet({"x": np.zeros(17)}, optimizer)
    interrupted = DirectSet({"x": np.zeros(17)}, optimizer)
    for gradient in gradients:
        expected.push({"x": gradient})
        interrupted = interrupted.restored()
        interrupted.push({"x": gradient})
        np.testing.assert_array_equal(interrupted.pull()["x"], expected.pull()["x"])
