"""A set without a guard: gradients are applied unread, which is what was asked for, and everything else stays as it is."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import optserve
from optserve import formats, optim
from optserve_server import Config, Server

NewId = Callable[[], str]
START = {"x": np.zeros(5000, np.float32), "y": np.zeros((), np.float32)}
ONES = {"x": np.ones(5000, np.float32), "y": np.ones((), np.float32)}


def test_nan_is_applied_and_no_norm_is_measured(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(lr=1.0), guard=False)
    params = weights.step(ONES)
    assert params.receipt is not None
    assert math.isnan(params.receipt.gradient_norm)
    np.testing.assert_array_equal(params["x"], -1)
    poisoned = weights.step(ONES | {"y": np.float32(np.nan)})
    assert np.isnan(poisoned["y"])
    np.testing.assert_array_equal(poisoned["x"], -2)


def test_results_are_those_of_a_set_with_one(client: optserve.Client, new_id: NewId) -> None:
    random = np.random.default_rng(0)
    guarded, unguarded = (
        client.create_parameter_set(new_id(), START, optim.Adam(), guard=guard) for guard in (True, False)
    )
    for _ in range(5):
        gradients = {name: random.normal(size=value.shape).astype(np.float32) for name, value in START.items()}
        expected, params = guarded.step(gradients), unguarded.step(gradients)
    for name in START:
        np.testing.assert_array_equal(params[name], expected[name])


def test_shapes_are_checked_all_the_same(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(), guard=False)
    with pytest.raises(optserve.TensorMismatch, match="expected"):
        weights.push({"x": np.ones(4999, np.float32)})
    assert weights.describe().version == 0


def test_initial_values_are_guarded(client: optserve.Client, new_id: NewId) -> None:
    with pytest.raises(optserve.NonFiniteValue):
        client.create_parameter_set(new_id(), START | {"y": np.float32(np.inf)}, optim.SGD(), guard=False)


def test_compressed_pushes_need_no_guard(tcp_client: optserve.Client, new_id: NewId) -> None:
    weights = tcp_client.create_parameter_set(
        new_id(), START, optim.SGD(lr=1.0), guard=False, push_format=formats.Int8()
    )
    np.testing.assert_array_equal(weights.step(ONES)["x"], -1)


def test_the_choice_is_part_of_the_set_and_outlives_a_restart(tmp_path: Path) -> None:
    config = Config(listen="127.0.0.1:0", data_dir=tmp_path)
    with Server(config) as server, optserve.Client(server.address) as client:
        client.create_parameter_set("a", START, optim.SGD(), guard=False)
        with pytest.raises(optserve.SpecificationMismatch, match="guard"):
            client.create_parameter_set("a", START, optim.SGD(), exist_ok=True)
    with Server(config) as server, optserve.Client(server.address) as client:
        weights = client.parameter_set("a")
        assert not weights.describe().spec.guard
        assert math.isnan(weights.push(ONES).gradient_norm)
