"""Parameter groups: what torch calls them and keeps of them, as the groups of a parameter set."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optserve._errors import InvalidGroup, InvalidName
from optserve.optim import Group, Optimizer
from optserve.optim._optimizer import as_number

ParamGroup = dict[str, Any]


def torch_defaults(optimizer: Optimizer) -> dict[str, Any]:
    """What a `torch.optim` optimizer would have as `defaults`."""
    values = optimizer.at(0).hyperparameters
    values.pop("convention", None)
    return values


def names_of(param_groups: Sequence[ParamGroup]) -> list[list[str]]:
    """The tensors' names by group: those of `named_parameters()`, or numbers. Raises InvalidName or InvalidGroup for twins."""
    count, names = 0, []
    for group in param_groups:
        if len({id(tensor) for tensor in group["params"]}) < len(group["params"]):  # torch warns, and steps it twice
            raise InvalidGroup("expected each parameter once in a parameter group; got one several times")
        known = group.get("param_names", [f"parameter-{count + k}" for k in range(len(group["params"]))])
        count += len(known)
        names.append(list(known))
    if (twice := _repeated(name for members in names for name in members)) is not None:
        raise InvalidName(f"expected a name of its own for each parameter; got several of {twice!r}")
    return names


def group_names(param_groups: Sequence[ParamGroup]) -> list[str]:
    """The sets' names of groups: `default` the first, the others what they have as `name`, or `group-1`, `group-2`."""
    names = [Group.DEFAULT]
    names += [str(group.get("name", f"group-{index}")) for index, group in enumerate(param_groups) if index]
    if (twice := _repeated(names)) is not None:
        raise InvalidGroup(f"expected a name of its own for each parameter group; got several of {twice!r}")
    return names


def hyperparameters_of(group: ParamGroup, optimizer: Optimizer) -> dict[str, Any]:
    """The values that a parameter group has for a rule's hyperparameters now, as Python values."""
    names = torch_defaults(optimizer)
    return {name: _plain(group[name]) for name in names if name in group}


def creation_groups(
    param_groups: Sequence[ParamGroup], names: Iterable[Sequence[str]], optimizer: Optimizer
) -> tuple[Group, ...]:
    """The groups beside `default`, as a set is created with, with what they have that `default` has not."""
    common = {**torch_defaults(optimizer), **hyperparameters_of(param_groups[0], optimizer)}
    return tuple(
        Group(name, *members, **_different(hyperparameters_of(group, optimizer), common))
        for name, members, group in list(zip(group_names(param_groups), names, param_groups, strict=True))[1:]
    )


def of_default(group: ParamGroup, optimizer: Optimizer) -> Optimizer:
    """The optimizer with what the first parameter group has instead of its values."""
    return optimizer.replace(**_different(hyperparameters_of(group, optimizer), torch_defaults(optimizer)))


def _different(values: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != common[name]}


def _plain(value: Any) -> Any:
    """A hyperparameter: torch may keep a number in a tensor."""
    return tuple(map(as_number, value)) if isinstance(value, tuple | list) else as_number(value)


def _repeated(names: Iterable[str]) -> str | None:
    """The first name, by the alphabet, of those that come several times."""
    return min((name for name, count in Counter(names).items() if count > 1), default=None)
