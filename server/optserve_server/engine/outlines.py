"""Outlines: what of a set's state travels, in which order, and whether a set could ever be in a state that came."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._errors import InvalidState
from optserve._specification import Holds, ParameterSetSpec, StateFormat
from optserve._state import GRADIENT, PARAMETERS, Outline, Part, Shape
from optserve_server.engine.arena import Layout
from optserve_server.engine.groups import resolve
from optserve_server.engine.pipeline import Progress, slot_layouts, slot_shapes, trigger_of
from optserve_server.engine.rules import Rule, TensorRule, rule_for
from optserve_server.engine.state import State


@dataclass(frozen=True, slots=True)
class Start:
    """Where a new set begins that does not begin at the beginning; `parts` say what is staged for it."""

    version: int
    progress: Progress
    parts: tuple[Part, ...]


def check_movable(spec: ParameterSetSpec) -> None:
    """Raises InvalidState for a set with tables, whose rows have places of their own, or with state in fewer bits."""
    if spec.tables:
        raise InvalidState(
            f"expected a set without tables, whose state does not travel yet; {spec.id!r} has {_listed(spec.tables)}"
        )
    if spec.state is not StateFormat.FULL:
        raise InvalidState(
            f"expected a set that keeps its state in full; {spec.id!r} keeps it as {spec.state.value}, which does not "
            "travel yet"
        )


def outlined(state: State) -> tuple[Outline, list[NDArray[Any]]]:
    """A state's outline, and its elements in that order, as views."""
    spec, progress, rule = state.spec, state.progress, rule_for(state.spec.optimizer)
    own = Layout(spec.tensors)
    layouts = {PARAMETERS: own, GRADIENT: own, **slot_layouts(spec, own)}
    shapes = _shapes(spec)
    parts, elements = [], []
    for name, arena in state.arenas.items():
        indices = progress.accumulating if name == GRADIENT else tuple(range(len(spec.tensors)))
        if name != GRADIENT or progress.accumulated:
            parts.append(Part(name, indices, tuple(shapes[name][index] for index in indices)))
            elements += [layouts[name].elements(arena, index) for index in indices]
    names = rule.memory if isinstance(rule, Rule) else ()
    group_names = rule.memory if isinstance(rule, TensorRule) else ()
    return Outline(
        version=state.position.version,
        steps=tuple(progress.steps.tolist()),
        memory={name: dict(enumerate(values[k] for values in progress.memory)) for k, name in enumerate(names)},
        group_memory={
            group: dict(zip(group_names, values.tolist(), strict=True))
            for group, values in progress.group_memory.items()
            if group_names
        },
        parts=tuple(parts),
        accumulated=progress.accumulated,
        skipped=progress.skipped,
        samples=progress.samples,
        divisor=progress.divisor,
    ), elements


def start(spec: ParameterSetSpec, outline: Outline) -> Start:
    """Where a set of that specification begins by an outline; raises InvalidState or InvalidGroup."""
    check_movable(spec)
    if len(outline.steps) != len(spec.tensors):
        raise InvalidState(f"expected steps of {len(spec.tensors)} tensors; got {len(outline.steps)}")
    trigger = trigger_of(spec.policy, spec.transforms)
    samples, divisor = outline.samples or float(outline.accumulated), outline.divisor or trigger.divisor
    _check_finite("samples of waiting pushes", samples)
    _check_finite("what they were divided by", divisor)
    if outline.accumulated and (trigger.filled(outline.accumulated, samples) or samples <= 0 or divisor <= 0):
        raise InvalidState(
            f"expected fewer pushes than make an update of this set, {trigger}; got {outline.accumulated} that wait. Give it "
            "the transforms and the policy that the state comes from"
        )
    _check_parts(spec, outline)
    accumulating = [part.tensors for part in outline.parts if part.name == GRADIENT]
    progress = Progress(
        steps=np.array(outline.steps, np.int64),
        memory=_memory(spec, outline),
        group_memory=_group_memory(spec, outline),
        accumulated=outline.accumulated,
        accumulating=tuple(sorted(accumulating[0])) if accumulating else (),
        skipped=outline.skipped,
        samples=samples if outline.accumulated else 0.0,
        divisor=divisor if outline.accumulated else 0.0,
    )
    return Start(outline.version, progress, outline.parts)


def _shapes(spec: ParameterSetSpec) -> Mapping[str, tuple[Shape, ...]]:
    """The shape of every tensor in every part that there may be."""
    own = tuple(tensor.shape for tensor in spec.tensors)
    return {PARAMETERS: own, GRADIENT: own, **slot_shapes(spec)}


def _check_parts(spec: ParameterSetSpec, outline: Outline) -> None:
    shapes = dict(_shapes(spec))
    if spec.holds is Holds.MOMENTS:
        del shapes[PARAMETERS]
    if not outline.accumulated:
        del shapes[GRADIENT]
    for part in outline.parts:
        if part.name not in shapes:
            raise InvalidState(
                f"expected {_listed(shapes)} of this set, by its rule and its transforms; got {part.name!r}"
            )
        for index, shape in zip(part.tensors, part.shapes, strict=True):
            if shape != shapes[part.name][index]:
                raise InvalidState(
                    f"{part.name} of tensor {spec.tensors[index]}: expected shape {list(shapes[part.name][index])}; got "
                    f"{list(shape)}"
                )
    _check_once(part.name for part in outline.parts)
    there = {part.name: set(part.tensors) for part in outline.parts}
    for name in shapes:
        if name == GRADIENT:
            if not there.get(name):
                raise InvalidState(f"expected the gradients that {outline.accumulated} waiting pushes have; got none")
            continue
        for index, tensor in enumerate(spec.tensors):
            if index not in there.get(name, ()) and (name == PARAMETERS or outline.steps[index]):
                what = f"{name} of tensor {tensor}"
                raise InvalidState(f"expected {what}, which has had {outline.steps[index]} updates; got none")


def _memory(spec: ParameterSetSpec, outline: Outline) -> list[tuple[float, ...]]:
    rule = rule_for(spec.optimizer)
    initial: Mapping[str, float] = rule.memory if isinstance(rule, Rule) else {}
    for name, values in outline.memory.items():
        if name not in initial:
            raise InvalidState(f"expected {_listed(initial)} of a tensor to be remembered; got {name!r}")
        for index, value in values.items():
            _check_finite(f"{name} of tensor {spec.tensors[index].name!r}", value)
    memory = []
    for index, tensor in enumerate(spec.tensors):
        known = {name: values[index] for name, values in outline.memory.items() if index in values}
        _check_remembered(f"tensor {tensor.name!r}", initial, known, outline.steps[index])
        memory.append(tuple(known.get(name, value) for name, value in initial.items()))
    return memory


def _group_memory(spec: ParameterSetSpec, outline: Outline) -> dict[str, NDArray[np.float64]]:
    rule = rule_for(spec.optimizer)
    if not isinstance(rule, TensorRule):
        if outline.group_memory:
            raise InvalidState(f"expected nothing to be remembered of groups; got {_listed(outline.group_memory)}")
        return {}
    groups = {group.name: group for group in resolve(spec)}
    memory = {}
    for name, values in outline.group_memory.items():
        if name not in groups or not values.keys() <= rule.memory.keys():
            raise InvalidState(
                f"expected {_listed(rule.memory)} of a group among {_listed(groups)}; got {_listed(values)} of {name!r}"
            )
        for each, value in values.items():
            _check_finite(f"{each} of group {name!r}", value)
    for name, group in groups.items():
        known = outline.group_memory.get(name, {})
        updates = max((outline.steps[index] for index in group.members), default=0)
        _check_remembered(f"group {name!r}", rule.memory, known, updates)
        memory[name] = np.array([known.get(each, initial) for each, initial in rule.memory.items()])
    return memory


def _check_remembered(what: str, names: Iterable[str], known: Iterable[str], updates: int) -> None:
    missing = sorted(set(names) - set(known)) if updates else []
    if missing:
        raise InvalidState(f"expected {_listed(missing)} of {what}, which has had {updates} updates; got none")


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise InvalidState(f"expected {what} to be finite; got {value!r}")


def _check_once(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidState(f"expected each part once; got {name!r} again")
        seen.add(name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
