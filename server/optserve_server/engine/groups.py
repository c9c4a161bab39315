"""Groups: which tensor follows which hyperparameters, now."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from optserve._errors import InvalidGroup, InvalidHyperparameter
from optserve._specification import ParameterSetSpec
from optserve.optim import Group, Optimizer
from optserve_server.engine.rules import Rule, TensorRule, rule_for


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Indices of some of a set's tensors, and the optimizer that updates them."""

    name: str
    members: tuple[int, ...]
    optimizer: Optimizer


def resolve(spec: ParameterSetSpec) -> tuple[TensorGroup, ...]:
    """A set's groups, `default` first; the first group that matches a tensor claims it. Raises InvalidGroup."""
    rule = rule_for(spec.optimizer)
    claimed: set[int] = set()
    names = {tensor.name: k for k, tensor in enumerate(spec.tensors)}
    members: dict[str, list[int]] = {Group.DEFAULT: []}
    for group in spec.groups:
        found = members[group.name] = []
        for pattern in group.tensors:
            matches = _matches(names, pattern)
            if not matches:
                some = ", ".join(tensor.name for tensor in spec.tensors[:10])
                raise InvalidGroup(
                    f"group {group.name!r}: expected {pattern!r} to match a tensor; the set has {some}"
                    + (", ..." if len(spec.tensors) > 10 else "")
                )
            for index in matches:
                if index not in claimed:
                    claimed.add(index)
                    found.append(index)
        if not found:
            raise InvalidGroup(f"group {group.name!r}: every tensor that it matches belongs to an earlier group")
    members[Group.DEFAULT] = [k for k in range(len(spec.tensors)) if k not in claimed]
    optimizers = {Group.DEFAULT: spec.optimizer}
    for group in spec.groups:
        optimizers[group.name] = changed(spec.optimizer, group.hyperparameters, rule)
    return tuple(
        TensorGroup(
            name,
            tuple(sorted(members[name])),
            optimizer,
        )
        for name, optimizer in optimizers.items()
    )


def change(groups: tuple[TensorGroup, ...], changes: Mapping[str, Mapping[str, Any]]) -> tuple[TensorGroup, ...]:
    """The groups with new hyperparameters; raises InvalidGroup or InvalidHyperparameter and leaves `groups` as they are."""
    if not changes:
        return groups
    names = [group.name for group in groups]
    for name in changes:
        if name not in names:
            raise InvalidGroup(f"expected a group among {', '.join(names)}; got {name!r}")
    return tuple(
        TensorGroup(
            group.name,
            group.members,
            changed(group.optimizer, changes.get(group.name, {}), rule_for(group.optimizer)),
        )
        for group in groups
    )


def changed(optimizer: Optimizer, values: Mapping[str, Any], rule: Rule | TensorRule) -> Optimizer:
    """The optimizer with new values, all of them live; raises InvalidHyperparameter."""
    new = optimizer.replace(**values)
    for name, described, _ in optimizer.described():
        if not described.live and getattr(new, name) != getattr(optimizer, name):
            raise InvalidHyperparameter(
                f"expected {name} to stay {getattr(optimizer, name)!r}: it is fixed when a set is created and is the same in "
                f"all of its groups; got {getattr(new, name)!r}. Create another set to change it"
            )
    if rule_for(new) is not rule:
        raise InvalidHyperparameter(
            f"expected values that keep the state {list(rule.slots)}; {dict(values)} would need "
            f"{list(rule_for(new).slots)}. Create another set to change that"
        )
    return new


def _matches(names: Mapping[str, int], pattern: str) -> list[int]:
    """Indices of the tensors that a name or pattern means; a tensor's exact name means that tensor, whatever is in it."""
    if pattern in names:
        return [names[pattern]]
    return [index for name, index in names.items() if fnmatchcase(name, pattern)]
