"""What every optimizer is: a rule by name, and hyperparameters that are checked where it is built."""

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from optserve._errors import InvalidHyperparameter

Kind = TypeVar("Kind", bound="Optimizer")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """What a hyperparameter may be: a sentence, a half-open range [minimum, below) or some words, and whether it may change
    live. One whose default is None may be that, too."""

    documentation: str
    minimum: float = 0.0
    below: float = math.inf
    live: bool = True
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any, default: Any) -> Any:
        """Return the value with the type of its default; raises InvalidHyperparameter."""
        if value is None and default is None:
            return None
        or_none = " or None" if default is None else ""
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise InvalidHyperparameter(f"expected {name} to be True or False; got {value!r}")
            return value
        if self.choices:
            if value not in self.choices:
                raise InvalidHyperparameter(
                    f"expected {name} to be {' or '.join(map(repr, self.choices))}{or_none}; got {value!r}"
                )
            return value
        if isinstance(default, tuple):
            if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(default):
                raise InvalidHyperparameter(f"expected {name} to be {len(default)} numbers; got {value!r}")
            pairs = enumerate(zip(value, default, strict=True))
            return tuple(self.check(f"{name}[{index}]", item, expected) for index, (item, expected) in pairs)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InvalidHyperparameter(f"expected {name} to be a number{or_none}; got {value!r}")
        value = _as_float(value)
        if not (math.isfinite(value) and self.minimum <= value < self.below):
            raise InvalidHyperparameter(
                f"expected {name} to be finite"
                + (f", at least {self.minimum:g}" if self.minimum > -math.inf else "")
                + (f" and below {self.below:g}" if self.below < math.inf else "")
                + f"; got {value!r}"
            )
        if not isinstance(default, int):
            return value
        if not value.is_integer():
            raise InvalidHyperparameter(f"expected {name} to be a whole number; got {value!r}")
        return int(value)


def hyperparameter(
    default: T,
    documentation: str,
    *,
    minimum: float = 0.0,
    below: float = math.inf,
    live: bool = True,
    choices: tuple[str, ...] = (),
) -> T:
    described = Hyperparameter(documentation, minimum, below, live, choices)
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

    def __post_init__(self) -> None:
        for name, described, default in self.described():
            object.__setattr__(self, name, described.check(name, getattr(self, name), default))

    @classmethod
    def described(cls) -> Iterator[tuple[str, Hyperparameter, Any]]:
        """Name, description and default of every hyperparameter, in the constructor's order."""
        for each in dataclasses.fields(cls):
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
