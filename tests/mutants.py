"""Do the tests see every small change of a rule? `make mutants` changes one expression at a time, and runs the rule's rows.

Changed are the functions that `RULES` reaches: what chooses a rule, its function, its scalars, what it remembers, the shapes of
its slots and what they call; and `preparation`. A mutant is killed if a row of `optimizer_table` then ends further than 1e-12
from its oracle, in the engine, as in `test_rules`, or another test there or in `test_whole_tensors` fails. Exits with 1
if one survives that `EQUIVALENT` does not explain, or if that explains one which is killed or gone.
"""

import ast
import copy
import functools
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np

import conftest  # noqa: F401 - chooses the backend of Keras before the table imports it
import test_rules
import test_whole_tensors
from direct import DirectSet
from optimizer_table import ROWS, Array, Row, Step
from optserve_server.engine import rules
from optserve_server.engine.loops import update_loop
from optserve_server.engine.rules import RULES, Rule, TensorRule, preparation, rule_for
from test_rules import distances, history, pulled

SIZES = (17, 4097)  # the second for what survives the first
# And these for what survives that.
TESTS = [
    test
    for module in (test_rules, test_whole_tensors)
    for name, test in vars(module).items()
    if name.startswith("test_") and not inspect.signature(test).parameters
] + [functools.partial(test_whole_tensors.test_adafactors_first_epsilon_is_that_of_the_dtype, np.float32)]

# Why no test can tell: by function, and its line as it was changed.
EQUIVALENT: dict[str, dict[str, str]] = {
    "adopt_scalars": {
        "return AdoptScalars(1.0, 0.0, 1.0, 1.0, 0.0)": "lr, of a first moment that is still 0",
        "return AdoptScalars(0.0, 1.0, 1.0, 1.0, 0.0)": "alpha1, of a gradient that is clipped to 0",
        "return AdoptScalars(0.0, 0.0, 1.0, 2.0, 0.0)": "epsilon, under a gradient that is clipped to 0",
        "return AdoptScalars(0.0, 0.0, 1.0, 1.0, 1.0)": "a bound on what alpha1 = 0 keeps out",
    },
    "ademamix_scalars": {
        "if t <= o.warm_up:": "at t = warm_up the schedules have arrived",
        "if 0.0 < beta1 <= beta3:": "between equals nothing grows",
        "beta3 = exp(first * last / ((1.0 - part) * last + part * first))": "the minimum is there for rounding only",
    },
    "average_weight": {
        "return weight / total if total > 0.0 else 1.0": "while the sum is 0, z is where x is",
    },
    "ftrl": {
        "excess = h.nothing if abs(z) < h.l1 else z - copysign(h.l1, z)": "where |z| = l1 the difference is 0 too",
    },
    "orthogonalized": {
        "tall = u.shape[0] >= u.shape[1]": "the products on both sides of a matrix say the same",
        "tall = u.shape[0] <= u.shape[1]": "the smaller product is there for speed only",
        "tall = u.shape[1] > u.shape[1]": "the smaller product is there for speed only",
    },
    "prodigy": {
        "s -= d / o.d0 * (d if o.safeguard_warmup else lr) * g": "only magnitudes of s are used",
    },
    "radam_scalars": {
        "return RAdamScalars(0.0, lr, 2.0, 1.0 - beta1, 1.0 - beta2, 1.0)": "beside an adaptive part of 0",
        "return RAdamScalars(0.0, lr, 1.0, 1.0 - beta1, 1.0 - beta2, 2.0)": "beside an adaptive part of 0",
    },
    "swats": {
        "if updates > 1 and settled >= 0.0 and (abs(settled - implied) < o.eps):": "a factor of 0 is Adam's phase",
        "if updates > 1 and updates > 0.0 and (abs(settled - implied) < o.eps):": "so is a factor that is negative",
    },
    "warmed_up": {
        "return o.lr * t / o.warmup_steps if t <= o.warmup_steps else o.lr": "at t = warmup_steps the warm-up has arrived",
    },
}

OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult, ast.Add),
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
OPPOSITES = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum"}
REPLACED_BY_ARGUMENTS = {*OPPOSITES, "sqrt", "abs", "sign", "copysign", "exp", "log"}

# Names that a function reads and might confuse: attributes, by what they are of, and variables, by the empty string.
Siblings = dict[str, list[str]]


class Mutant(NamedTuple):
    """A changed line of a function, and the code that the function has with it."""

    line: str
    was: str
    code: CodeType


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant of a function at a place."""

    function: str
    place: str
    line: str
    was: str
    killed: bool


def alternatives(node: ast.AST, siblings: Siblings) -> Iterator[ast.AST]:
    """What one expression might have been by mistake."""
    match node:
        case ast.BinOp(left, operator, right):
            yield from (ast.BinOp(left, other(), right) for other in OPERATORS.get(type(operator), ()))
        case ast.AugAssign(target, operator, value):
            yield from (ast.AugAssign(target, other(), value) for other in OPERATORS.get(type(operator), ()))
        case ast.Compare(left, operators, right):
            for k, operator in enumerate(operators):
                for other in COMPARISONS.get(type(operator), ()):
                    yield ast.Compare(left, [*operators[:k], other(), *operators[k + 1 :]], right)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield operand
        case ast.IfExp(test, body, otherwise):
            yield from (ast.IfExp(test, otherwise, body), body, otherwise)
        case ast.Call(ast.Name(name), arguments) if name in REPLACED_BY_ARGUMENTS:
            if name in OPPOSITES:
                yield ast.Call(ast.Name(OPPOSITES[name], ast.Load()), arguments, [])
            yield from arguments
        case ast.Call(ast.Attribute(module, name), arguments) if name in REPLACED_BY_ARGUMENTS:
            if name in OPPOSITES:
                yield ast.Call(ast.Attribute(module, OPPOSITES[name], ast.Load()), arguments, [])
            yield from arguments
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Attribute(ast.Name(base) as owner, name, context) if len(siblings.get(base, ())) > 1:
            yield ast.Attribute(owner, previous(name, siblings[base]), context)
        case ast.Name(name, ast.Load() as context) if name in siblings[""] and len(siblings[""]) > 1:
            yield ast.Name(previous(name, siblings[""]), context)


def previous(name: str, names: list[str]) -> str:
    """The name before this one, the last before the first."""
    return names[names.index(name) - 1]


def variants(node: ast.AST, siblings: Siblings) -> Iterator[ast.AST]:
    """The tree with one expression changed, in every way."""
    yield from alternatives(node, siblings)
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for k, child in enumerate(children):
            if isinstance(child, ast.AST):
                for variant in variants(child, siblings):
                    changed = copy.copy(node)
                    setattr(
                        changed, field, [*children[:k], variant, *children[k + 1 :]] if value is children else variant
                    )
                    yield changed


def mutants(function: FunctionType) -> Iterator[Mutant]:
    """Every change of one expression in a function's body."""
    statements = body_of(definition_of(function))
    siblings = siblings_in([node for statement in statements for node in ast.walk(statement)], function)
    for k, statement in enumerate(statements):
        for variant in variants(statement, siblings):
            lines = zip(ast.unparse(variant).splitlines(), ast.unparse(statement).splitlines(), strict=True)
            line, was = next((line.strip(), was.strip()) for line, was in lines if line != was)
            yield Mutant(line, was, compiled(function, [*statements[:k], variant, *statements[k + 1 :]]))


def compiled(function: FunctionType, body: list[Any]) -> CodeType:
    """The code that a function has with this body."""
    definition = copy.copy(definition_of(function))
    definition.body = body[0] if isinstance(definition, ast.Lambda) else body
    tree = ast.Module([ast.Expr(definition) if isinstance(definition, ast.Lambda) else definition], [])
    module = compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec")
    return next(each for each in module.co_consts if isinstance(each, CodeType) and each.co_name == function.__name__)


def body_of(definition: Any) -> list[Any]:
    """A function's statements, or a lambda's expression."""
    return [definition.body] if isinstance(definition, ast.Lambda) else definition.body


def siblings_in(nodes: list[ast.AST], function: FunctionType) -> Siblings:
    """The names that a function reads."""
    siblings: Siblings = {"": []}
    variables = function.__code__.co_varnames
    for node in nodes:
        match node:
            case ast.Attribute(ast.Name(base), name) if base in variables and name not in siblings.setdefault(base, []):
                siblings[base].append(name)
    for node in nodes:
        match node:
            case ast.Name(name, ast.Load()) if name in variables and name not in (*siblings, *siblings[""]):
                siblings[""].append(name)
    return siblings


@functools.cache
def definition_of(function: FunctionType) -> Any:
    """A function's syntax, a FunctionDef or a Lambda, without decorators."""
    first = function.__code__.co_firstlineno
    for node in ast.walk(ast.parse(Path(inspect.getfile(function)).read_text())):
        match node:
            case ast.Lambda(lineno=line) if (function.__name__, first) == ("<lambda>", line):
                return node
            case ast.FunctionDef(name, lineno=line, decorator_list=decorators) if function.__name__ == name:
                if first == min([line, *(decorator.lineno for decorator in decorators)]):
                    node.decorator_list = []
                    return node
    raise LookupError(f"no definition of {function.__qualname__}")


def reached(value: Any) -> set[FunctionType]:
    """The functions in `rules` that are this value, or its fields, and what they call."""
    if isinstance(value, Rule | TensorRule):
        return set().union(*map(reached, vars(value).values()))
    if isinstance(value, Mapping):
        return set().union(*map(reached, value.values()))
    if not (isinstance(value, FunctionType) and value.__module__.startswith(rules.__name__)):
        return set()
    called = (value.__globals__.get(name) for name in value.__code__.co_names)
    return {value}.union(*(reached(each) for each in called if isinstance(each, FunctionType) and each is not value))


@functools.cache
def targets() -> dict[FunctionType, list[Row]]:
    """Functions to change, and the rows that use them."""
    rows: dict[FunctionType, list[Row]] = {}
    for row in ROWS.values():
        chooser = next(RULES[kind] for kind in type(row.optimizer).__mro__ if kind in RULES)
        for function in reached(rule_for(row.optimizer)) | reached(preparation) | reached(chooser):
            rows.setdefault(function, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: (item[0].__module__, item[0].__code__.co_firstlineno)))


@functools.cache
def expected(name: str, size: int) -> tuple[Array, list[Step], Array]:
    """A row's parameters and steps, and where its oracle ends."""
    parameters, steps = history(ROWS[name], size)
    return parameters, steps, ROWS[name].oracle(parameters, steps)


def holds(row: Row, size: int) -> bool:
    """Whether the engine ends where the oracle does."""
    parameters, steps, oracle = expected(row.name, size)
    lr = row.optimizer.lr
    try:
        direct = DirectSet({"x": parameters}, row.optimizer, threads=1)
        for step in steps:
            if step.gradient is not None:
                changes = {"default": {"lr": step.lr}} if step.lr != lr else {}
                assert direct.push({"x": step.gradient}, changes).applied
                lr = step.lr
        return bool(distances(pulled(row, direct.pull), oracle).max() <= 1e-12)
    except Exception:  # a mutant may fail in any way
        return False


def passes(test: Callable[[], None]) -> bool:
    """Whether a test does."""
    try:
        test()
    except Exception:
        return False
    return True


@contextmanager
def changed_to(function: FunctionType, code: CodeType) -> Iterator[None]:
    """A function with other code, for everything that refers to it."""
    compiled = any(function is getattr(rule_for(row.optimizer), "function", None) for row in targets()[function])
    original, function.__code__ = function.__code__, code
    try:
        if compiled:
            update_loop.cache_clear()
        yield
    finally:
        function.__code__ = original
        if compiled:
            update_loop.cache_clear()


def outcomes(number: int) -> list[Outcome]:
    """What becomes of every mutant of one function."""
    function, rows = [*targets().items()][number]
    place = f"{Path(inspect.getfile(function)).name}:{function.__code__.co_firstlineno}"
    changes = [*mutants(function)]
    if not changes:
        return []
    with changed_to(function, compiled(function, body_of(definition_of(function)))):
        assert all(holds(row, SIZES[0]) for row in rows), f"{function.__qualname__} fails as it is"
    found = []
    for line, was, code in changes:
        with changed_to(function, code):
            survives = all(holds(row, size) for size in SIZES for row in rows) and all(map(passes, TESTS))
        found.append(Outcome(function.__qualname__, place, line, was, not survives))
    return found


def main() -> int:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = [outcome for some in pool.imap(outcomes, range(len(targets()))) for outcome in some]
    survivors = [outcome for outcome in found if not outcome.killed]
    unexplained = [outcome for outcome in survivors if outcome.line not in EQUIVALENT.get(outcome.function, {})]
    explained = {(function, line) for function, lines in EQUIVALENT.items() for line in lines}
    superfluous = explained - {(outcome.function, outcome.line) for outcome in survivors}
    for outcome in unexplained:
        print(f"{outcome.place} {outcome.function}\n    {outcome.was}\n    {outcome.line}")
    for function, line in superfluous:
        print(f"explained, but killed or gone: {function}: {line}")
    print(
        f"{len(found)} mutants of {len({outcome.place for outcome in found})} functions: "
        f"{len(found) - len(survivors)} killed, {len(survivors) - len(unexplained)} equivalent, {len(unexplained)} survived"
    )
    return 1 if unexplained or superfluous else 0


if __name__ == "__main__":
    sys.exit(main())
