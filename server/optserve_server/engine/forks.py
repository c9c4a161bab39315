"""Forks: a set that begins where another one is, or was."""

import datetime
from dataclasses import replace

import numpy as np

from optserve._specification import Holds, ParameterSetSpec
from optserve._state import PARAMETERS
from optserve.optim import Group, Optimizer
from optserve_server.engine.engine import Engine
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.rules import rule_for
from optserve_server.engine.state import State


def keeps_state(source: ParameterSetSpec, spec: ParameterSetSpec) -> bool:
    """Whether a fork of that specification goes on with the state of its rule."""
    return rule_for(spec.optimizer) is rule_for(source.optimizer)


def specification(spec: ParameterSetSpec, new_id: str, optimizer: Optimizer | None) -> ParameterSetSpec:
    """What a fork is created from."""
    if optimizer is None:
        return replace(spec, id=new_id)
    return replace(spec, id=new_id, optimizer=optimizer, groups=())


def fork(engine: Engine, source: State, spec: ParameterSetSpec) -> ParameterSet:
    """A set of that specification, not published: with all of a state if its rule keeps the same, else with the parameters."""
    if not keeps_state(source.spec, spec):
        return _with_parameters(engine, source, spec)
    forked = engine.new(spec)
    same = spec.optimizer == source.spec.optimizer and spec.groups == source.spec.groups
    now = datetime.datetime.now(datetime.UTC)
    begun = replace(source, spec=spec, create_time=now, sessions=[], undone=(), events=0, forgotten=forked.forgotten)
    forked.restore(begun if same else replace(begun, optimizers={Group.DEFAULT: spec.optimizer}))
    with forked.frozen() as state:
        elements = source.entries()
        for name, arrays in state.entries().items():
            for tensor, array in arrays.items():
                np.copyto(array, elements[name][tensor])
    return forked


def _with_parameters(engine: Engine, source: State, spec: ParameterSetSpec) -> ParameterSet:
    forked = engine.new(spec)
    parameters = source.entries()[PARAMETERS] if spec.holds is Holds.PARAMETERS else {}
    forked.begin_with(parameters, source.keys)
    return forked
