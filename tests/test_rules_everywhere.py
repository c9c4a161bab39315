"""Every rule gives the same bits on every path into the engine, on any number of threads."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

import optserve
from optimizer_table import Array, Row, Step
from test_rules import MORE_SIZES, ONE, OTHER, SMALL, history, name_of, pulled, pushes, rules, run_direct, varied

CASES = [*product(rules, (4097,), (np.float32,)), *product(varied, (SMALL, *MORE_SIZES), (np.float32, np.float64))]


def run_client(client: optserve.Client, set_id: str, row: Row, parameters: Array, steps: list[Step]) -> Array:
    with client.create_parameter_set(set_id, {"x": parameters, "y": ONE}, row.optimizer, groups=[OTHER]) as weights:
        for gradients, changes in pushes(row, steps):
            weights.push(gradients, hyperparameters=changes)
        result = pulled(row, weights.pull)
        weights.delete()
        return result


@pytest.mark.parametrize(("row", "size", "dtype"), CASES, ids=name_of)
def test_engine_memory_and_tcp_agree_bitwise(
    row: Row,
    size: int,
    dtype: type,
    memory_client: optserve.Client,
    tcp_client: optserve.Client,
    new_id: Callable[[], str],
) -> None:
    parameters, steps = history(row, size, dtype)
    direct = run_direct(row, parameters, steps)
    memory = run_client(memory_client, new_id(), row, parameters, steps)
    tcp = run_client(tcp_client, new_id(), row, parameters, steps)
    np.testing.assert_array_equal(direct, memory)
    np.testing.assert_array_equal(direct, tcp)


@pytest.mark.parametrize("row", rules, ids=name_of)
def test_bits_do_not_depend_on_the_number_of_threads(row: Row) -> None:
    parameters, steps = history(row, 100_003, np.float32)
    once = run_direct(row, parameters, steps[:5], threads=1)
    np.testing.assert_array_equal(once, run_direct(row, parameters, steps[:5], threads=3))
