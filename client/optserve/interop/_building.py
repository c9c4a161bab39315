"""Building states out of what libraries have, and what they need to be the same for all tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve._dtypes import computed
from optserve._errors import InvalidState
from optserve._results import GroupDescription
from optserve._specification import TensorSpec, as_arrays
from optserve._state import State

Array = np.ndarray[Any, Any]


def built(
    parameters: Mapping[str, Array],
    groups: Sequence[GroupDescription],
    slots: Mapping[str, Mapping[str, Any]],
    steps: Mapping[str, int],
    memory: Mapping[str, Mapping[str, float]],
    shaped: Sequence[str] = (),
) -> State:
    """A state with arrays of its own, in the dtypes that the server calculates in.

    In `shaped` slots, whose shapes the server checks, a tensor that the library has nothing of gets no elements.
    """
    specs = {name: TensorSpec.of(name, array) for name, array in as_arrays(parameters).items()}

    def own(arrays: Mapping[str, Any], *, as_tensors: bool = True) -> dict[str, Array]:
        for name, array in arrays.items():
            if name not in specs:
                raise InvalidState(f"expected values of the parameters {', '.join(specs)}; got some of {name!r}")
            if as_tensors and np.shape(array) != specs[name].shape:
                raise InvalidState(
                    f"expected values of the shape of parameter {specs[name]}; got {list(np.shape(array))}"
                )
        return {name: np.array(array, computed(specs[name].dtype).storage) for name, array in arrays.items()}

    nothing = {name: np.empty(0) for name, count in steps.items() if count}
    slots = {**slots, **{slot: {**nothing, **slots.get(slot, {})} for slot in shaped}}
    return State(
        tensors=tuple(specs.values()),
        groups=tuple(groups),
        parameters=own(parameters),
        slots={slot: own(arrays, as_tensors=slot not in shaped) for slot, arrays in slots.items() if arrays},
        steps=dict(steps),
        memory={name: values for name, values in memory.items() if values},
        version=max(steps.values(), default=0),
    )


def common_steps(state: State, library: str) -> int:
    """How many updates every tensor has had; raises InvalidState if not all have had as many."""
    counts = set(state.steps.values())
    if len(counts) > 1:
        raise InvalidState(
            f"expected as many updates of every tensor, which {library} counts together; got {min(counts)} to {max(counts)}"
        )
    return counts.pop()


def common_lr(state: State, library: str) -> float:
    """The learning rate of every group; raises InvalidState if there are several."""
    rates = {group.optimizer.lr for group in state.groups if group.tensors}
    if len(rates) > 1:
        raise InvalidState(f"expected one learning rate, as {library} has; got {sorted(rates)} in the groups")
    return rates.pop()
