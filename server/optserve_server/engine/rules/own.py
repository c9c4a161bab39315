"""Rules of one's own: a module that defines optimizers and, in a table RULES, their rules, as a family here does.

Such a file is named when a server starts, or imported by whoever runs an engine in this process. Only names and numbers travel.
"""

import functools
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numba import float32, njit, typeof

from optserve._errors import InvalidRule
from optserve.optim import Optimizer, Rule

UPDATES = (1, 2)  # whose scalars are tried: the first update of a tensor, and another one


def load(path: Path) -> None:
    """Import a file, as a module of its name, and check its rules; raises InvalidRule."""
    name = path.stem
    was_there = name in sys.modules
    try:
        _check_table(_imported(name, path.resolve()))
    except InvalidRule as error:
        if not was_there:
            sys.modules.pop(name, None)
        raise InvalidRule(f"{path}: {error}") from error


def rule_of(kind: type) -> Rule | None:
    """The rule that an optimizer has in its own module, if any; raises InvalidRule if it can't be used."""
    table = getattr(sys.modules.get(kind.__module__), "RULES", None)
    if not isinstance(table, dict) or kind not in table:
        return None
    return _checked(kind, table[kind])


@functools.cache
def _checked(kind: Any, rule: Any) -> Rule:
    """A rule that was tried as the loops will use it, with its optimizer's defaults; raises InvalidRule."""
    name = kind.__name__
    if not isinstance(rule, Rule):
        raise InvalidRule(f"expected a Rule(function, ...) for {name}; got {rule!r}")
    if "__dataclass_fields__" not in vars(kind):
        raise InvalidRule(f"expected {name} to be a dataclass; decorate it with @dataclass(frozen=True)")
    slots = rule.slots
    if not isinstance(slots, tuple) or len({"parameters", *slots}) <= len(slots) or not all(map(_is_name, slots)):
        raise InvalidRule(
            f'expected the slots of {name} as a tuple of different names such as ("exp_avg",), none of them "parameters"; '
            f"got {slots!r}"
        )
    _check_function(name, rule, _scalars(kind, rule))
    return rule


def _check_table(module: ModuleType) -> None:
    table = getattr(module, "RULES", None)
    if not isinstance(table, dict) or not table:
        raise InvalidRule(f"expected a table RULES = {{MyOptimizer: Rule(...)}}; got {table!r}")
    for kind, rule in table.items():
        if not _is_optimizer(kind) or kind.__module__ != module.__name__:
            raise InvalidRule(f"expected RULES to be of optimizers that this file defines; got {kind!r}")
        _checked(kind, rule)


def _check_function(name: str, rule: Rule, scalars: Any) -> None:
    function = getattr(rule.function, "__name__", repr(rule.function))
    state = ("p", *rule.slots)
    arguments = ("p", "g", *rule.slots, "h")
    try:
        inspect.signature(rule.function).bind(*arguments)
    except TypeError:
        raise InvalidRule(
            f"expected {function}({', '.join(arguments)}), with an argument for every slot of {name}; "
            f"got {function}{inspect.signature(rule.function)}"
        ) from None
    compiled = njit(error_model="numpy")(rule.function)
    single = type(scalars)(*map(np.float32, scalars))
    try:
        compiled.compile((float32,) * (len(arguments) - 1) + (typeof(single),))
    except Exception as error:  # whatever Numba raises
        raise InvalidRule(f"expected {function} of {name} to be a function that Numba compiles; {error}") from error
    returned = compiled.nopython_signatures[0].return_type
    types = [returned] if not rule.slots else list(getattr(returned, "types", ()))
    if len(types) != len(state) or hasattr(types[0], "types"):
        raise InvalidRule(f"expected {function} of {name} to return {', '.join(state)}; it returns {returned}")
    others = [f"{each} as {type}" for each, type in zip(state, types, strict=True) if type != float32]
    if others:
        raise InvalidRule(
            f"expected {function} of {name} to compute in float32 if its arguments are float32; it returns "
            f"{', '.join(others)}. A number written in a function, such as 0.5 or 2, makes float64 of what it meets: make it a "
            "hyperparameter, or one of the scalars"
        )


def _scalars(kind: type[Optimizer], rule: Rule) -> Any:
    """The scalars of an update; raises InvalidRule if they are none."""
    name = kind.__name__
    try:
        optimizer, memory = kind(), tuple(rule.memory.values())
        for t in UPDATES:
            memory = rule.remember(optimizer, t, memory)
            scalars = rule.scalars(optimizer, t, memory)
    except InvalidRule:
        raise
    except Exception as error:  # whatever is wrong with them
        raise InvalidRule(
            f"expected {name}() and its scalars, of updates {' and '.join(map(str, UPDATES))}, to be computable; {_said(error)}"
        ) from error
    if not (isinstance(scalars, tuple) and hasattr(scalars, "_fields") and all(map(_is_number, scalars))):
        raise InvalidRule(f"expected the scalars of {name} to be a NamedTuple of numbers; got {scalars!r}")
    return scalars


def _imported(name: str, path: Path) -> ModuleType:
    present = sys.modules.get(name)
    if present is not None:
        if Path(getattr(present, "__file__", None) or "").resolve() == path:
            return present
        raise InvalidRule(f"expected a file name that no module has; {name!r} is in use")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InvalidRule("expected a Python file such as my_rule.py; there is none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for who imports it after us, and for dataclasses, which look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is in the file
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"line {lines[-1]}: " if lines else ""
        raise InvalidRule(f"expected a file that can be imported; {where}{_said(error)}") from error
    return module


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number))
