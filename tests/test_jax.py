"""Steps on pytrees, and an optax transformation whose state is a server's, against optax itself."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optserve
from optserve import Outcome, optim
from optserve.jax import Pytree, named, remote
from optserve.optim import Optimizer

NewId = Callable[[], str]
Tree = Any

STEPS = 20
RULES: dict[str, tuple[Optimizer, optax.GradientTransformation]] = {
    "sgd": (optim.SGD(lr=0.1), optax.sgd(0.1)),
    "nesterov": (optim.SGD(lr=0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, 0.9, nesterov=True)),
    "adam": (optim.Adam(lr=0.01), optax.adam(0.01)),
    "adamw": (optim.AdamW(lr=0.01, weight_decay=0.1), optax.adamw(0.01, weight_decay=0.1)),
}


def initial(dtype: str = "float32") -> Tree:
    keys = iter(jax.random.split(jax.random.key(0), 3))
    return {
        "dense": {
            "kernel": jax.random.normal(next(keys), (4, 8), dtype),
            "bias": jnp.zeros(8, dtype),
        },
        "heads": [jax.random.normal(next(keys), (8, 2), dtype), jax.random.normal(next(keys), (8, 1), dtype)],
    }


def loss(parameters: Tree, inputs: Any) -> Any:
    hidden = jnp.tanh(inputs @ parameters["dense"]["kernel"] + parameters["dense"]["bias"])
    return sum(((hidden @ head - 1.0) ** 2).mean() for head in parameters["heads"])


def trained(transformation: optax.GradientTransformation, *, jit: bool, dtype: str = "float32") -> Tree:
    def step(parameters: Tree, state: Any, inputs: Any) -> tuple[Tree, Any]:
        gradients = jax.grad(loss)(parameters, inputs)
        updates, state = transformation.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    parameters = initial(dtype)
    state = transformation.init(parameters)
    step = jax.jit(step) if jit else step
    for k in range(STEPS):
        parameters, state = step(parameters, state, jax.random.normal(jax.random.key(k), (16, 4), dtype))
    return parameters


def assert_close(tree: Tree, expected: Tree, share: float) -> None:
    """Leaves differ by at most a share of the largest magnitude of each."""
    assert jax.tree_util.tree_structure(tree) == jax.tree_util.tree_structure(expected)
    for leaf, other in zip(jax.tree_util.tree_leaves(tree), jax.tree_util.tree_leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        assert np.max(np.abs(leaf - other)) <= share * np.max(np.abs(other))


@pytest.mark.parametrize(("name", "jit"), [*((name, True) for name in RULES), ("adam", False)])
def test_a_remote_transformation_is_that_of_optax(
    name: str, jit: bool, memory_client: optserve.Client, new_id: NewId
) -> None:
    rule, oracle = RULES[name]
    assert_close(trained(remote(memory_client, new_id(), rule), jit=jit), trained(oracle, jit=jit), 1e-5)


@pytest.fixture
def float64() -> Iterator[None]:
    """Let JAX have float64, in the threads of callbacks as well."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("float64")
def test_in_float64_it_differs_in_the_last_bits(memory_client: optserve.Client, new_id: NewId) -> None:
    found = trained(remote(memory_client, new_id(), optim.Adam(lr=0.01)), jit=True, dtype="float64")
    assert_close(found, trained(optax.adam(0.01), jit=True, dtype="float64"), 1e-9)


def test_it_goes_with_others_in_a_chain(client: optserve.Client, new_id: NewId) -> None:
    chain = optax.chain(optax.clip_by_global_norm(0.5), remote(client, new_id(), optim.Adam(lr=0.01)), optax.scale(0.5))
    oracle = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01), optax.scale(0.5))
    assert_close(trained(chain, jit=True), trained(oracle, jit=True), 1e-5)


def test_the_worker_keeps_nothing_but_a_count(client: optserve.Client, new_id: NewId) -> None:
    state = remote(client, new_id(), optim.Adam()).init(initial())
    assert sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(state)) == 4


def test_where_a_push_makes_no_update_there_is_nothing_to_add(client: optserve.Client, new_id: NewId) -> None:
    transforms = optserve.Transforms(accumulate=2)
    transformation = remote(client, new_id(), optim.SGD(lr=1.0), transforms=transforms)
    parameters = initial()
    state = transformation.init(parameters)
    ones = jax.tree_util.tree_map(jnp.ones_like, parameters)
    for expected in (0.0, -1.0, 0.0, -1.0):
        updates, state = transformation.update(ones, state, parameters)
        assert {float(value) for leaf in jax.tree_util.tree_leaves(updates) for value in leaf.ravel()} == {expected}
    assert int(state.count) == 4


def test_a_refused_push_raises(client: optserve.Client, new_id: NewId) -> None:
    parameters = initial()
    pytree = Pytree(client.create_parameter_set(new_id(), named(parameters), optim.Adam()), parameters)
    with pytest.raises(optserve.NonFiniteValue, match="heads/0"):
        pytree.step({"heads": [jnp.full((8, 2), jnp.nan, jnp.float32)]})
    assert pytree.receipt is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_on_pytrees(dtype: str, client: optserve.Client, new_id: NewId) -> None:
    parameters = initial(dtype)
    weights = client.create_parameter_set(new_id(), named(parameters), optim.SGD(lr=1.0))
    pytree = Pytree(weights, parameters)
    assert_close(pytree.pull(), parameters, 0.0)
    ones = jax.tree_util.tree_map(jnp.ones_like, parameters)
    stepped = pytree.step(ones, hyperparameters={"default": {"lr": 2.0}})
    assert_close(stepped, jax.tree_util.tree_map(lambda leaf: leaf - 2, parameters), 0.0)
    assert pytree.receipt is not None
    assert pytree.receipt.outcome is Outcome.APPLIED
    some = pytree.step({"dense": {"kernel": None, "bias": ones["dense"]["bias"]}})
    assert_close(some["heads"], stepped["heads"], 0.0)
    assert_close(some["dense"]["bias"], stepped["dense"]["bias"] - 2, 0.0)


def test_names_are_paths() -> None:
    assert list(named({"b": (1, [2]), "a": {"x": 3}})) == ["a/x", "b/0", "b/1/0"]


@pytest.mark.parametrize("tree", [1.0, {"a/b": 1.0, "a": {"b": 2.0}}])
def test_a_leaf_without_a_name_of_its_own_is_refused(tree: Tree) -> None:
    with pytest.raises(optserve.InvalidTensor, match="expected a path of its own for each leaf"):
        named(tree)


def test_a_set_of_other_tensors_is_refused(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), {"x": np.zeros(2, np.float32)}, optim.SGD())
    with pytest.raises(optserve.TensorMismatch, match="'dense/bias' is only in one of the two"):
        Pytree(weights, initial())
