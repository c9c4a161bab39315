"""torch's own database of optimizer configurations, `optim_db`, with the server as one more implementation.

What is good input there is good input here and gives torch's numbers; what is bad input there is bad input here. `foreach`,
`fused`, `capturable` and `differentiable` choose an implementation in torch and change no mathematics: here they have no
meaning, and are dropped.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
import torch

import optserve
from direct import DirectSet
from optimizer_table import muon_in_full_precision, torch_in_float64
from optserve import TensorSpec, optim
from optserve._specification import ParameterSetSpec
from optserve.optim._optimizer import as_number
from torch_database import HERE, OptimizerInfo, OptimizerInput, case, optim_db, ours

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NewId = Callable[[], str]

ABSENT = {"LBFGS": "evaluates the loss several times in one step: the worker would have to take part in it"}
ONLY_MATRICES = ("Muon", "SparseAdam")
STEPS = 10
SPACING = 1.2e-7  # of float32: what is that near is equal
MATRIX = np.ones((2, 3))


# Which torch allows, and its database does not have.
EDGES = {"Adadelta": {"rho": 1.0}, "RMSprop": {"alpha": 1.0}}


def inputs(info: OptimizerInfo) -> list[OptimizerInput]:
    """Its valid configurations."""
    edges = EDGES.get(info.optim_cls.__name__, {})
    return [*info.optim_inputs_func("cpu"), *(OptimizerInput(None, {name: edges[name]}, name) for name in edges)]


INPUTS = [case(info, each, each.desc) for info in HERE for each in inputs(info)]
BAD = [
    case(info, each.optimizer_error_input, each.optimizer_error_input.desc)
    for info in HERE
    for each in info.optim_error_inputs_func("cpu", torch.float32)
]


def training(info: OptimizerInfo) -> tuple[Tensors, list[Tensors]]:
    """Parameters of several shapes, and the gradients of some steps; one tensor has none in one of them."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (5, 3), "row": (1, 7)}
    if info.optim_cls.__name__ not in ONLY_MATRICES:
        shapes |= {"vector": (7,), "scalar": (), "image": (2, 3, 4, 2)}
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    steps = [
        {name: rng.normal(0.3, 1.0, shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(STEPS)
    ]
    del steps[4]["row"]
    return parameters, steps


def run_torch(info: OptimizerInfo, options: Mapping[str, Any], parameters: Tensors, steps: list[Tensors]) -> Tensors:
    """What torch's loop over tensors makes of the parameters."""
    loop = {"foreach": False} if "foreach" in info.supported_impls else {}
    options = {name: as_number(value) for name, value in options.items()}  # SparseAdam would round a tensor to float32
    with torch_in_float64(), muon_in_full_precision():
        tensors = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in parameters.items()}
        theirs = info.optim_cls(tensors.values(), **{**options, **loop})
        for gradients in steps:
            for name, tensor in tensors.items():
                gradient = torch.from_numpy(gradients[name].copy()) if name in gradients else None
                sparse = gradient is not None and info.only_supports_sparse_grads
                tensor.grad = gradient.to_sparse() if sparse else gradient
            theirs.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def in_float64(tensors: Tensors) -> Tensors:
    return {name: array.astype(np.float64) for name, array in tensors.items()}


def run_direct(optimizer: optim.Optimizer, parameters: Tensors, steps: list[Tensors]) -> Tensors:
    direct = DirectSet(parameters, optimizer)
    for gradients in steps:
        assert direct.push(gradients).applied
    return direct.pull()


def distance(left: Tensors, right: Tensors) -> float:
    """The largest difference, relative to the largest magnitude of its tensor."""
    return max(np.abs(left[name].astype(np.float64) - right[name]).max() / np.abs(right[name]).max() for name in right)


def test_all_but_the_absent_are_here() -> None:
    assert {info.optim_cls.__name__ for info in optim_db} - optim.catalogue().keys() == ABSENT.keys()


@pytest.mark.parametrize(("info", "given"), INPUTS)
def test_torch_s_configurations_give_torch_s_numbers(info: OptimizerInfo, given: OptimizerInput) -> None:
    parameters, steps = training(info)
    exact = run_torch(info, given.kwargs, in_float64(parameters), [*map(in_float64, steps)])
    theirs = distance(run_torch(info, given.kwargs, parameters, steps), exact)
    optimizer = ours(info, given.kwargs)
    assert distance(run_direct(optimizer, in_float64(parameters), [*map(in_float64, steps)]), exact) <= 1e-12
    assert distance(run_direct(optimizer, parameters, steps), exact) <= max(1.5 * theirs, SPACING)


@pytest.mark.parametrize("info", HERE, ids=lambda info: info.optim_cls.__name__)
def test_their_configurations_travel(info: OptimizerInfo, tcp_client: optserve.Client, new_id: NewId) -> None:
    parameters, steps = training(info)
    for given in inputs(info):
        optimizer = ours(info, given.kwargs)
        with tcp_client.create_parameter_set(new_id(), parameters, optimizer) as weights:
            assert weights.describe().groups[0].optimizer == optimizer
            for gradients in steps:
                weights.push(gradients)
            pulled = weights.pull()
            weights.delete()
        for name, expected in run_direct(optimizer, parameters, steps).items():
            np.testing.assert_array_equal(pulled[name], expected)


# What is wrong with a list of parameters there, and with what a set is created from here.
Creation = Callable[[optserve.Client, str, optim.Optimizer], object]
CREATIONS: dict[str, Creation] = {
    "invalid param type": lambda client, set_id, optimizer: client.create_parameter_set(set_id, MATRIX, optimizer),
    # Tensors have names here, which tell them apart: two that are equal are two.
    "a param group cannot have duplicate parameters": lambda client, set_id, optimizer: ParameterSetSpec(
        set_id, (TensorSpec.of("weight", MATRIX),) * 2, optimizer
    ),
    "duplicate parameters should not occur across param groups either": lambda client, set_id, optimizer: (
        client.create_parameter_set(
            set_id, {"weight": MATRIX}, optimizer, groups=[optim.Group(group, "weight") for group in ("one", "two")]
        )
    ),
    "all optimizer params should be with/without names": lambda client, set_id, optimizer: client.create_parameter_set(
        set_id, {"weight": MATRIX, None: MATRIX}, optimizer
    ),
    "all optimizer param groups should be with/without names.": lambda client, set_id, optimizer: (
        client.create_parameter_set(
            set_id, {"weight": MATRIX, 1: MATRIX}, optimizer, groups=[optim.Group("one", "weight")]
        )
    ),
}

# What is no error here, since only one of torch's implementations can't do it.
NO_ERROR = {
    "lr as Tensor doesn't work with foreach & not capturable": "the implementation that is asked for has no meaning here",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "neither has it here",
    "betas must be either both floats or both Tensors": "a tensor of one element is the number in it, each for itself",
    "only support 2D parameters": "what is no matrix follows AdamW here",
}


@pytest.mark.parametrize(("info", "given"), BAD)
def test_what_torch_refuses_is_refused(
    info: OptimizerInfo, given: OptimizerInput, memory_client: optserve.Client, new_id: NewId
) -> None:
    if given.desc in NO_ERROR:
        assert ours(info, given.kwargs) == ours(info, {name: as_number(value) for name, value in given.kwargs.items()})
    elif given.desc in CREATIONS:
        with pytest.raises(optserve.InvalidArgument, match="expected|belongs to an earlier group"):
            CREATIONS[given.desc](memory_client, new_id(), ours(info, {}))
    elif given.kwargs:
        with pytest.raises(optserve.InvalidHyperparameter, match="expected"):
            ours(info, given.kwargs)
    else:  # parameters of the wrong kind, whatever they are
        tensors = [tensor for each in given.params for tensor in (each["params"] if isinstance(each, dict) else [each])]
        parameters = {str(k): tensor.detach() for k, tensor in enumerate(tensors)}
        with pytest.raises(optserve.InvalidArgument, match="expected"):
            memory_client.create_parameter_set(new_id(), parameters, ours(info, {}))


# Where we refuse more: torch does not check these, RMSprop's alpha not above 1, where it takes roots of negative numbers.
UNCHECKED = {("SGD", "dampening"), ("ASGD", "lambd"), ("ASGD", "alpha"), ("ASGD", "t0"), ("Rprop", "step_sizes")}
UNCHECKED |= {("RMSprop", "alpha"), ("Muon", "momentum"), ("Muon", "eps"), ("Muon", "ns_steps")}


# Where torch refuses more: a learning rate of 0, with which its other classes start a warm-up, and an epsilon of 0.
REFUSED_THERE = {("SparseAdam", "lr"), ("SparseAdam", "eps")}


def refused(build: Callable[..., object], *arguments: object, **options: Any) -> bool:
    try:
        build(*arguments, **options)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("info", HERE, ids=lambda info: info.optim_cls.__name__)
def test_ranges_are_those_of_torch(info: OptimizerInfo) -> None:
    """At their ends and beyond. What is not finite is refused here in any case."""
    name = info.optim_cls.__name__
    for hyperparameter, _, default in optim.catalogue()[name].described():
        if isinstance(default, bool | str | None) or hyperparameter not in inspect.signature(info.optim_cls).parameters:
            continue
        for value in (-1.0, -1e-9, 0.0, 0.5, 1.0, 1.0 + 1e-9, 2.0):
            for given in [value] if isinstance(default, int | float) else replaced_one_by_one(default, value):
                options = {hyperparameter: given}
                here, theirs = refused(ours, info, options), refused(info.optim_cls, [torch.ones(1, 1)], **options)
                known = UNCHECKED if here else REFUSED_THERE
                assert here == theirs or (name, hyperparameter) in known, options


def replaced_one_by_one(values: tuple[float, ...], value: float) -> list[tuple[float, ...]]:
    return [(*values[:k], value, *values[k + 1 :]) for k in range(len(values))]


@pytest.mark.parametrize(
    "number",
    [torch.tensor(0.25), torch.tensor([[0.25]]), np.float32(0.25), np.full((1,), 0.25), jax.numpy.asarray(0.25)],
)
def test_an_array_of_one_element_is_the_number_in_it(number: Any, client: optserve.Client, new_id: NewId) -> None:
    assert optim.Adam(lr=number, betas=(number, 0.5)) == optim.Adam(lr=0.25, betas=(0.25, 0.5))
    groups = [optim.Group("one", "x", lr=number)]
    with client.create_parameter_set(new_id(), {"x": MATRIX, "y": MATRIX}, optim.Adam(), groups=groups) as weights:
        weights.push({"x": MATRIX}, hyperparameters={"default": {"betas": (number, number)}})
        weights.update(eps=number)
        default, one = weights.describe().groups
    assert one.optimizer.lr == 0.25
    assert default.optimizer == optim.Adam(betas=(0.25, 0.25), eps=0.25)


@pytest.mark.parametrize("value", [torch.tensor([0.1, 0.1]), np.zeros(0), torch.tensor(1j), torch.tensor(True)])
def test_other_arrays_are_no_number(value: Any) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match="expected lr to be a number"):
        optim.Adam(lr=value)
