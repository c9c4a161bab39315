"""To and from `optimizer.variables` of Keras optimizers, bit for bit but for what their dtype rounds.

Tensors go by their variables' paths: "dense/kernel". A learning rate that is a schedule stays with the optimizer.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optserve._errors import InvalidState
from optserve._results import GroupDescription
from optserve._state import AVERAGE, State
from optserve.interop._building import Array, built, common_lr, common_steps
from optserve.interop._names import KERAS, Names, check_place, names_for
from optserve.optim import Group, Optimizer

__all__ = ["from_variables", "values"]

ITERATION, LEARNING_RATE = "iteration", "learning_rate"
AVERAGES = {AVERAGE: "average"}


class Place(NamedTuple):
    """What a variable of an optimizer holds: a slot of a tensor, a tensor's memory, the count, or the learning rate."""

    name: str
    tensor: str = ""


def values(state: State, variables: Iterable[Any]) -> list[Array]:
    """Values of `optimizer.variables`, built for the set's tensors, in their order: `variable.assign(value)` for each.

    Raises InvalidState.
    """
    state = state.evaluated()
    names = names_for(state.optimizer, KERAS, "Keras")
    slots = {**names.slots, **AVERAGES}
    check_place(state, slots, "Keras")
    variables = list(variables)
    places = _places(variables, state.steps, names)
    needed = {Place(slot, tensor) for slot, arrays in state.slots.items() for tensor in arrays}
    if missing := sorted(needed - set(places)):
        raise InvalidState(f"expected a variable for {missing[0].name} of {missing[0].tensor!r}; got none")
    return [np.asarray(_value(state, place), variable.dtype) for variable, place in zip(variables, places, strict=True)]


def from_variables(variables: Iterable[Any], parameters: Mapping[str, Any], optimizer: Optimizer) -> State:
    """The state of a Keras optimizer with these variables, and its parameters by path, such as
    `{variable.path: variable for variable in model.trainable_variables}`.

    `optimizer` describes it in our terms; its learning rate is the variable's, if there is one. Raises InvalidState.
    """
    names = names_for(optimizer, KERAS, "Keras")
    slots: dict[str, dict[str, Array]] = {}
    steps, memory = 0, {}
    variables = list(variables)
    for variable, place in zip(variables, _places(variables, parameters, names), strict=True):
        value = np.asarray(variable)
        if place.name == ITERATION:
            steps = int(value)
        elif place.name == LEARNING_RATE:
            optimizer = optimizer.replace(lr=float(value))
        elif place.tensor:
            slots.setdefault(place.name, {})[place.tensor] = value
        else:
            memory[place.name] = float(value)
    return built(
        {name: np.asarray(variable) for name, variable in parameters.items()},
        [GroupDescription(Group.DEFAULT, tuple(parameters), optimizer)],
        slots,
        dict.fromkeys(parameters, steps),
        dict.fromkeys(parameters, memory),
    )


def _places(variables: Iterable[Any], tensors: Iterable[str], names: Names) -> list[Place]:
    """What each variable holds."""
    tensors = list(tensors)
    slots = [*names.slots.items(), *AVERAGES.items()]
    known = {f"{name.replace('/', '_')}_{theirs}": Place(slot, name) for name in tensors for slot, theirs in slots}
    if len(known) < len(tensors) * len(slots):
        raise InvalidState(f"expected tensors whose slots Keras names differently; got {', '.join(map(repr, tensors))}")
    known |= {ITERATION: Place(ITERATION), LEARNING_RATE: Place(LEARNING_RATE)}
    remembered = {theirs: Place(ours) for ours, theirs in names.memory.items()}
    places = []
    for variable in variables:
        place = known.get(variable.name) or remembered.get(re.sub(r"_\d+$", "", variable.name))
        if place is None:
            raise InvalidState(
                f"expected variables for {', '.join(names.slots.values())} of {', '.join(map(repr, tensors))}; got "
                f"{variable.path!r}"
            )
        places.append(place)
    return places


def _value(state: State, place: Place) -> Any:
    if place.name == ITERATION:
        return common_steps(state, "Keras")
    if place.name == LEARNING_RATE:
        return common_lr(state, "Keras")
    if not place.tensor:
        common_steps(state, "Keras")  # and so it is the same of all
        return next(iter(state.memory.values()))[place.name]
    if place.tensor not in state.slots.get(place.name, {}):
        raise InvalidState(f"expected a state with {place.name} of {place.tensor!r}, which Keras keeps; got none")
    return state.slots[place.name][place.tensor]
