"""What every optimizer is: a rule by name, and hyperparameters that are checked where it is built."""

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from optserve._errors import InvalidHyperparameter, InvalidRule

Kind = TypeVar("Kind", bound="Optimizer")
T = TypeVar("T", float, bool, tuple[float, float], tuple[float, float, float])


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """What a hyperparameter may be: a sentence, a range from `minimum` up to `maximum` or `below` a limit, or some words; and
    whether it may change live."""

    documentation: str
    minimum: float = 0.0
    maximum: float = math.inf
    below: float = math.inf
    live: bool = True
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any, default: Any) -> Any:
        """Return the value with the type of its default; raises InvalidHyperparameter."""
        value = as_number(value)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise InvalidHyperparameter(f"expected {name} to be True or False; got {value!r}")
            return value
        if isinstance(default, str):
            if value not in self.choices:
                raise InvalidHyperparameter(
                    f"expected {name} to be {' or '.join(map(repr, self.choices))}; got {value!r}"
                )
            return value
        if isinstance(default, tuple):
            if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(default):
                raise InvalidHyperparameter(f"expected {name} to be {len(default)} numbers; got {value!r}")
            pairs = enumerate(zip(value, default, strict=True))
            return tuple(self.check(f"{name}[{index}]", item, expected) for index, (item, expected) in pairs)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InvalidHyperparameter(f"expected {name} to be a number; got {value!r}")
        value = _as_float(value)
        if not (math.isfinite(value) and self.minimum <= value <= self.maximum and value < self.below):
            raise InvalidHyperparameter(
                f"expected {name} to be finite, at least {self.minimum:g}"
                + (f" and at most {self.maximum:g}" if self.maximum < math.inf else "")
                + (f" and below {self.below:g}" if self.below < math.inf else "")
                + f"; got {value!r}"
            )
        return value


def hyperparameter(
    default: T, documentation: str, *, maximum: float = math.inf, below: float = math.inf, live: bool = True
) -> T:
    described = Hyperparameter(documentation, maximum=maximum, below=below, live=live)
    return field(default=default, metadata={"hyperparameter": described})


def convention(*libraries: str) -> str:
    """A field that says whose numbers a rule gives: torch's, or those of other libraries that differ."""
    described = Hyperparameter(CONVENTION, live=False, choices=("torch", *libraries))
    return field(default="torch", kw_only=True, metadata={"hyperparameter": described})


def defaults(**libraries: Mapping[str, Any]) -> Callable[[type[Kind]], type[Kind]]:
    """Let a convention bring its library's own defaults, for what the caller does not give."""

    def decorate(optimizer: type[Kind]) -> type[Kind]:
        build: Any = optimizer.__init__
        names = [name for name, _, _ in optimizer.described()]

        @functools.wraps(build)
        def init(self: Kind, *arguments: Any, **options: Any) -> None:
            own = libraries.get(str(options.get("convention")), {})
            given = {*names[: len(arguments)], *options}
            build(self, *arguments, **options, **{name: value for name, value in own.items() if name not in given})

        optimizer.__init__ = init  # type: ignore[method-assign, assignment]
        return optimizer

    return decorate


# What most rules have in common.
CONVENTION = "Whose numbers and defaults these are."
LR = "Learning rate η."
WEIGHT_DECAY = "Weight decay λ, per update."
MAXIMIZE = "Ascend instead of descend."
EPS = "ε, added to the denominator so that it is never zero."


@dataclass(frozen=True)
class Optimizer:
    """A rule and its hyperparameters; raises InvalidHyperparameter for a value of the wrong type or out of range."""

    own_weight_decay: ClassVar[bool] = False  # whether the rule decays in a way of its own

    lr: float = hyperparameter(1e-3, LR)

    def __init_subclass__(cls) -> None:
        other = catalogue().get(cls.__name__, cls)
        if other.__module__ != cls.__module__:
            raise InvalidRule(
                f"expected a name for {cls.__module__}.{cls.__name__} that no other optimizer has: names are what travels; "
                f"{other.__module__} has it"
            )

    def __post_init__(self) -> None:
        for name, described, default in self.described():
            object.__setattr__(self, name, described.check(name, getattr(self, name), default))

    @classmethod
    def described(cls) -> Iterator[tuple[str, Hyperparameter, Any]]:
        """Name, description and default of every hyperparameter, in the constructor's order."""
        for each in dataclasses.fields(cls):
            if "hyperparameter" not in each.metadata:
                raise InvalidRule(
                    f"expected {cls.__name__}.{each.name} to be declared as hyperparameter(default, documentation); "
                    f"got {each.default!r}"
                )
            yield each.name, each.metadata["hyperparameter"], each.default

    @property
    def rule(self) -> str:
        """Name of the rule on the wire."""
        return type(self).__name__

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    def replace(self, /, **changes: Any) -> Self:
        """The same rule with some values changed; raises InvalidHyperparameter."""
        check_names(type(self), changes)
        return dataclasses.replace(self, **changes)


def catalogue() -> dict[str, type[Optimizer]]:
    """All optimizers by the name of their rule, simplest first; those of your own, once they are imported, among them."""
    found: dict[str, type[Optimizer]] = {}
    for kind in _tree(Optimizer)[1:]:
        name = kind.__name__
        if not name.startswith("_") and found.get(name, kind).__module__ == kind.__module__:
            found[name] = kind  # the newest, where a class was defined again
    return found


def _tree(root: type[Optimizer]) -> list[type[Optimizer]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _tree(child))]


def as_number(value: Any) -> Any:
    """What is in an array or a tensor of one element, of any library; anything else as it is."""
    shape = getattr(value, "shape", None)
    return value.item() if isinstance(shape, tuple) and math.prod(shape) == 1 and hasattr(value, "item") else value


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_names(optimizer: type[Optimizer], values: Mapping[str, Any]) -> None:
    known = [name for name, _, _ in optimizer.described()]
    for name in values:
        if name not in known:
            raise InvalidHyperparameter(
                f"expected a hyperparameter of {optimizer.__name__} among {', '.join(known)}; "
                f"got {name!r}{suggest(name, known)}"
            )


def suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
