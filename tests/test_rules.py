"""Every rule against an independent implementation, on every path into the engine."""

from collections.abc import Callable

import numpy as np
import pytest

import optserve
from direct import DirectSet
from optimizer_table import ROWS, Array, Row
from optserve import optim
from optserve_server.engine.rules import rule_for

STEPS = 100
SIZES = (1, 15, 17, 4097, 100_003)


def history(size: int, dtype: type = np.float64) -> tuple[Array, list[Array]]:
    """Parameters and gradients: noise around a drift, with scales from 1e-3 to 1e1 over the elements."""
    rng = np.random.default_rng(size)
    parameters = rng.normal(size=size)
    scale = 10.0 ** rng.uniform(-3, 1, size)
    gradients = [scale * (rng.normal(size=size) + 0.3) for _ in range(STEPS)]
    return parameters.astype(dtype), [gradient.astype(dtype) for gradient in gradients]


def distance(left: Array, right: Array) -> float:
    """Largest difference, relative to the tensor's largest magnitude."""
    return float(np.abs(left.astype(np.float64) - right).max() / np.abs(right).max())


def run_direct(row: Row, parameters: Array, gradients: list[Array], threads: int = 2) -> Array:
    direct = DirectSet({"x": parameters}, row.optimizer, threads=threads)
    for gradient in gradients:
        assert direct.push({"x": gradient}).applied
    return direct.pull()["x"]


def run_client(client: optserve.Client, set_id: str, row: Row, parameters: Array, gradients: list[Array]) -> Array:
    with client.create_parameter_set(set_id, {"x": parameters}, row.optimizer) as weights:
        for gradient in gradients[:-1]:
            weights.push({"x": gradient})
        result = weights.step({"x": gradients[-1]})
        weights.delete()
        return result["x"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_float64_equals_the_oracle_to_1e_12(row: Row, size: int) -> None:
    parameters, gradients = history(size)
    assert distance(run_direct(row, parameters, gradients), row.oracle(parameters, gradients)) <= 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_float32_is_as_close_to_float64_as_torch_is(row: Row, size: int) -> None:
    parameters, gradients = history(size, np.float32)
    exact = row.oracle(parameters.astype(np.float64), [gradient.astype(np.float64) for gradient in gradients])
    ours = distance(run_direct(row, parameters, gradients), exact)
    assert ours <= 2e-6
    if size >= 4097:
        assert ours <= 1.5 * distance(row.oracle(parameters, gradients), exact)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_engine_memory_and_tcp_agree_bitwise(
    row: Row,
    size: int,
    dtype: type,
    memory_client: optserve.Client,
    tcp_client: optserve.Client,
    new_id: Callable[[], str],
) -> None:
    parameters, gradients = history(size, dtype)
    direct = run_direct(row, parameters, gradients)
    memory = run_client(memory_client, new_id(), row, parameters, gradients)
    tcp = run_client(tcp_client, new_id(), row, parameters, gradients)
    np.testing.assert_array_equal(direct, memory)
    np.testing.assert_array_equal(direct, tcp)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_bits_do_not_depend_on_the_number_of_threads(row: Row) -> None:
    parameters, gradients = history(100_003, np.float32)
    once = run_direct(row, parameters, gradients[:5], threads=1)
    np.testing.assert_array_equal(once, run_direct(row, parameters, gradients[:5], threads=3))


def test_every_optimizer_of_the_catalogue_is_in_the_table() -> None:
    assert {row.optimizer.rule for row in ROWS.values()} == set(optim.catalogue())


def test_every_variant_of_a_rule_is_in_the_table() -> None:
    import optserve_server.engine.rules as rules

    known = {value for value in vars(rules).values() if isinstance(value, rules.Rule)}
    assert {rule_for(row.optimizer) for row in ROWS.values()} == known


def test_momenta_agree_while_the_learning_rate_is_constant_and_differ_once_it_changes() -> None:
    parameters, gradients = history(17)
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
