"""Bad input gets a typed error that says what was expected and what came, and changes nothing at all.

"Nothing" is checked against a twin set that never saw the bad input: after one more good push, parameters and state (through
what the next updates make of it) are equal bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import optserve
from optserve import optim

Array = np.ndarray[Any, Any]
NewId = Callable[[], str]
Attempt = Callable[[optserve.Client, optserve.ParameterSet], object]

W = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
B = np.linspace(0, 1, 5000, dtype=np.float32)
GOOD = {"w": W[::-1].copy(), "b": B - 0.5}


def with_value(array: Array, value: float) -> Array:
    poisoned = array.copy()
    poisoned.reshape(-1)[-1] = value
    return poisoned


@dataclass(frozen=True)
class Bad:
    """An attempt on an existing set, the error's type, and what its message must say."""

    attempt: Attempt
    error: type[optserve.OptserveError]
    message: str


def pushing(gradients: dict[str, Any], **options: Any) -> Attempt:
    return lambda client, weights: weights.push(gradients, **options)


def stepping(gradients: dict[str, Any]) -> Attempt:
    return lambda client, weights: weights.step(gradients)


def updating(**values: Any) -> Attempt:
    return lambda client, weights: weights.update(**values)


def creating(set_id: str, optimizer: Callable[[], optim.Optimizer] = optim.Adam, **options: Any) -> Attempt:
    parameters = options.pop("parameters", {"w": W})
    return lambda client, weights: client.create_parameter_set(set_id, parameters, optimizer(), **options)


BAD = {
    "unknown tensor": Bad(pushing({"w": W, "v": W}), optserve.TensorMismatch, "expected a tensor among 'w', 'b'; got 'v'"),
    "wrong shape": Bad(pushing({"w": W.T.copy()}), optserve.TensorMismatch, r"float32\[2, 3\]; got float32\[3, 2\]"),
    "wrong rank": Bad(pushing({"w": W.reshape(6)}), optserve.TensorMismatch, r"float32\[2, 3\]; got float32\[6\]"),
    "wrong dtype": Bad(pushing({"w": W.astype(np.float64)}), optserve.TensorMismatch, r"float32\[2, 3\]; got float64"),
    "integer dtype": Bad(pushing({"w": W.astype(np.int32)}), optserve.InvalidTensor, "'w'.*float32.*got 'int32'"),
    "object dtype": Bad(pushing({"w": np.array([object()])}), optserve.InvalidTensor, "'w'.*got 'object'"),
    "no array": Bad(pushing({"w": [[1.0], [1.0, 2.0]]}), optserve.InvalidTensor, "expected 'w' to be an array"),
    "not a mapping": Bad(pushing([W]), optserve.InvalidTensor, "expected a mapping.*got list"),  # type: ignore[arg-type]
    "no gradient": Bad(pushing({}), optserve.TensorMismatch, "at least one tensor.*got none"),
    "nan": Bad(pushing({"w": with_value(W, np.nan)}), optserve.NonFiniteValue, r"'w'.*got nan at index \[1, 2\]"),
    "infinity": Bad(pushing({"b": with_value(B, np.inf), "w": W}), optserve.NonFiniteValue, r"'b'.*got inf at index \[4999\]"),
    "nan in a step": Bad(stepping({"w": with_value(W, -np.inf)}), optserve.NonFiniteValue, "got -inf"),
    "parameters pushed to a set that holds them": Bad(
        pushing({"w": W}, parameters={"w": W}), optserve.TensorMismatch, "holds its parameters.*'w'"
    ),
    "unknown group in a push": Bad(
        pushing({"w": W}, hyperparameters={"head": {"lr": 0.1}}), optserve.InvalidGroup, "among default; got 'head'"
    ),
    "bad hyperparameter in a push": Bad(
        pushing({"w": W}, hyperparameters={"default": {"lr": -1.0}}), optserve.InvalidHyperparameter, "lr.*at least 0.*-1.0"
    ),
    "unknown hyperparameter": Bad(
        updating(learning_rate=0.1), optserve.InvalidHyperparameter, "among lr, betas.*got 'learning_rate'"
    ),
    "negative learning rate": Bad(updating(lr=-0.1), optserve.InvalidHyperparameter, "lr.*at least 0; got -0.1"),
    "learning rate of nan": Bad(updating(lr=float("nan")), optserve.InvalidHyperparameter, "lr.*finite.*got nan"),
    "learning rate of text": Bad(updating(lr="fast"), optserve.InvalidHyperparameter, "lr to be a number; got 'fast'"),
    "beta of 1": Bad(updating(betas=(0.9, 1.0)), optserve.InvalidHyperparameter, r"betas\[1\].*below 1; got 1.0"),
    "one beta": Bad(updating(betas=[0.9]), optserve.InvalidHyperparameter, r"betas to be 2 numbers; got \[0.9\]"),
    "flag of 1": Bad(updating(maximize=1), optserve.InvalidHyperparameter, "maximize to be True or False; got 1"),
    "structural change": Bad(updating(amsgrad=True), optserve.InvalidHyperparameter, "amsgrad to stay False.*fixed"),
    "value of no wire type": Bad(updating(lr=object()), optserve.InvalidHyperparameter, "expected a number.*got object"),
    "two changes, one bad": Bad(updating(lr=0.5, eps=-1.0), optserve.InvalidHyperparameter, "eps"),
    "unknown group": Bad(updating(group="head", lr=0.5), optserve.InvalidGroup, "among default; got 'head'"),
    "pull of an unknown tensor": Bad(
        lambda client, weights: weights.pull(tensors=["w", "z"]), optserve.TensorMismatch, "among 'w', 'b'; got 'z'"
    ),
    "step that asks for an unknown tensor": Bad(
        lambda client, weights: weights.step({"w": W}, tensors=["typo"]), optserve.TensorMismatch, "among 'w', 'b'; got 'typo'"
    ),
    "tensor name that is no text": Bad(
        lambda client, weights: weights.push({1: W}),  # type: ignore[dict-item]
        optserve.InvalidName, "type str; got int: 1",
    ),
    "group with a value of no wire type": Bad(
        creating("bad/set", groups=[optim.Group("g", "w", lr=object())]), optserve.InvalidHyperparameter, "got object"
    ),
    "hyperparameter named self": Bad(
        pushing({"w": W}, hyperparameters={"default": {"self": 1.0}}), optserve.InvalidHyperparameter, "got 'self'"
    ),
    "hyperparameters without a group": Bad(
        pushing({"w": W}, hyperparameters={"lr": 1.0}), optserve.InvalidHyperparameter, "by group and name.*'default'"
    ),
    "learning rate beyond float32": Bad(
        pushing({"w": W}, hyperparameters={"default": {"lr": 1e39}}), optserve.InvalidHyperparameter, "computed in float32"
    ),
    "learning rate beyond float64": Bad(updating(lr=10**400), optserve.InvalidHyperparameter, "expected"),
    "an array for gradients": Bad(pushing(W), optserve.InvalidTensor, "expected a mapping.*got ndarray"),  # type: ignore[arg-type]
    "one tensor pulled twice": Bad(
        lambda client, weights: weights.pull(tensors=["w", "w"]), optserve.TensorMismatch, "each tensor once"
    ),
    "optimizer without parentheses": Bad(
        creating("bad/set", lambda: optim.Adam),  # type: ignore[arg-type, return-value]
        optserve.InvalidHyperparameter, r"such as optim.Adam\(lr=1e-3\)",
    ),
    "id that climbs": Bad(creating("../x"), optserve.InvalidName, "expected an id.*got '../x'"),
    "id with an empty component": Bad(creating("a//b"), optserve.InvalidName, "got 'a//b'"),
    "absolute id": Bad(creating("/etc/passwd"), optserve.InvalidName, "got '/etc/passwd'"),
    "empty id": Bad(creating(""), optserve.InvalidName, "got ''"),
    "id with nul": Bad(creating("a\0b"), optserve.InvalidName, r"got 'a\\x00b'"),
    "id of another alphabet": Bad(creating("дом"), optserve.InvalidName, "got 'дом'"),
    "long id": Bad(creating("a" * 129), optserve.InvalidName, "at most 128"),
    "id to look up that climbs": Bad(
        lambda client, weights: client.parameter_set("../x"), optserve.InvalidName, "got '../x'"
    ),
    "no tensors": Bad(creating("bad/set", parameters={}), optserve.InvalidTensor, "expected 1 to 100000 tensors"),
    "tensor name with a control character": Bad(
        creating("bad/set", parameters={"a\nb": W}), optserve.InvalidName, r"got 'a\\nb'"
    ),
    "nine dimensions": Bad(
        creating("bad/set", parameters={"x": np.zeros((1,) * 9, np.float32)}), optserve.InvalidTensor, "at most 8.*has 9"
    ),
    "initial nan": Bad(
        creating("bad/set", parameters={"x": with_value(W, np.nan)}), optserve.NonFiniteValue, r"'x'.*got nan at index \[1, 2\]"
    ),
    "group without tensors": Bad(
        creating("bad/set", groups=[optim.Group("head", "head.*", lr=0.1)]), optserve.InvalidGroup, "'head.*' to match a tensor"
    ),
    "group twice": Bad(
        creating("bad/set", groups=[optim.Group("g", "w"), optim.Group("g", "w")]), optserve.InvalidGroup, "unique.*'g'"
    ),
    "group behind another": Bad(
        creating("bad/set", groups=[optim.Group("g", "*"), optim.Group("h", "w")]), optserve.InvalidGroup, "'h'.*earlier"
    ),
    "group with an unknown hyperparameter": Bad(
        creating("bad/set", groups=[optim.Group("g", "w", momentum=0.9)]), optserve.InvalidHyperparameter, "got 'momentum'"
    ),
    "group with other state": Bad(
        creating("bad/set", groups=[optim.Group("g", "w", amsgrad=True)]), optserve.InvalidHyperparameter, "amsgrad to stay"
    ),
    "Adagrad's average switched on live": Bad(
        creating("bad/set", optim.FedAdagrad, groups=[optim.Group("g", "w", beta1=0.9)]),
        optserve.InvalidHyperparameter,
        r"keep the state \['sum'\]",
    ),
    "momentum switched on live": Bad(
        creating("bad/set", optim.SGD, groups=[optim.Group("g", "w", momentum=0.9)]),
        optserve.InvalidHyperparameter,
        "momentum_buffer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_changes_nothing(client: optserve.Client, new_id: NewId, bad: Bad) -> None:
    ids = new_id(), new_id()
    twins = [client.create_parameter_set(set_id, {"w": W, "b": B}, optim.Adam(lr=0.1)) for set_id in ids]
    for weights in twins:
        weights.push(GOOD)
    before = twins[0].describe()
    with pytest.raises(bad.error, match=f"(?s){bad.message}"):
        bad.attempt(client, twins[0])
    after = twins[0].describe()
    assert (after.groups, after.position) == (before.groups, before.position)
    assert "bad/set" not in [each.id for each in client.list_parameter_sets()]
    results = [weights.step(GOOD) for weights in twins]
    assert [result.version for result in results] == [2, 2]
    for name in GOOD:
        np.testing.assert_array_equal(results[0][name], results[1][name])
    for weights in twins:
        weights.delete()


def test_a_refused_push_leaves_a_legal_next_sequence(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), {"w": W}, optim.SGD())
    assert weights.push({"w": W}).sequence == 1
    for _ in range(3):
        with pytest.raises(optserve.NonFiniteValue):
            weights.push({"w": with_value(W, np.nan)})
    receipt = weights.push({"w": W})
    assert (receipt.sequence, receipt.version, receipt.applied) == (5, 2, True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optim.SGD(lr=-1), "lr.*at least 0; got -1"),
        (lambda: optim.SGD(nesterov=True), "positive momentum.*momentum=0.0"),
        (lambda: optim.SGD(momentum=0.9, dampening=0.1, nesterov=True), "no dampening.*dampening=0.1"),
        (lambda: optim.Adam(betas=(1.0, 0.999)), r"betas\[0\].*below 1"),
        (lambda: optim.Adam(eps=-1e-8), "eps.*at least 0"),
        (lambda: optim.Adam(weight_decay=-0.1), "weight_decay.*at least 0"),
        (lambda: optim.RMSprop(alpha=1.1), "alpha.*at least 0 and at most 1; got 1.1"),
        (lambda: optim.RMSprop(momentum=-0.1), "momentum.*at least 0"),
        (lambda: optim.Adagrad(lr_decay=-1), "lr_decay.*at least 0"),
        (lambda: optim.NAdam(momentum_decay=-1), "momentum_decay.*at least 0"),
        (lambda: optim.Rprop(etas=(0.5, 1.0)), r"0 < etas\[0\] < 1 < etas\[1\]; got \(0.5, 1.0\)"),
        (lambda: optim.FTRL(lr=0), "positive lr"),
        (lambda: optim.DelayedNesterov(every=4, c=0.3), "c up to 1/every, 1/4; got 0.3"),
        (
            lambda: optim.FedYogi(bias_correction="flower"),
            "bias_correction to be 'none' or 'adam' or 'tff'; got 'flower'",
        ),
        (lambda: optim.Adan(betas=(0.9, 0.9)), "betas to be 3 numbers"),
        (lambda: optim.Adam(lr=True), "lr to be a number; got True"),
        (lambda: optim.Adam(amsgrad=0), "amsgrad to be True or False; got 0"),
        (lambda: optim.Adam(betas=0.9), "betas to be 2 numbers; got 0.9"),
        (lambda: optim.Adam().replace(beta=0.9), r"got 'beta' \(did you mean 'betas'\?\)"),
    ],
)
def test_an_optimizer_refuses_values_where_it_is_built(build: Callable[[], object], message: str) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match=message):
        build()


@pytest.mark.parametrize("address", ["", "nonsense", "http://localhost:1", "127.0.0.1:99999", "[::1", "host:abc"])
def test_an_address_that_can_not_be_one_is_refused(address: str) -> None:
    with pytest.raises(optserve.InvalidName, match="expected an address"):
        optserve.Client(address)


def test_an_unknown_rule_is_refused_with_a_suggestion() -> None:
    with pytest.raises(optserve.UnknownRule, match=r"among SGD, .*got 'Adm' \(did you mean 'Adam'\?\)"):
        optim.from_hyperparameters("Adm", {})


@pytest.mark.parametrize("name", ["", "default", "a b", "x" * 129])
def test_a_group_needs_a_proper_name(name: str) -> None:
    with pytest.raises(optserve.InvalidGroup, match="group name"):
        optim.Group(name, "w")


@pytest.mark.parametrize("optimizer", [optim.ASGD(), optim.FTRL(), optim.Adan()], ids=lambda each: each.rule)
def test_a_rule_that_reads_parameters_needs_a_set_that_holds_them(
    client: optserve.Client, new_id: NewId, optimizer: optim.Optimizer
) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match=f"{optimizer.rule} reads them"):
        client.create_parameter_set(new_id(), {"x": np.ones(3)}, optimizer, holds="moments")


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optim.Adam(convention="keras"), {"lr": 1e-3, "eps": 1e-7}),
        (optim.Adam(eps=1e-5, convention="keras"), {"eps": 1e-5}),
        (optim.AdamW(convention="optax"), {"weight_decay": 1e-4, "eps": 1e-8}),
        (optim.RMSprop(0.5, convention="keras"), {"lr": 0.5, "alpha": 0.9, "eps": 1e-7}),
        (optim.NAdam(convention="keras"), {"momentum_decay": 1.0}),
        (optim.Adagrad(), {"initial_accumulator_value": 0.0}),
        (optim.Adagrad(convention="optax").replace(lr=0.3), {"lr": 0.3, "initial_accumulator_value": 0.1}),
    ],
)
def test_a_convention_brings_its_defaults(optimizer: optim.Optimizer, expected: dict[str, Any]) -> None:
    assert expected.items() <= optimizer.hyperparameters.items()
    assert optim.from_hyperparameters(optimizer.rule, optimizer.hyperparameters) == optimizer


def test_a_convention_is_one_of_the_class(client: optserve.Client, new_id: NewId) -> None:
    with pytest.raises(optserve.InvalidHyperparameter, match="convention to be 'torch' or 'keras'; got 'optax'"):
        optim.SGD(convention="optax")
    with pytest.raises(optserve.InvalidHyperparameter, match="no dampening, which keras does not have"):
        optim.SGD(momentum=0.9, dampening=0.1, convention="keras")
    weights = client.create_parameter_set(new_id(), {"x": np.ones(3)}, optim.Adam(convention="keras"))
    assert weights.describe().groups[0].optimizer == optim.Adam(convention="keras")
    with pytest.raises(optserve.InvalidHyperparameter, match="convention to stay 'keras'"):
        weights.update(convention="torch")
