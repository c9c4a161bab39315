"""Groups: which tensor follows which hyperparameters, now."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from optserve._errors import InvalidGroup, InvalidHyperparameter
from optserve._results import Change
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


def check_pushed(groups: tuple[TensorGroup, ...], changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InvalidHyperparameter if a push would take a hyperparameter from the schedule that it follows."""
    for group in groups if changes else ():
        values = changes.get(group.name, {})
        for name, schedule in group.optimizer.schedules.items():
            if values.get(name, schedule) != schedule:
                raise InvalidHyperparameter(
                    f"expected no {name} in a push to group {group.name!r}: {name} follows a schedule on the server; got "
                    f"{values[name]!r}. Leave it out, or use update() to replace {schedule!r}"
                )


def differences(before: tuple[TensorGroup, ...], after: tuple[TensorGroup, ...], version: int) -> list[Change]:
    """What `change` has changed, after that many updates."""
    if before is after:
        return []
    changes = []
    for old, new in zip(before, after, strict=True):
        present = old.optimizer.hyperparameters
        values = {name: value for name, value in new.optimizer.hyperparameters.items() if value != present[name]}
        if values:
            changes.append(Change(version, new.name, values))
    return changes


def at(groups: tuple[TensorGroup, ...], count: int) -> tuple[TensorGroup, ...]:
    """The groups of the update that comes after `count` others; raises InvalidHyperparameter for a schedule out of range."""
    if not any(group.optimizer.schedules for group in groups):
        return groups
    return tuple(replace(group, optimizer=group.optimizer.at(count)) for group in groups)


def slowed(groups: tuple[TensorGroup, ...], divisor: int) -> tuple[TensorGroup, ...]:
    """The groups with their learning rates divided; raises InvalidHyperparameter for one that can't be that small."""
    if divisor == 1:
        return groups
    return tuple(replace(group, optimizer=group.optimizer.replace(lr=group.optimizer.lr / divisor)) for group in groups)


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
