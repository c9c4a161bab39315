"""What a parameter set does with pushes, on the engine directly and over the wire alike."""

import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import optserve
from direct import DirectSet
from optserve import Holds, optim
from optserve._specification import Run
from optserve_server.engine.push import Declared

Array = np.ndarray[Any, Any]
NewId = Callable[[], str]


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape, dtype)


def test_a_step_answers_with_parameters_version_and_receipt(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"w": ones(2, 3), "b": ones(3)}, optim.SGD(lr=0.5))
    params = weights.step({"w": ones(2, 3), "b": 2 * ones(3)})
    np.testing.assert_array_equal(params["w"], np.full((2, 3), 0.5, np.float32))
    np.testing.assert_array_equal(params["b"], np.zeros(3, np.float32))
    assert params["w"].shape == (2, 3)
    assert params.version == 1
    receipt = params.receipt
    assert receipt is not None
    assert (receipt.version, receipt.applied, receipt.duplicate, receipt.staleness) == (1, True, False, 0)
    assert receipt.gradient_norm == pytest.approx(np.sqrt(6 + 12))
    assert receipt.learning_rate == 0.5
    assert receipt.durability is optserve.Durability.MEMORY


def test_a_tensor_without_a_gradient_is_left_alone_and_counts_its_own_steps(
    client: optserve.Client, new_id: NewId
) -> None:
    reference = {name: torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for name in "ab"}
    optimizer = torch.optim.NAdam(reference.values(), lr=0.1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    start = {name: ones(4, dtype=np.float64) for name in "ab"}
    weights = client.create_parameter_set(new_id(), start, optim.NAdam(lr=0.1))
    try:
        for step in range(20):
            present = "ab" if step % 3 == 0 else "b"
            gradients = {name: np.full(4, step + 1.0) * (1 if name == "a" else -1) for name in present}
            weights.push(gradients)
            for name, parameter in reference.items():
                parameter.grad = torch.from_numpy(gradients[name]) if name in gradients else None
            optimizer.step()
    finally:
        torch.set_default_dtype(default)
    params = weights.pull()
    for name, parameter in reference.items():
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=1e-12)


def test_a_gradient_of_zero_is_a_gradient(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"a": ones(2), "b": ones(2)}, optim.Momentum(lr=1.0))
    weights.push({"a": ones(2), "b": ones(2)})
    params = weights.step({"a": np.zeros(2, np.float32)})
    np.testing.assert_allclose(params["a"], [-0.9, -0.9], rtol=1e-6)  # momentum goes on
    np.testing.assert_array_equal(params["b"], [0, 0])


def test_groups_take_tensors_by_name_and_pattern_the_first_match_wins(client: optserve.Client, new_id: NewId) -> None:
    tensors = {name: ones(1) for name in ("encoder.weight", "encoder.bias", "head.weight", "head.bias")}
    weights = client.create_parameter_set(
        new_id(),
        tensors,
        optim.SGD(lr=1.0),
        groups=[
            optim.Group("head", "head.weight", lr=0.5),
            optim.Group("biases", "*.bias", lr=0.25),
        ],
    )
    params = weights.step(tensors)
    expected = {"encoder.weight": 0.0, "encoder.bias": 0.75, "head.weight": 0.5, "head.bias": 0.75}
    assert {name: float(array[0]) for name, array in params.items()} == expected
    assert params.receipt is not None
    assert params.receipt.learning_rates == {"default": 1.0, "head": 0.5, "biases": 0.25}
    groups = {group.name: group.tensors for group in weights.describe().groups}
    assert groups == {
        "default": ("encoder.weight",),
        "head": ("head.weight",),
        "biases": ("encoder.bias", "head.bias"),
    }


def test_the_exact_name_of_a_tensor_means_that_tensor(client: optserve.Client, new_id: NewId) -> None:
    tensors = {"a[0]": ones(1), "a0": ones(1)}
    weights = client.create_parameter_set(
        new_id(), tensors, optim.SGD(lr=1.0), groups=[optim.Group("g", "a[0]", lr=0.5)]
    )
    params = weights.step(tensors)
    assert (params["a[0]"][0], params["a0"][0]) == (0.5, 0.0)


def test_hyperparameters_change_live_for_everyone(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    weights = client.create_parameter_set(set_id, {"w": ones(1)}, optim.SGD(lr=1.0))
    description = client.parameter_set(set_id).update(lr=0.25)
    assert description.groups[0].optimizer == optim.SGD(lr=0.25)
    assert float(weights.step({"w": ones(1)})["w"][0]) == 0.75


def test_hyperparameters_change_with_a_push_atomically(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"w": ones(1)}, optim.SGD(lr=1.0))
    with pytest.raises(optserve.NonFiniteValue):
        weights.push({"w": np.float32([np.nan])}, hyperparameters={"default": {"lr": 0.5}})
    assert weights.describe().groups[0].optimizer.lr == 1.0
    params = weights.step({"w": ones(1)}, hyperparameters={"default": {"lr": 0.5}})
    assert float(params["w"][0]) == 0.5
    assert weights.describe().groups[0].optimizer.lr == 0.5


def test_a_worker_learns_how_stale_its_gradient_was(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    fast = client.create_parameter_set(set_id, {"w": ones(1)}, optim.SGD())
    slow = client.parameter_set(set_id)
    slow.pull()
    for _ in range(3):
        fast.step({"w": ones(1)})
    assert slow.push({"w": ones(1)}).staleness == 3


def test_pull_is_none_when_nothing_is_newer(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    weights = client.create_parameter_set(set_id, {"w": ones(1)}, optim.SGD())
    params = weights.pull()
    assert weights.pull(newer_than=params) is None
    assert weights.pull(newer_than=0) is None
    weights.push({"w": ones(1)})
    newer = weights.pull(newer_than=params)
    assert newer is not None
    assert newer.version == 1


def test_a_set_made_anew_is_newer_whatever_its_version(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    weights = client.create_parameter_set(set_id, {"w": ones(1)}, optim.SGD())
    params = weights.pull()
    weights.delete()
    again = client.create_parameter_set(set_id, {"w": ones(1)}, optim.SGD())
    assert again.pull(newer_than=params) is not None


def test_pull_honours_a_requested_order(client: optserve.Client, new_id: NewId) -> None:
    tensors = {name: np.full(5, k, np.float32) for k, name in enumerate("abc")}
    weights = client.create_parameter_set(new_id(), tensors, optim.SGD())
    params = weights.pull(tensors=["c", "a"])
    assert list(params) == ["c", "a"]
    assert params["c"][0] == 2
    with pytest.raises(optserve.TensorMismatch, match=r"got 'z'"):
        weights.pull(tensors=["z"])
    assert weights.pull() is not None


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (4097,), (300, 1000)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_every_dtype_and_shape_travels(
    client: optserve.Client, new_id: NewId, shape: tuple[int, ...], dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    start = {"x": rng.normal(size=shape).astype(dtype), "y": ones(3)}
    weights = client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0))
    pulled = weights.pull()
    assert pulled["x"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(pulled["x"].astype(np.float64), start["x"].astype(np.float64))
    gradient = rng.normal(size=shape).astype(dtype)
    stepped = weights.step({"x": gradient})["x"]
    compute = np.float64 if dtype is np.float64 else np.float32
    expected = (start["x"].astype(compute) - gradient.astype(compute)).astype(dtype)
    np.testing.assert_array_equal(stepped.astype(np.float64), expected.astype(np.float64))
    weights.delete()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_keeps_a_float32_master(client: optserve.Client, new_id: NewId, dtype: Any) -> None:
    """Steps too small for the dtype add up: 100 steps of 2^-13 from 1 are lost one by one, but not together."""
    weights = client.create_parameter_set(new_id(), {"x": ones(1, dtype=dtype)}, optim.SGD(lr=2.0**-13))
    for _ in range(100):
        weights.push({"x": -ones(1, dtype=dtype)})
    params = weights.pull()
    assert params["x"].astype(np.float32)[0] == np.float32(1 + 100 * 2.0**-13).astype(dtype).astype(np.float32)


def test_tensors_of_several_dtypes_live_in_one_set(client: optserve.Client, new_id: NewId) -> None:
    tensors = {
        "a": ones(5),
        "b": ones(70, dtype=np.float64),
        "c": ones(9, dtype=np.float16),
        "d": ones(3, dtype=ml_dtypes.bfloat16),
        "e": ones(2, dtype=np.float64),
    }
    weights = client.create_parameter_set(new_id(), tensors, optim.Momentum(lr=0.5))
    params = weights.step(tensors)
    for name, array in tensors.items():
        assert params[name].dtype == array.dtype
        np.testing.assert_array_equal(params[name].astype(np.float64), 0.5)


def test_many_small_tensors_share_chunks(client: optserve.Client, new_id: NewId) -> None:
    tensors = {f"t{k}": np.full(k % 7 + 1, k, np.float32) for k in range(1000)}
    weights = client.create_parameter_set(new_id(), tensors, optim.SGD(lr=1.0))
    params = weights.step({name: ones(array.size) for name, array in tensors.items()})
    for name, array in tensors.items():
        np.testing.assert_array_equal(params[name], array - 1)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [optim.Adam, optim.AdamW, optim.Momentum])
def test_a_set_of_moments_returns_what_to_add(
    client: optserve.Client, new_id: NewId, optimizer: type[optim.Optimizer], decay: float
) -> None:
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=5000), "b": rng.normal(size=7)}
    chosen = optimizer(lr=0.01).replace(weight_decay=decay)
    held = client.create_parameter_set(new_id(), start, chosen)
    moments = client.create_parameter_set(new_id(), start, chosen, holds=Holds.MOMENTS)
    assert moments.describe().state_bytes < held.describe().state_bytes
    params = dict(start)
    for _ in range(10):
        gradients = {name: rng.normal(size=array.shape) for name, array in start.items()}
        expected = held.step(gradients)
        updates = moments.step(gradients, parameters=params if decay else None)
        params = {name: params[name] + updates[name] for name in params}
    for name, array in params.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-12, atol=1e-14)


def test_a_set_of_moments_refuses_weight_decay_without_parameters(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"w": ones(2)}, optim.AdamW(), holds="moments")
    with pytest.raises(optserve.TensorMismatch, match=r"weight decay reads the parameters.*'w'"):
        weights.step({"w": ones(2)})
    assert weights.step({"w": ones(2)}, parameters={"w": ones(2)}).version == 1


def test_a_set_of_moments_returns_only_the_tensors_of_the_push(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"a": ones(2), "b": ones(2)}, optim.SGD(), holds="moments")
    assert list(weights.step({"b": ones(2)})) == ["b"]


def test_exist_ok_attaches_if_the_specification_matches(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    first = client.create_parameter_set(set_id, {"w": ones(2)}, optim.Adam(lr=0.1))
    first.push({"w": ones(2)})
    first.update(lr=0.2)
    second = client.create_parameter_set(set_id, {"w": 9 * ones(2)}, optim.Adam(lr=0.1), exist_ok=True)
    params = second.pull()
    assert params.version == 1
    with pytest.raises(optserve.SpecificationMismatch, match=r"optimizer.*lr=0.1.*lr=0.3"):
        client.create_parameter_set(set_id, {"w": ones(2)}, optim.Adam(lr=0.3), exist_ok=True)
    with pytest.raises(optserve.SpecificationMismatch, match=r"tensors"):
        client.create_parameter_set(set_id, {"w": ones(3)}, optim.Adam(lr=0.1), exist_ok=True)
    with pytest.raises(optserve.ParameterSetExists, match=f"{set_id}.*exist_ok=True"):
        client.create_parameter_set(set_id, {"w": ones(2)}, optim.Adam(lr=0.1))


def test_a_long_difference_is_named_in_a_short_message(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    tensors = {f"layers.{k}.attention.projection.weight": ones(k + 1) for k in range(400)}
    client.create_parameter_set(set_id, tensors, optim.SGD())
    changed = tensors | {"layers.300.attention.projection.weight": ones(7)}
    with pytest.raises(optserve.SpecificationMismatch, match=r"layers.300.*float32\[301\]; got .*float32\[7\]"):
        client.create_parameter_set(set_id, changed, optim.SGD(), exist_ok=True)
    with pytest.raises(optserve.TensorMismatch, match="got 'zzz"):
        client.parameter_set(set_id).push({"z" * 500: ones(1)})


def test_a_refused_push_is_let_go_of() -> None:
    direct = DirectSet({"x": ones(10)}, optim.SGD())
    declared = [Declared(optserve.TensorSpec.of("x", ones(10)))]
    push = direct.set.begin(1, declared)
    staging = weakref.ref(push._staging)
    push.add([Run(0, 0, 10)], np.full(10, np.nan, np.float32).view(np.uint8), replace=False)
    push.finish()
    receipt, _ = direct.set.push(direct.session, direct, push, pull=False)
    assert receipt.refusal is not None
    assert receipt.refusal.reason == "NON_FINITE_VALUE"
    del push
    assert staging() is None


def test_sets_are_listed_in_order_and_gone_once_deleted(client: optserve.Client, new_id: NewId) -> None:
    ids = sorted(new_id() for _ in range(3))
    handles = {set_id: client.create_parameter_set(set_id, {"w": ones(2)}, optim.SGD()) for set_id in reversed(ids)}
    listed = [each.id for each in client.list_parameter_sets()]
    assert [set_id for set_id in listed if set_id in ids] == ids
    other = client.parameter_set(ids[0])
    other.pull()
    handles[ids[0]].delete()
    assert ids[0] not in [each.id for each in client.list_parameter_sets()]
    with pytest.raises(optserve.ParameterSetNotFound, match=ids[0]):
        other.push({"w": ones(2)})
    with pytest.raises(optserve.ParameterSetNotFound, match=ids[0]):
        client.parameter_set(ids[0])


def test_a_closed_handle_refuses_work(client: optserve.Client, new_id: NewId) -> None:
    with client.create_parameter_set(new_id(), {"w": ones(2)}, optim.SGD()) as weights:
        weights.push({"w": ones(2)})
    with pytest.raises(optserve.ClientClosed):
        weights.push({"w": ones(2)})


def test_caller_arrays_may_be_strided_big_endian_or_lists(client: optserve.Client, new_id: NewId) -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    weights = client.create_parameter_set(
        new_id(), {"t": grid.T, "s": grid[:, ::2], "b": grid.astype(">f4"), "l": [1.0, 2.0]}, optim.SGD(lr=1.0)
    )
    params = weights.pull()
    np.testing.assert_array_equal(params["t"], grid.T)
    np.testing.assert_array_equal(params["s"], grid[:, ::2])
    np.testing.assert_array_equal(params["b"], grid)
    assert params["l"].dtype == np.float64
