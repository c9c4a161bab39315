"""To and from the states of optax optimizers: trees of NamedTuples, walked and filled in, bit for bit.

Tensors go by their path in the tree of parameters, joined by "/": {"dense": {"kernel": ...}} has "dense/kernel". Chains,
partitions and masks are walked; of injected hyperparameters the learning rate is moved, other ones stay with the optimizer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optserve import optim
from optserve._errors import InvalidState
from optserve._results import GroupDescription
from optserve._state import State
from optserve.interop._building import Array, built, common_lr, common_steps
from optserve.interop._names import OPTAX, Names, check_place, names_for
from optserve.optim import Group, Optimizer

__all__ = ["from_opt_state", "opt_state"]

COUNTS = ("count", "count_m2")
HYPERPARAMETERS, LEARNING_RATE = "hyperparams", "learning_rate"


def opt_state(state: State, template: Any) -> Any:
    """The template, `optimizer.init(params)` of the optax optimizer, with the values of a state; raises InvalidState."""
    state = state.evaluated()
    names = names_for(state.optimizer, OPTAX, "optax")
    check_place(state, names.slots, "optax")
    slots = {names.slots[slot]: _signed(slot, arrays, names) for slot, arrays in state.slots.items()}
    filled: set[str] = set()

    def fill(field: str, value: Any) -> Any:
        if field in COUNTS:
            return jnp.asarray(common_steps(state, "optax"), value.dtype)
        if field == HYPERPARAMETERS:
            rate = {LEARNING_RATE: jnp.asarray(common_lr(state, "optax"), value[LEARNING_RATE].dtype)}
            return {**value, **rate} if LEARNING_RATE in value else value
        if field not in slots:
            raise InvalidState(f"expected fields of {state.optimizer.rule}, {_listed(slots)}; got {field!r}")
        filled.add(field)
        return jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf(slots[field], path, leaf), value)

    result = _mapped(template, fill)
    if missing := slots.keys() - filled:
        raise InvalidState(f"expected a template with the fields {_listed(slots)}; it has no {_listed(missing)}")
    return result


def from_opt_state(opt_state: Any, params: Any, optimizer: Optimizer) -> State:
    """The state of an optax optimizer and its parameters, which `optimizer` describes in our terms; raises InvalidState.

    Where optax does not count, as for `trace`, every tensor counts one update.
    """
    names = names_for(optimizer, OPTAX, "optax")
    slots: dict[str, dict[str, Any]] = {slot: {} for slot in names.slots}
    by_field = {field: slots[slot] for slot, field in names.slots.items()}
    counts: set[int] = set()
    rates: list[float] = []

    def read(field: str, value: Any) -> Any:
        if field in COUNTS:
            counts.add(int(value))
        elif field == HYPERPARAMETERS:
            rates.extend(float(rate) for name, rate in value.items() if name == LEARNING_RATE)
        elif field in by_field:
            by_field[field].update(_named(value))
        else:
            raise InvalidState(f"expected fields of {optimizer.rule}, {_listed(by_field)}; got {field!r}")
        return value

    _mapped(opt_state, read)
    if len(counts) > 1:
        raise InvalidState(f"expected one count of updates; got {sorted(counts)}")
    parameters = _named(params)
    steps = counts.pop() if counts else 1
    if rates:
        optimizer = optimizer.replace(lr=rates[0])
    group = GroupDescription(Group.DEFAULT, tuple(parameters), optimizer)
    return built(
        parameters,
        [group],
        {slot: _signed(slot, arrays, names) for slot, arrays in slots.items()},
        dict.fromkeys(parameters, steps),
        dict.fromkeys(parameters, _memory(optimizer, steps)),
        names.shaped,
    )


def _mapped(node: Any, change: Callable[[str, Any], Any]) -> Any:
    """A state with the fields changed in which values are; what holds other states is walked."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(**{field: _mapped_field(field, getattr(node, field), change) for field in node._fields})
    if isinstance(node, tuple):
        return tuple(_mapped(each, change) for each in node)
    if isinstance(node, Mapping):
        return {key: _mapped(each, change) for key, each in node.items()}
    raise InvalidState(f"expected the state of an optax optimizer, tuples all through; got {type(node).__name__}")


def _mapped_field(field: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    known = field in (*COUNTS, HYPERPARAMETERS) or any(field in names.slots.values() for names in OPTAX.values())
    holds = isinstance(value, tuple | Mapping) and not known
    return _mapped(value, change) if holds else change(field, value)


def _leaf(arrays: Mapping[str, Array], path: Any, leaf: Any) -> Any:
    name = _name(path)
    if name not in arrays or np.shape(arrays[name]) != np.shape(leaf):
        raise InvalidState(
            f"expected parameters {_listed(arrays)}, of their shapes; the template has {name!r} of {list(np.shape(leaf))}"
        )
    return jnp.asarray(arrays[name], leaf.dtype)


def _named(tree: Any) -> dict[str, Array]:
    leaves: Iterator[tuple[Any, Any]] = iter(jax.tree_util.tree_flatten_with_path(tree)[0])
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _name(path: Any) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="/"))


def _signed(slot: str, arrays: Mapping[str, Array], names: Names) -> Mapping[str, Array]:
    return {name: -array for name, array in arrays.items()} if slot in names.negated else arrays


def _memory(optimizer: Optimizer, steps: int) -> dict[str, float]:
    """What optax works out of the count."""
    if not isinstance(optimizer, optim.NAdam):
        return {}
    return {"mu_product": math.prod([optimizer.betas[0]] * steps)}


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"
