"""To and from the `state_dict` of `torch.optim` optimizers, bit for bit but for what torch rounds to a parameter's dtype."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from optserve import optim
from optserve._dtypes import BFLOAT16
from optserve._errors import InvalidState, InvalidTensor
from optserve._results import GroupDescription
from optserve._state import State
from optserve.interop._building import Array, built
from optserve.interop._names import TORCH, Names, check_place, names_for, names_of
from optserve.optim import Group, Optimizer

__all__ = ["from_state_dict", "state_dict"]

STEP, NAME = "step", "name"
IGNORED = {
    "params", "param_names", NAME, "initial_lr", "foreach", "capturable", "differentiable", "fused"
}  # of a parameter group, with no effect on numbers  # fmt: skip


def as_array(tensor: torch.Tensor) -> Array:
    """The elements of a dense tensor: in its own memory if that is the host's, else a copy. Raises InvalidTensor."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        raise InvalidTensor(f"expected a dense tensor; got one with the layout {tensor.layout}")
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # which torch does not give to NumPy
        array: Array = tensor.view(torch.uint16).numpy().view(BFLOAT16.array_dtype)
    else:
        array = tensor.numpy()
    return array


def state_dict(state: State, *groups: Iterable[str]) -> dict[str, Any]:
    """What `load_state_dict` takes of the torch optimizer with these parameter groups, each given as names in its order.

    Without any, they are the state's own. The tensors of one must have one optimizer. The parameters are not in it: they are
    `state.parameters`. torch iterates Muon's steps in bfloat16. Raises InvalidState.
    """
    state = state.evaluated()
    listed = [list(names) for names in groups] or [list(group.tensors) for group in state.groups if group.tensors]
    ordered = [name for names in listed for name in names]
    if sorted(ordered) != sorted(state.steps):
        raise InvalidState(
            f"expected each of the tensors {', '.join(state.steps)} in one group; got {', '.join(ordered)}"
        )
    names = names_for(state.optimizer, TORCH, "torch")
    if isinstance(state.optimizer, optim.Muon):
        _check_muon(state)
    check_place(state, {*names.slots, *names.shaped}, "torch")
    indices = {name: index for index, name in enumerate(ordered)}
    kept = {indices[name]: _kept(state, name, names) for name in ordered if state.steps[name] or names.eager}
    return {
        "state": {index: values for index, values in kept.items() if values},
        "param_groups": [_param_group(state, members, [indices[name] for name in members]) for members in listed],
    }


def from_state_dict(
    state_dict: Mapping[str, Any], parameters: Mapping[str, torch.Tensor], rule: type[Optimizer]
) -> State:
    """The state of a torch optimizer with these parameters, by name in its order: `dict(model.named_parameters())`.

    `rule` is its class in `optim`. Its first parameter group becomes `default`. `SGD` and `Muon` of torch do not count: a
    tensor with a momentum buffer has had one update or more, and counts one. Raises InvalidState or InvalidHyperparameter.
    """
    names = names_of(rule, TORCH, "torch")
    param_groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
    indices = [index for group in param_groups for index in group["params"]]
    if len(indices) != len(parameters):
        raise InvalidState(f"expected {len(indices)} parameters, as the optimizer has; got {len(parameters)}")
    tensors = dict(zip(indices, parameters, strict=True))
    kept = {name: state_dict["state"].get(index, {}) for index, name in tensors.items()}
    return built(
        {name: as_array(tensor) for name, tensor in parameters.items()},
        _groups(param_groups, tensors, rule),
        {
            slot: {name: as_array(values[key]) for name, values in kept.items() if values.get(key) is not None}
            for slot, key in names.slots.items()
        },
        {name: _steps(values, names) for name, values in kept.items()},
        {
            name: {ours: float(values[key]) for ours, key in names.memory.items() if key in values}
            for name, values in kept.items()
        },
        names.shaped,
    )


def _check_muon(state: State) -> None:
    """Raises InvalidState for what `torch.optim.Muon` does not do."""
    for tensor in state.tensors:
        if len(tensor.shape) != 2:
            raise InvalidState(
                f"expected matrices only, as torch's Muon has; got {tensor}. Keep other tensors in a set of their own, "
                "with AdamW"
            )
    for group in state.groups:
        if group.optimizer.hyperparameters["maximize"]:
            raise InvalidState(f"expected maximize=False, as torch's Muon has; got True in the group {group.name!r}")


def _kept(state: State, name: str, names: Names) -> dict[str, Any]:
    """What torch keeps of a tensor."""
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32  # as in torch.optim
    kept: dict[str, Any] = {}
    if names.counted:
        steps = state.steps[name]
        kept[STEP] = steps if names.plain else torch.tensor(float(steps), dtype=scalar)
    for slot, arrays in state.slots.items():
        if slot not in names.shaped or arrays[name].size:
            kept[names.slots[slot]] = torch.tensor(arrays[name])
    for ours, key in names.memory.items():
        kept[key] = torch.tensor(state.memory[name][ours], dtype=scalar)
    return kept


def _param_group(state: State, members: Sequence[str], indices: Sequence[int]) -> dict[str, Any]:
    groups = {group.name: group for group in state.groups if not set(group.tensors).isdisjoint(members)}
    optimizers = {group.optimizer for group in groups.values()}
    if len(optimizers) != 1:
        raise InvalidState(
            f"expected tensors with the same hyperparameters in a parameter group; got those of {list(groups)}"
        )
    hyperparameters = optimizers.pop().hyperparameters
    hyperparameters.pop("convention", None)
    return {**hyperparameters, NAME: next(iter(groups)), "params": list(indices)}


def _groups(
    param_groups: Sequence[Mapping[str, Any]], tensors: Mapping[int, str], rule: type[Optimizer]
) -> list[GroupDescription]:
    groups: dict[str, GroupDescription] = {}
    for index, group in enumerate(param_groups):
        name = Group.DEFAULT if index == 0 else str(group.get(NAME, ""))
        if not name or name in groups:
            name = f"group-{index}"
        values = {key: _value(value) for key, value in group.items() if key not in IGNORED}
        members = tuple(tensors[each] for each in group["params"])
        groups[name] = GroupDescription(name, members, rule().replace(**values))
    return list(groups.values())


def _value(value: Any) -> Any:
    """A hyperparameter: torch may keep a number in a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _steps(values: Mapping[str, Any], names: Names) -> int:
    if not names.counted:
        return int(any(value is not None for value in values.values()))
    return int(values.get(STEP, 0))
