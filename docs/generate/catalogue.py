"""The optimizers, as their classes and rules say what they are."""

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import optserve.optim as package
from optserve import InvalidHyperparameter, TensorSpec
from optserve._dtypes import FLOAT32
from optserve.optim import Optimizer, catalogue
from optserve_server.engine.rules import TensorRule, rule_for

INTRODUCTION = """\
Each is a value: `optim.Adam(lr=3e-4)` names a rule and its hyperparameters, and the server runs it. This page is made of the
classes when the site is built. What is *live* may change while workers push, and may follow a [schedule](schedules.md) if it is
a real number; groups of tensors may have values of their own. *Slots* are arrays beside the parameters, in bytes what the
parameters take each, unless there is a shape.
"""
M, N = 128, 64
SIZES = {M: "m", N: "n"}
MATRIX, VECTOR = TensorSpec("matrix", FLOAT32, (M, N)), TensorSpec("vector", FLOAT32, (N,))


def page() -> str:
    """All of them, by family."""
    parts = ["# Optimizers", INTRODUCTION, (inspect.getdoc(package) or "").partition("\n\n")[2]]
    family = ""
    for optimizer in _ours():
        if optimizer.__module__ != family:
            family = optimizer.__module__
            parts.append(f"## {_family(family)}")
        parts += _described(optimizer)
    return "\n\n".join(parts) + "\n"


def _ours() -> list[type[Optimizer]]:
    """Those of the package, a family after the other, in the order of their files."""
    found = [each for each in catalogue().values() if each.__module__.startswith(f"{package.__name__}.")]
    families = list(dict.fromkeys(each.__module__ for each in found))
    return sorted(found, key=lambda each: (families.index(each.__module__), inspect.getsourcelines(each)[1]))


def _family(module: str) -> str:
    return (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0].partition(":")[0].removesuffix(".")


def _described(optimizer: type[Optimizer]) -> Iterator[str]:
    values = [f"{name}={default!r}" for name, _, default in optimizer.described()]
    yield f"### {optimizer.__name__}"
    yield f"```python\n{_wrapped(f'optim.{optimizer.__name__}', values)}\n```"
    yield _linked(inspect.getdoc(optimizer) or "", but=optimizer.__name__)
    yield "\n".join(_hyperparameters(optimizer))
    yield "\n".join(f"- {line}" for line in (*_state(optimizer), *_conventions(optimizer)))
    yield _source(optimizer)


def _wrapped(name: str, values: list[str]) -> str:
    line = f"{name}({', '.join(values)})"
    return line if len(line) <= 90 else f"{name}(\n" + "".join(f"    {value},\n" for value in values) + ")"


def _linked(text: str, but: str) -> str:
    """Documentation whose papers and optimizers can be followed."""
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", text)
    names = "|".join(name for name in catalogue() if name != but)
    return re.sub(rf"`(?:optim\.)?({names})`", lambda found: f"[{found[0]}](#{found[1].lower()})", text)


def _hyperparameters(optimizer: type[Optimizer]) -> Iterator[str]:
    yield "| hyperparameter | default | | live |"
    yield "|---|---|---|---|"
    for name, described, default in optimizer.described():
        choices = f" One of {', '.join(f'`{each!r}`' for each in described.choices)}." if described.choices else ""
        live = "yes" if described.live else ""
        yield f"| `{name}` | `{default!r}` | {described.documentation}{choices} | {live} |"


def _state(optimizer: type[Optimizer]) -> Iterator[str]:
    plain = optimizer()
    yield f"State: {_kept(plain)}"
    for name, _, default in optimizer.described():
        changed = True if default is False else 0.9 if default == 0.0 else None
        try:
            other = None if changed is None else plain.replace(**{name: changed})
        except InvalidHyperparameter:  # it needs another one
            continue
        if other is not None and _slots(other) != _slots(plain):
            yield f"State with `{name}={changed}`: {_kept(other)}"
    rule = rule_for(plain)
    if rule.evaluation:
        yield f"`pull(evaluation=True)` gives `{rule.evaluation}`."
    if rule.lazy:
        yield "Takes row-sparse gradients."
    if rule.reads_parameters:
        yield "Needs a set that holds the parameters."


def _slots(optimizer: Optimizer) -> Mapping[str, str]:
    """Shapes by name; empty for the tensor's own."""
    rule = rule_for(optimizer)
    if not isinstance(rule, TensorRule):
        return dict.fromkeys(rule.slots, "")
    shapes = {name: (shape(MATRIX), shape(VECTOR)) for name, shape in rule.slots.items()}
    own = (MATRIX.shape, VECTOR.shape)
    return {
        name: "" if each == own else f"{_shape(each[0])} for an m × n matrix, {_shape(each[1])} for a vector of n"
        for name, each in shapes.items()
    }


def _shape(shape: tuple[int, ...]) -> str:
    return "none" if 0 in shape else " × ".join(SIZES.get(size, str(size)) for size in shape) or "one number"


def _kept(optimizer: Optimizer) -> str:
    memory = list(rule_for(optimizer).memory)
    slots = [f"`{name}`" + (f" ({shape})" if shape else "") for name, shape in _slots(optimizer).items()]
    owner = "group" if isinstance(rule_for(optimizer), TensorRule) else "tensor"
    numbers = f"; for each {owner} the number{'s' * (len(memory) > 1)} {', '.join(f'`{each}`' for each in memory)}"
    return f"{', '.join(slots) or 'no slots'}{numbers if memory else ''}."


def _conventions(optimizer: type[Optimizer]) -> Iterator[str]:
    """What other libraries' conventions bring beside their mathematics: their defaults."""
    own: dict[str, Any] = optimizer().hyperparameters
    for name, described, default in optimizer.described():
        for library in described.choices if name == "convention" else ():
            if library != default:
                theirs = optimizer(convention=library).hyperparameters  # type: ignore[call-arg]
                other = [f"{key}={value!r}" for key, value in theirs.items() if key != name and value != own[key]]
                defaults = f", with its defaults: `{', '.join(other)}`" if other else ", with the same defaults"
                yield f'`convention="{library}"` gives its numbers{defaults}.'


def _source(optimizer: type[Optimizer]) -> str:
    """What the server compiles or calls, folded."""
    rule = rule_for(optimizer())
    function = rule.update if isinstance(rule, TensorRule) else rule.function
    source = f"```python\n{inspect.getsource(function)}```"
    return '??? quote "What the server runs"\n' + textwrap.indent(source, "    ")
