"""`RemoteOptimizer` of a Keras model, with the JAX backend, against Keras' own optimizers."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import optserve
from optserve import optim, schedules
from optserve.keras import RemoteOptimizer
from optserve.optim import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' variables

NewId = Callable[[], str]
STEPS, BATCH = 20, 16


def network() -> Any:
    """With a layer that learns nothing, and the same initial values each time."""
    keras.utils.set_random_seed(0)
    frozen = keras.layers.Dense(6, name="frozen", trainable=False)
    layers = [frozen, keras.layers.Dense(8, "tanh", name="first"), keras.layers.Dense(1, name="second")]
    return keras.Sequential([keras.Input((4,)), *layers], name="network")


def fitted(optimizer: Any, *callbacks: Any, **options: Any) -> Any:
    """A model after two epochs of ten steps."""
    model, random = network(), np.random.default_rng(0)
    inputs = random.normal(size=(STEPS // 2 * BATCH, 4)).astype(np.float32)
    model.compile(optimizer, "mse", **options)
    model.fit(inputs, inputs.sum(1, keepdims=True), BATCH, 2, verbose=0, shuffle=False, callbacks=list(callbacks))
    return model


def farthest(model: Any, other: Any) -> float:
    """The largest difference of two weights."""
    pairs = zip(model.weights, other.weights, strict=True)
    return max(float(np.abs(np.asarray(one) - np.asarray(two)).max()) for one, two in pairs)


def assert_same(model: Any, optimizer: RemoteOptimizer) -> None:
    """The model has what the set has."""
    pulled = optimizer.weights.pull()
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(np.asarray(variable), pulled[variable.path])


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (optim.SGD(lr=0.1), lambda: keras.optimizers.SGD(0.1)),
        (optim.Adam(convention="keras", lr=0.01), lambda: keras.optimizers.Adam(0.01)),
        (optim.AdamW(convention="keras", lr=0.01), lambda: keras.optimizers.AdamW(0.01)),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_a_model_becomes_what_it_becomes_with_the_local_optimizer(
    rule: Optimizer, theirs: Callable[[], Any], eagerly: bool, memory_client: optserve.Client, new_id: NewId
) -> None:
    """A callback changes the learning rate after the first epoch."""
    halved = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch)) for _ in range(2)]
    expected = fitted(theirs(), halved[0], run_eagerly=eagerly)
    optimizer = RemoteOptimizer(memory_client, new_id(), rule)
    model = fitted(optimizer, halved[1], run_eagerly=eagerly)
    assert farthest(model, expected) < 1e-5
    assert optimizer.weights.describe().version == int(optimizer.iterations) == STEPS
    (change,) = optimizer.weights.describe().changes
    assert change.values == {"lr": pytest.approx(rule.hyperparameters["lr"] / 2, rel=1e-12)}
    assert optimizer.receipt is not None
    assert optimizer.receipt.version == STEPS


def test_a_model_goes_on_with_what_the_set_has(memory_client: optserve.Client, new_id: NewId) -> None:
    set_id, rule = new_id(), optim.Adam(lr=0.01)
    fitted(RemoteOptimizer(memory_client, set_id, rule))
    again = RemoteOptimizer(memory_client, set_id, rule)
    fresh = network()
    again.build(fresh.trainable_variables)
    assert_same(fresh, again)
    again = RemoteOptimizer(memory_client, set_id, rule)
    assert_same(fitted(again), again)
    assert again.weights.describe().version == 2 * STEPS


def test_a_schedule_of_the_set_is_left_alone(memory_client: optserve.Client, new_id: NewId) -> None:
    rule = optim.SGD(lr=schedules.Linear(0.1, 0.0, transition_steps=STEPS))
    optimizer = RemoteOptimizer(memory_client, new_id(), rule)
    fitted(optimizer, keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5))
    assert optimizer.receipt is not None
    assert optimizer.receipt.learning_rate == pytest.approx(0.1 / STEPS)


def test_constraints_are_refused_and_there_is_no_set_before_training(
    memory_client: optserve.Client, new_id: NewId
) -> None:
    optimizer = RemoteOptimizer(memory_client, new_id(), optim.SGD(lr=0.1))
    with pytest.raises(optserve.FailedPrecondition, match="has trained"):
        _ = optimizer.weights
    layer = keras.layers.Dense(1, kernel_constraint="non_neg")
    layer.build((None, 2))
    with pytest.raises(optserve.InvalidArgument, match="has a constraint"):
        optimizer.build(layer.trainable_variables)


def test_other_backends_are_refused() -> None:
    code = """
import json, keras, optserve, optserve.keras
keras.backend.backend = lambda: "tensorflow"
try:
    optserve.keras.RemoteOptimizer(None, "x", optserve.optim.SGD())
except optserve.InvalidArgument as error:
    print(json.dumps(str(error)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(run.stdout) == "expected Keras with the backend jax or torch; got tensorflow", run.stderr
