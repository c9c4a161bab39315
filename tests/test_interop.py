"""A run moves from a library's own optimizer to the service and back, and the next steps are the same."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import jax
import keras
import numpy as np
import optax
import pytest
import torch

import optserve
from equality import same
from optimizer_table import muon_in_full_precision, torch_in_float64
from optserve import EMA, Lookahead, State, Transforms, optim
from optserve.interop import keras as keras_interop
from optserve.interop import optax as optax_interop
from optserve.interop import torch as torch_interop

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NewId = Callable[[], str]

W, B = "dense/w", "dense/b"
SHAPES = {W: (4, 3), B: (3,)}
MATRICES = {W: (4, 3), B: (1, 3)}
STEPS = 3  # before each move, and after the last


def tensors(seed: int, dtype: Any = np.float64, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def assert_close(ours: Tensors, theirs: Tensors, tolerance: float = 1e-12) -> None:
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)


class Local(Protocol):
    """A library's optimizer with its parameters, to be stepped here."""

    def step(self, gradients: Tensors) -> None: ...

    def parameters(self) -> Tensors: ...

    def state(self) -> State: ...

    def resumed(self, state: State) -> "Local":
        """A new one that goes on from a state."""


def check_moves(
    local: Local, client: optserve.Client, set_id: str, *, uncounted: bool = False, tolerance: float = 1e-12
) -> None:
    """Local steps, then the same here and there, then from there to a new local one, and the same again."""
    shapes = {name: array.shape for name, array in local.parameters().items()}
    dtype = local.parameters()[W].dtype
    gradients = [tensors(seed, dtype, shapes) for seed in range(3 * STEPS)]
    for each in gradients[:STEPS]:
        local.step(each)
    with client.create_parameter_set(set_id, local.state()) as weights:
        for each in gradients[STEPS : 2 * STEPS]:
            local.step(each)
            assert_close(weights.step(each), local.parameters(), tolerance)
        state = weights.state()
        back = local.resumed(state)
        assert_close(back.parameters(), state.parameters, 0.0)
        again = back.state()
        if dtype == np.float64:
            assert_same_state(again, state, uncounted=uncounted)
        for each in gradients[2 * STEPS :]:
            back.step(each)
            assert_close(weights.step(each), back.parameters(), tolerance)
        weights.delete()


def assert_same_state(ours: State, theirs: State, *, uncounted: bool) -> None:
    """All but ASGD's eta and mu of the last update, and steps that the library does not count."""
    memory = {
        name: {key: value for key, value in values.items() if key not in ("eta", "mu")}
        for name, values in theirs.memory.items()
    }
    ours = replace(ours, memory={name: {key: ours.memory[name][key] for key in memory[name]} for name in ours.memory})
    theirs = replace(theirs, memory=memory)
    if uncounted:
        ours = replace(ours, steps=theirs.steps, version=theirs.version)
    assert same(ours, theirs)


class LocalTorch:
    """Two parameter groups, the second with half of the learning rate."""

    def __init__(self, optimizer: optim.Optimizer, parameters: Tensors) -> None:
        self._ours = optimizer
        self._parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in parameters.items()}
        kind = next(name for name in (each.__name__ for each in type(optimizer).__mro__) if hasattr(torch.optim, name))
        given = {**optimizer.hyperparameters, "foreach": False}
        takes = inspect.signature(getattr(torch.optim, kind)).parameters
        w, b = self._parameters.values()
        other = {} if kind == "Rprop" else {"lr": optimizer.lr / 2}  # whose learning rate is the first step size only
        groups = [{"params": [w]}, {"params": [b], **other}]
        self._theirs = getattr(torch.optim, kind)(groups, **{key: given[key] for key in given.keys() & takes})

    def step(self, gradients: Tensors) -> None:
        for name, parameter in self._parameters.items():
            gradient = torch.tensor(gradients[name])
            parameter.grad = gradient.to_sparse(1) if isinstance(self._ours, optim.SparseAdam) else gradient
        self._theirs.step()

    def parameters(self) -> Tensors:
        return {name: parameter.detach().numpy().copy() for name, parameter in self._parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._theirs.state_dict()

    def state(self) -> State:
        return torch_interop.from_state_dict(self.state_dict(), self._parameters, type(self._ours))

    def resumed(self, state: State) -> "LocalTorch":
        other = LocalTorch(self._ours.replace(lr=99.0), dict(state.parameters))
        other._theirs.load_state_dict(torch_interop.state_dict(state, [W], [B]))
        return other


TORCH = {
    "sgd": optim.SGD(lr=0.05),
    "momentum": optim.Momentum(lr=0.02, weight_decay=0.1),
    "dampening": optim.SGD(lr=0.02, momentum=0.8, dampening=0.3),
    "nesterov": optim.Nesterov(lr=0.02, maximize=True),
    "asgd": optim.ASGD(lr=0.05, lambd=0.01, t0=4.0),
    "adagrad": optim.Adagrad(lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1),
    "adadelta": optim.Adadelta(lr=0.5),
    "rmsprop": optim.RMSprop(lr=0.003),
    "rmsprop-all": optim.RMSprop(lr=0.003, centered=True, momentum=0.9),
    "rprop": optim.Rprop(lr=0.01),
    "adam": optim.Adam(lr=0.02, weight_decay=0.05),
    "adamw": optim.AdamW(lr=0.02, betas=(0.8, 0.99)),
    "amsgrad": optim.AMSGrad(lr=0.02),
    "nadam": optim.NAdam(lr=0.02),
    "radam": optim.RAdam(lr=0.02),
    "adamax": optim.Adamax(lr=0.02),
    "sparse-adam": optim.SparseAdam(lr=0.02),
    "adafactor": optim.Adafactor(lr=0.02, weight_decay=0.1),
    "adafactor-eps": optim.Adafactor(lr=0.02, eps=(1e-8, 1e-2), maximize=True),
    "muon": optim.Muon(lr=0.02),
}


@pytest.fixture
def some_client(memory_client: optserve.Client, tcp_client: optserve.Client, name: str) -> optserve.Client:
    """Over TCP for some of the names."""
    return tcp_client if name.startswith("ad") else memory_client


@pytest.mark.parametrize("name", TORCH)
def test_moves_from_and_to_torch(some_client: optserve.Client, new_id: NewId, name: str) -> None:
    start = tensors(100, shapes=shapes_for(TORCH[name]))
    with torch_in_float64(), muon_in_full_precision():
        uncounted = isinstance(TORCH[name], optim.SGD | optim.Muon)
        check_moves(LocalTorch(TORCH[name], start), some_client, new_id(), uncounted=uncounted)


def shapes_for(optimizer: optim.Optimizer) -> Mapping[str, tuple[int, ...]]:
    return MATRICES if isinstance(optimizer, optim.Muon) else SHAPES


@pytest.mark.parametrize("name", TORCH)
def test_a_state_dict_has_what_torch_keeps(name: str) -> None:
    gradients = tensors(0, np.float32, shapes_for(TORCH[name]))
    local = LocalTorch(TORCH[name], gradients)
    local.step(gradients)
    assert described(torch_interop.state_dict(local.state(), [W], [B])) == described(local.state_dict())


def described(state_dict: Mapping[str, Any]) -> dict[int, dict[str, tuple[object, ...]]]:
    """Names, types, dtypes and shapes of what torch keeps of tensors."""

    def of(value: Any) -> tuple[object, ...]:
        return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else (type(value),)

    return {index: {key: of(value) for key, value in kept.items()} for index, kept in state_dict["state"].items()}


class LocalOptax:
    """An optimizer and its state; the parameters are in a nested tree."""

    def __init__(
        self, optimizer: optim.Optimizer, theirs: Any, parameters: Tensors, state: State | None = None
    ) -> None:
        self._ours, self._theirs = optimizer, theirs
        self._params = nested(parameters)
        self._state = theirs.init(self._params)
        if state is not None:
            self._state = optax_interop.opt_state(state, self._state)

    def step(self, gradients: Tensors) -> None:
        updates, self._state = self._theirs.update(nested(gradients), self._state, self._params)
        self._params = optax.apply_updates(self._params, updates)

    def parameters(self) -> Tensors:
        return {f"dense/{name}": np.asarray(value) for name, value in self._params["dense"].items()}

    def state(self) -> State:
        return optax_interop.from_opt_state(self._state, self._params, self._ours)

    def resumed(self, state: State) -> "LocalOptax":
        return LocalOptax(self._ours, self._theirs, dict(state.parameters), state)


def nested(parameters: Tensors) -> Any:
    return {"dense": {name.removeprefix("dense/"): jax.numpy.asarray(value) for name, value in parameters.items()}}


CONVENTION: dict[str, Any] = {"convention": "optax"}
OPTAX = {
    "sgd": (optim.SGD(lr=0.1), optax.sgd(0.1)),
    "momentum": (optim.Momentum(lr=0.1), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (optim.Nesterov(lr=0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "average": (
        optim.AveragedMomentum(lr=0.1), optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(0.1))
    ),
    "sign": (optim.SignSGD(lr=0.1), optax.sign_sgd(0.1)),
    "signum": (optim.Signum(lr=0.1), optax.signum(0.1)),
    "lion": (optim.Lion(lr=0.1), optax.lion(0.1, weight_decay=0.0)),
    "adagrad": (optim.Adagrad(lr=0.1, **CONVENTION), optax.adagrad(0.1)),
    "adadelta": (optim.Adadelta(lr=0.1), optax.adadelta(0.1)),
    "rmsprop": (optim.RMSprop(lr=0.1, **CONVENTION), optax.rmsprop(0.1)),
    "rmsprop-all": (
        optim.RMSprop(lr=0.1, centered=True, momentum=0.5, **CONVENTION), optax.rmsprop(0.1, centered=True, momentum=0.5)
    ),
    "bias-corrected-rmsprop": (optim.BiasCorrectedRMSprop(lr=0.1), optax.rmsprop(0.1, bias_correction=True)),
    "adam": (optim.Adam(lr=0.1, **CONVENTION), optax.adam(0.1)),
    "adamw": (optim.AdamW(lr=0.1, weight_decay=0.1, **CONVENTION), optax.adamw(0.1, weight_decay=0.1)),
    "amsgrad": (optim.AMSGrad(lr=0.1, **CONVENTION), optax.amsgrad(0.1)),
    "nadam": (optim.NAdam(lr=0.1, **CONVENTION), optax.nadam(0.1)),
    "radam": (optim.RAdam(lr=0.1, **CONVENTION), optax.radam(0.1)),
    "adamax": (optim.Adamax(lr=0.1), optax.adamax(0.1)),
    "adabelief": (optim.AdaBelief(lr=0.1), optax.adabelief(0.1)),
    "yogi": (optim.Yogi(lr=0.1), optax.yogi(0.1)),
    "ademamix": (optim.AdEMAMix(lr=0.1), optax.contrib.ademamix(0.1)),
    "adopt": (optim.ADOPT(lr=0.1, eps=1e-2), optax.contrib.adopt(0.1, eps=1e-2)),
    "lars": (optim.LARS(lr=1.0, weight_decay=0.1), optax.lars(1.0, weight_decay=0.1)),
    "lamb": (optim.LAMB(lr=0.1, weight_decay=0.1), optax.lamb(0.1, weight_decay=0.1)),
    "novograd": (optim.NovoGrad(lr=0.1, weight_decay=0.1), optax.novograd(0.1, weight_decay=0.1)),
    "injected": (optim.Adam(lr=0.1, **CONVENTION), optax.inject_hyperparams(optax.adam)(0.1)),
    "masked": (
        optim.Adam(lr=0.1, **CONVENTION),
        optax.partition({"w": optax.adam(0.1), "b": optax.adam(0.1)}, {"dense": {"w": "w", "b": "b"}}),
    ),
}  # fmt: skip
UNCOUNTED_BY_OPTAX = ("sgd", "momentum", "nesterov", "sign", "adagrad", "adadelta", "rmsprop", "rmsprop-all", "lars")


@pytest.mark.parametrize("name", OPTAX)
def test_moves_from_and_to_optax(some_client: optserve.Client, new_id: NewId, name: str) -> None:
    local = LocalOptax(*OPTAX[name], tensors(100))
    check_moves(local, some_client, new_id(), uncounted=name in UNCOUNTED_BY_OPTAX)


class LocalKeras:
    """An optimizer and variables below a name scope, as a layer's are."""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        kind: str,
        options: dict[str, Any],
        parameters: Tensors,
        state: State | None = None,
    ) -> None:
        self._ours, self._kind, self._options = optimizer, kind, options
        with keras.name_scope("dense"):
            self._variables = {
                name: keras.Variable(value, dtype=value.dtype.name, name=name.removeprefix("dense/"))
                for name, value in parameters.items()
            }
        self._theirs = getattr(keras.optimizers, kind)(learning_rate=0.01, **options)
        self._theirs.build(list(self._variables.values()))
        if state is not None:
            values = keras_interop.values(state, self._theirs.variables)
            for variable, value in zip(self._theirs.variables, values, strict=True):
                variable.assign(value)

    def step(self, gradients: Tensors) -> None:
        pairs = [keras.ops.convert_to_tensor(gradients[name]) for name in self._variables]
        self._theirs.apply(pairs, list(self._variables.values()))

    def parameters(self) -> Tensors:
        return {name: np.asarray(variable).copy() for name, variable in self._variables.items()}

    def state(self) -> State:
        return keras_interop.from_variables(self._theirs.variables, self._variables, self._ours)

    def resumed(self, state: State) -> "LocalKeras":
        return LocalKeras(self._ours, self._kind, self._options, dict(state.parameters), state)


OF_KERAS: dict[str, Any] = {"lr": 99.0, "convention": "keras"}  # the learning rate is the variable's
KERAS: dict[str, tuple[optim.Optimizer, str, dict[str, Any]]] = {
    "sgd": (optim.SGD(**OF_KERAS), "SGD", {}),
    "momentum": (optim.Momentum(**OF_KERAS), "SGD", {"momentum": 0.9}),
    "nesterov": (optim.Nesterov(**OF_KERAS), "SGD", {"momentum": 0.9, "nesterov": True}),
    "velocity": (optim.VelocityMomentum(), "SGD", {"momentum": 0.9}),
    "lion": (optim.Lion(), "Lion", {}),
    "adagrad": (optim.Adagrad(**OF_KERAS), "Adagrad", {}),
    "adadelta": (optim.Adadelta(rho=0.95, eps=1e-7), "Adadelta", {}),
    "rmsprop": (optim.RMSprop(**OF_KERAS), "RMSprop", {}),
    "rmsprop-all": (
        optim.RMSprop(centered=True, momentum=0.5, **OF_KERAS), "RMSprop", {"centered": True, "momentum": 0.5}
    ),
    "ftrl": (optim.FTRL(), "Ftrl", {}),
    "adam": (optim.Adam(weight_decay=0.1, **OF_KERAS), "Adam", {"weight_decay": 0.1}),
    "amsgrad": (optim.AMSGrad(**OF_KERAS), "Adam", {"amsgrad": True}),
    "nadam": (optim.NAdam(**OF_KERAS), "Nadam", {}),
    "adamax": (optim.Adamax(**OF_KERAS), "Adamax", {}),
    "lamb": (optim.LAMB(weight_decay=0.1, **OF_KERAS), "Lamb", {"weight_decay": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS)
def test_moves_from_and_to_keras(some_client: optserve.Client, new_id: NewId, name: str) -> None:
    check_moves(LocalKeras(*KERAS[name], tensors(100)), some_client, new_id())


def test_float32_moves_within_its_rounding(memory_client: optserve.Client, new_id: NewId) -> None:
    """Six updates of about 0.01 to numbers of about 1: a few units in the last place."""
    start = tensors(100, np.float32)
    locals_: Sequence[Local] = [
        LocalTorch(optim.Adam(lr=0.01), start),
        LocalOptax(optim.Adam(lr=0.01, **CONVENTION), optax.adam(0.01), start),
        LocalKeras(optim.Adam(**OF_KERAS), "Adam", {}, start),
    ]
    for local in locals_:
        check_moves(local, memory_client, new_id(), tolerance=2e-6)


def test_bfloat16_moves_from_torch_as_it_is(memory_client: optserve.Client, new_id: NewId) -> None:
    parameter = torch.nn.Parameter(torch.arange(5, dtype=torch.bfloat16))
    theirs = torch.optim.Adam([parameter], foreach=False)
    parameter.grad = torch.ones_like(parameter)
    theirs.step()
    state = torch_interop.from_state_dict(theirs.state_dict(), {"w": parameter}, optim.Adam)
    weights = memory_client.create_parameter_set(new_id(), state)
    np.testing.assert_array_equal(weights.pull()["w"].astype(np.float32), parameter.detach().float().numpy())
    assert (state.tensors[0].dtype.name, state.slots["exp_avg"]["w"].dtype) == ("bfloat16", np.float32)


def test_torch_before_its_first_step_begins_as_a_new_set(memory_client: optserve.Client, new_id: NewId) -> None:
    with torch_in_float64():
        for optimizer in (optim.Momentum(), optim.Adagrad(), optim.Rprop(), optim.NAdam(), optim.Adafactor()):
            local = LocalTorch(optimizer, tensors(0))
            weights = memory_client.create_parameter_set(new_id(), local.state())
            fresh = local.resumed(weights.state())
            for seed in (1, 2):
                local.step(tensors(seed))
                fresh.step(tensors(seed))
                assert_close(weights.step(tensors(seed)), local.parameters())
                assert_close(fresh.parameters(), local.parameters())


def test_a_group_keeps_its_name_and_hyperparameters_through_torch(
    memory_client: optserve.Client, new_id: NewId
) -> None:
    groups = [optim.Group("no_decay", B, weight_decay=0.0)]
    weights = memory_client.create_parameter_set(new_id(), tensors(0), optim.AdamW(lr=0.1), groups=groups)
    weights.push(tensors(1))
    state = weights.state()
    parameters = {name: torch.tensor(array) for name, array in state.parameters.items()}
    with torch_in_float64():
        theirs = torch_interop.state_dict(state)
    assert [group["weight_decay"] for group in theirs["param_groups"]] == [0.01, 0.0]
    assert same(torch_interop.from_state_dict(theirs, parameters, optim.AdamW), state)


def test_an_average_moves_to_and_from_keras(memory_client: optserve.Client, new_id: NewId) -> None:
    local = LocalKeras(optim.Adam(**OF_KERAS), "Adam", {"use_ema": True, "ema_momentum": 0.9}, tensors(100))
    local.step(tensors(0))
    weights = memory_client.create_parameter_set(new_id(), local.state(), transforms=Transforms(average=EMA(0.9)))
    for seed in (1, 2):
        local.step(tensors(seed))
        weights.step(tensors(seed))
    assert_close(weights.pull(evaluation=True), dict(local.state().slots["transform:average"]))
    assert same(local.resumed(weights.state()).state(), weights.state())


def moved(
    optimizer: optim.Optimizer, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **options: Any
) -> Callable[[optserve.Client], State]:
    start = tensors(0, shapes=shapes)

    def push(client: optserve.Client) -> State:
        with client.create_parameter_set("tests/interop", start, optimizer, **options) as weights:
            weights.push({W: start[W]} if optimizer.rule == "RAdam" else start)
            state = weights.state()
            weights.delete()
        return state

    return push


PARAMS = nested(tensors(0))
TWO_RATES = [optim.Group("b", B, lr=0.5)]
WRONG: dict[str, tuple[Callable[[optserve.Client], State], Callable[[State], object], str]] = {
    "rule that torch lacks": (moved(optim.Adan()), torch_interop.state_dict, "from torch: SGD, .*got Adan"),
    "vectors for torch's Muon": (
        moved(optim.Muon()), torch_interop.state_dict, r"matrices only.*got 'dense/b': float64\[3\].*AdamW"
    ),
    "maximize for torch's Muon": (
        moved(optim.Muon(maximize=True), shapes=MATRICES), torch_interop.state_dict, "maximize=False.*group 'default'"
    ),
    "state that optax works out": (
        moved(optim.ScheduleFreeSGD()),
        lambda s: optax_interop.opt_state(s, optax.contrib.schedule_free_sgd().init(PARAMS)), "optax: .*got ScheduleFreeSGD",
    ),
    "variables without names": (
        moved(optim.Adafactor(**OF_KERAS)), lambda s: LocalKeras(optim.Adafactor(**OF_KERAS), "Adafactor", {}, tensors(0), s),
        "Keras: .*got Adafactor",
    ),
    "convention": (moved(optim.Adam(**CONVENTION)), torch_interop.state_dict, "convention='torch'; got 'optax'"),
    "slot of a transform": (
        moved(optim.Adam(), transforms=Transforms(lookahead=Lookahead())), torch_interop.state_dict, "'transform:lookahead'"
    ),
    "waiting pushes": (
        moved(optim.Adam(), transforms=Transforms(accumulate=2)), torch_interop.state_dict, "between updates.*1 pushes"
    ),
    "tensor in no group": (
        moved(optim.Adam()), lambda s: torch_interop.state_dict(s, [W]), "each of the tensors dense/w, dense/b"
    ),
    "one torch group of two": (
        moved(optim.Adam(), groups=TWO_RATES), lambda s: torch_interop.state_dict(s, [W, B]),
        "same hyperparameters.*'default', 'b'",
    ),
    "other template": (
        moved(optim.Adam(**CONVENTION)), lambda s: optax_interop.opt_state(s, optax.sgd(0.1, momentum=0.9).init(PARAMS)),
        "'mu', 'nu'; got 'trace'",
    ),
    "template without a place": (
        moved(optim.RMSprop(momentum=0.9, **CONVENTION)),
        lambda s: optax_interop.opt_state(s, optax.rmsprop(0.1).init(PARAMS)), "it has no 'trace'",
    ),
    "template that is no state": (
        moved(optim.Adam(**CONVENTION)), lambda s: optax_interop.opt_state(s, [1]), "tuples all through; got list"
    ),
    "template of other parameters": (
        moved(optim.Adam(**CONVENTION)), lambda s: optax_interop.opt_state(s, optax.adam(0.1).init({"z": np.ones(3)})),
        "'dense/w', 'dense/b'.*'z' of \\[3\\]",
    ),
    "counts that differ": (
        moved(optim.RAdam(**CONVENTION)), lambda s: optax_interop.opt_state(s, optax.radam(0.1).init(PARAMS)),
        "as many updates of every tensor.*got 0 to 1",
    ),
    "several learning rates": (
        moved(optim.Adam(**OF_KERAS), groups=TWO_RATES),
        lambda s: LocalKeras(optim.Adam(**OF_KERAS), "Adam", {}, tensors(0), s), r"one learning rate.*\[0.5, 99.0\]",
    ),
    "other variables": (
        moved(optim.Adam(**OF_KERAS)), lambda s: LocalKeras(optim.Adam(**OF_KERAS), "Adagrad", {}, tensors(0), s),
        "momentum, velocity, velocity_hat.*got 'adagrad.*dense_w_accumulator'",
    ),
    "too few variables": (
        moved(optim.Adam(**OF_KERAS)), lambda s: keras_interop.values(s, []), "variable for exp_avg of 'dense/b'; got none"
    ),
    "too few parameters": (
        moved(optim.Adam()),
        lambda s: torch_interop.from_state_dict(torch_interop.state_dict(s), {W: torch.ones(4, 3)}, optim.Adam),
        "2 parameters.*got 1",
    ),
    "parameters of another shape": (
        moved(optim.Adam()),
        lambda s: torch_interop.from_state_dict(
            torch_interop.state_dict(s), {W: torch.ones(3, 4), B: torch.ones(3)}, optim.Adam
        ),
        r"'dense/w': float32\[3, 4\]; got \[4, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "convert", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_a_library_has_no_place_for_is_refused(
    memory_client: optserve.Client,
    make: Callable[[optserve.Client], State],
    convert: Callable[[State], object],
    message: str,
) -> None:
    state = make(memory_client)
    with pytest.raises(optserve.InvalidState, match=f"(?s){message}"):
        convert(state)


def test_the_sdk_imports_no_library() -> None:
    import subprocess
    import sys

    program = "import sys, optserve, optserve.interop; print(*{'torch', 'jax', 'optax', 'keras'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
