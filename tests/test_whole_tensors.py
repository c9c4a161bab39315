"""Rules that see whole tensors, or groups of them: what the table of single tensors does not show."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

import optserve
from direct import DirectSet
from optimizer_table import swats
from optserve import TensorSpec, optim
from optserve_server.engine.rules import rule_for

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

SHAPES = {"matrix": (7, 5), "kernel": (2, 3, 4), "vector": (6,), "scalar": ()}
STEPS = 30


def tensors(seed: int, drift: float = 0.0, dtype: Any = np.float64) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape) + drift, dtype) for name, shape in SHAPES.items()}


def gradients(dtype: Any = np.float64) -> list[Tensors]:
    return [tensors(100 + k, 0.5, dtype) for k in range(STEPS)]


def flat(values: Tensors) -> Array:
    return np.concatenate([values[name].reshape(-1) for name in SHAPES])


def some(values: Tensors, *names: str) -> Tensors:
    return {name: values[name] for name in names}


def push(direct: DirectSet, values: Tensors, changes: dict[str, dict[str, Any]] | None = None) -> None:
    receipt = direct.push(values, changes)
    assert receipt.applied, receipt.refusal


def assert_same_bits(ours: Tensors, theirs: Tensors) -> None:
    assert {name: array.tobytes() for name, array in ours.items()} == {
        name: array.tobytes() for name, array in theirs.items()
    }


def test_prodigy_finds_one_learning_rate_for_a_group() -> None:
    theirs = optax.contrib.prodigy(estim_lr0=0.01, estim_lr_coef=0.5, weight_decay=0.01)
    expected: Any = {name: jax.numpy.asarray(value) for name, value in tensors(0).items()}
    direct = DirectSet(tensors(0), optim.Prodigy(d0=0.01, d_coef=0.5, weight_decay=0.01, use_bias_correction=True))
    state, update = theirs.init(expected), jax.jit(theirs.update)
    for each in gradients():
        updates, state = update(each, state, expected)
        expected = optax.apply_updates(expected, updates)
        push(direct, each)
    for name, value in direct.pull().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-11)
    assert state.estim_lr > 0.05  # type: ignore[attr-defined]


def test_swats_switches_a_whole_group_at_once() -> None:
    """As it does one tensor that has all of their elements; with a new learning rate in each phase."""
    optimizer = optim.SWATS(lr=0.02, eps=1e-3, weight_decay=0.01)
    direct, expected = DirectSet(tensors(0), optimizer), flat(tensors(0))
    state: dict[str, Array] = defaultdict(lambda: np.zeros_like(expected))
    phases = []
    for k, each in enumerate(gradients()):
        lr = 0.02 if k < 3 else 0.01 if k < 20 else 0.005
        expected = swats(optimizer, expected, flat(each), state, k + 1, lr)
        phases.append("switched" in state)
        push(direct, each, {"default": {"lr": lr}})
        np.testing.assert_allclose(flat(direct.pull()), expected, rtol=1e-12, atol=1e-12)
    assert 3 < phases.index(True) < 20


def test_swats_switches_at_its_second_update_at_the_earliest_and_without_epsilon_never() -> None:
    """Equal gradients imply equal learning rates, here to the bit."""
    for eps in (1e-3, 0.0):
        optimizer = optim.SWATS(lr=0.5, betas=(0.5, 0.5), eps=eps)
        direct, expected = DirectSet({"x": np.zeros(1)}, optimizer), np.zeros(1)
        state: dict[str, Array] = defaultdict(lambda: np.zeros(1))
        for k in range(4):
            expected = swats(optimizer, expected, np.ones(1), state, k + 1, optimizer.lr)
            assert ("switched" in state) == (eps > 0.0 and k > 0)
            push(direct, {"x": np.ones(1)})
            np.testing.assert_allclose(direct.pull()["x"], expected, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [optim.Prodigy(d0=0.01), optim.SWATS(lr=0.02, eps=1e-3)], ids=lambda o: o.rule)
def test_each_group_has_a_memory_of_its_own(optimizer: optim.Optimizer) -> None:
    """What becomes of a group does not depend on the others, nor on pushes that have none of its tensors."""
    changed = {"lr": 0.3 * optimizer.lr, "weight_decay": 0.1}  # type: ignore[attr-defined]
    together = DirectSet(tensors(0), optimizer, groups=[optim.Group("second", "kernel", "scalar", **changed)])
    first = DirectSet(some(tensors(0), "matrix", "vector"), optimizer)
    second = DirectSet(some(tensors(0), "kernel", "scalar"), optimizer.replace(**changed))
    for k, each in enumerate(gradients()):
        if k % 5 == 2:
            each = some(each, "matrix", "vector")
        push(together, each)
        push(first, some(each, "matrix", "vector"))
        if "kernel" in each:
            push(second, some(each, "kernel", "scalar"))
    assert_same_bits(together.pull(), first.pull() | second.pull())


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.ScheduleFreeAdamW(lr=0.1, warmup_steps=20.0),
        optim.RowWiseAdagrad(),
        optim.NovoGrad(),
        optim.Adafactor(),
        optim.SWATS(lr=0.02, eps=1e-3),
        optim.Prodigy(d0=0.01),
        optim.Muon(),
    ],
    ids=lambda o: o.rule,
)
@pytest.mark.parametrize("at", [2, 15])
def test_a_checkpoint_in_the_middle_changes_no_bit(optimizer: optim.Optimizer, at: int, tmp_path: Path) -> None:
    whole, resumed = (DirectSet(tensors(0, dtype=np.float32), optimizer) for _ in range(2))
    for k, each in enumerate(gradients(np.float32)):
        if k == at:
            resumed = resumed.restored().stored(tmp_path)
        if k % 7 == 5:
            del each["vector"]
        push(whole, each)
        push(resumed, each)
    assert_same_bits(whole.pull(), resumed.pull())


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (1, 9), (30, 30)], ids=str)
class TestMuon:
    """A step of 1, from zero, without decay."""

    def step(self, shape: tuple[int, int], **options: Any) -> tuple[Array, Array]:
        gradient = np.random.default_rng(1).normal(size=shape)
        direct = DirectSet({"x": np.zeros(shape)}, optim.Muon(lr=1.0, weight_decay=0.0, **options))
        push(direct, {"x": gradient})
        return gradient, -direct.pull()["x"]

    def test_it_is_torchs_but_for_the_rounding_to_bfloat16(self, shape: tuple[int, int]) -> None:
        gradient, step = self.step(shape)
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        parameter.grad = torch.tensor(gradient)
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0).step()
        theirs = -parameter.detach().numpy()
        assert np.linalg.norm(step - theirs) <= 0.02 * np.linalg.norm(theirs)

    def test_its_singular_values_are_near_1(self, shape: tuple[int, int]) -> None:
        _, step = self.step(shape, ns_steps=9, adjust_lr_fn="original")
        values = np.linalg.svd(step / max(1.0, shape[0] / shape[1]) ** 0.5, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adafactors_first_epsilon_is_that_of_the_dtype(dtype: Any) -> None:
    """With gradients that are smaller."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in tensors(0, dtype=dtype).items()}
    theirs = torch.optim.Adafactor(parameters.values(), foreach=False)
    direct = DirectSet(tensors(0, dtype=dtype), optim.Adafactor())
    for each in gradients(dtype):
        small = {name: np.asarray(value * np.finfo(dtype).eps / 3) for name, value in each.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(small[name])
        theirs.step()
        push(direct, small)
    for name, value in direct.pull().items():
        np.testing.assert_allclose(value, parameters[name].detach().numpy(), rtol=20 * np.finfo(dtype).eps)


def test_gradients_of_zero_change_nothing() -> None:
    """Though they have no length, no direction and no mean square to divide by."""
    optimizers = [
        optim.LARS(eps=0.0),
        optim.LAMB(),
        optim.Adafactor(),
        optim.Adafactor(convention="keras"),
        optim.Muon(adamw_weight_decay=0.0),
        optim.SWATS(),
        optim.Prodigy(),
    ]
    for optimizer in optimizers:
        direct = DirectSet(tensors(0), optimizer.replace(weight_decay=0.0))
        push(direct, {name: np.zeros(shape) for name, shape in SHAPES.items()})
        assert_same_bits(direct.pull(), tensors(0))


def test_lars_takes_steps_in_proportion_to_the_tensor_and_plain_ones_from_zero() -> None:
    for start, end in ((0.01, 0.01 - 0.1 * 0.01), (0.0, -0.1 * 5.0)):
        direct = DirectSet({"x": np.full(4, start)}, optim.LARS(lr=0.1, trust_coefficient=1.0, eps=0.0))
        push(direct, {"x": np.full(4, 5.0)})
        np.testing.assert_allclose(direct.pull()["x"], np.full(4, end), rtol=1e-12)


def test_adafactor_leaves_zero_in_units_of_its_second_epsilon() -> None:
    direct = DirectSet({"x": np.zeros(2)}, optim.Adafactor(lr=0.1, eps=(None, 0.01)))
    push(direct, {"x": np.array([3.0, -5.0])})
    np.testing.assert_allclose(direct.pull()["x"], [-0.001, 0.001], rtol=1e-12)


def test_the_scale_of_gradients_is_nothing_to_adafactor() -> None:
    """But for an epsilon that is far below them."""
    optimizer = optim.Adafactor(eps=(1e-30, 1e-3), convention="keras")
    usual, small = (DirectSet(tensors(0), optimizer) for _ in range(2))
    for each in gradients():
        push(usual, each)
        push(small, {name: value / 1024 for name, value in each.items()})
    assert_same_bits(usual.pull(), small.pull())


def test_tensors_have_only_the_slots_that_they_need() -> None:
    def slots(optimizer: optim.Optimizer) -> dict[str, dict[str, tuple[int, ...]]]:
        shapes = {name: {spec.name: shape(spec) for spec in specs} for name, shape in rule_for(optimizer).slots.items()}
        return {
            name: {tensor: shape for tensor, shape in each.items() if 0 not in shape} for name, each in shapes.items()
        }

    specs = [TensorSpec.of(name, value) for name, value in tensors(0).items()]
    others = {name: shape for name, shape in SHAPES.items() if name != "matrix"}
    assert slots(optim.Muon()) == {"momentum_buffer": {"matrix": (7, 5)}, "exp_avg": others, "exp_avg_sq": others}
    assert slots(optim.Adafactor()) == {
        "row_var": {"matrix": (7, 1), "kernel": (2, 3, 1)},
        "col_var": {"matrix": (1, 5), "kernel": (2, 1, 4)},
        "variance": {"vector": (6,), "scalar": ()},
    }


def test_a_learning_rate_of_zero_leaves_schedule_free_where_it_is() -> None:
    direct = DirectSet(tensors(0), optim.ScheduleFreeSGD(lr=0.0))
    push(direct, gradients()[0])
    assert_same_bits(direct.pull(), tensors(0))
    push(direct, gradients()[1], {"default": {"lr": 0.1}})
    assert_same_bits(direct.pull(), direct.pull(evaluation=True))  # the first that weighs anything
    np.testing.assert_allclose(flat(direct.pull()), flat(tensors(0)) - 0.1 * flat(gradients()[1]), rtol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optim.Muon(ns_steps=2.5), "ns_steps to be a whole number; got 2.5"),
        (lambda: optim.Muon(ns_steps=100), "ns_steps.*below 100"),
        (lambda: optim.Muon(ns_coefficients=(1, 2, float("nan"))), r"ns_coefficients\[2\] to be finite; got nan"),
        (lambda: optim.Muon(adjust_lr_fn="mine"), "'original' or 'match_rms_adamw' or None; got 'mine'"),
        (lambda: optim.Muon(lr=None), "lr to be a number; got None"),
        (lambda: optim.Adafactor(eps=("tiny", 1e-3)), r"eps\[0\] to be a number or None; got 'tiny'"),
        (lambda: optim.Adafactor(eps=(None, None)), r"eps\[1\] to be a number; got None"),
        (lambda: optim.Adafactor(beta2_decay=0.1), "beta2_decay to be at most 0; got 0.1"),
        (lambda: optim.Adafactor(d=0.5), "d to be finite, at least 1; got 0.5"),
        (lambda: optim.Prodigy(d0=0.0), "positive d0.*got 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(build: Callable[[], optim.Optimizer], message: str) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match=message):
        build()


@pytest.mark.parametrize(
    "optimizer",
    [optim.Adafactor(), optim.Muon(ns_coefficients=(2, -1.5, 0.5), ns_steps=7.0), optim.Prodigy(beta3=0.5)],
    ids=lambda o: o.rule,
)
def test_none_and_whole_numbers_travel(
    optimizer: optim.Optimizer, tcp_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    weights = tcp_client.create_parameter_set(new_id(), tensors(0), optimizer)
    assert weights.describe().groups[0].optimizer == optimizer
    weights.delete()


def test_a_hyperparameter_that_overflows_the_type_of_an_update_is_refused(
    memory_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    start = tensors(0, dtype=np.float32)
    with memory_client.create_parameter_set(new_id(), start, optim.LAMB()) as weights:
        with pytest.raises(optserve.InvalidHyperparameter, match="computed in float32"):
            weights.push(gradients(np.float32)[0], hyperparameters={"default": {"lr": 1e39}})
        assert_same_bits(dict(weights.pull()), start)
        weights.delete()


def test_a_set_that_does_not_hold_its_parameters_refuses_a_rule_that_reads_them(
    memory_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    for optimizer in (optim.LARS(), optim.ScheduleFreeSGD()):
        with pytest.raises(optserve.InvalidHyperparameter, match=f"{optimizer.rule} reads them"):
            memory_client.create_parameter_set(new_id(), tensors(0), optimizer, holds="moments")
