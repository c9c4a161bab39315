"""Schedules: hyperparameters as functions of the number of updates that a set has had.

`optim.AdamW(lr=schedules.WarmupCosine(3e-4, warmup_steps=1_000, decay_steps=50_000))` lets the server work out the learning
rate of every update, the same for all workers. Any hyperparameter that is a real number and may change live can follow one.
A schedule is a value that is called with t, the updates that the set has had: 0 for the first one. That is the set's own
count, also for a schedule that begins in the middle of its life. Values are in float64; whether they are in a hyperparameter's
range is checked when an update uses them.

Names of arguments are optax' where it has the schedule, else torch's. Sorted from simple to complex.
"""

import abc
import dataclasses
import itertools
import math
import numbers
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from optserve._errors import InvalidHyperparameter

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Joined",
    "Linear",
    "OneCycle",
    "Piecewise",
    "Polynomial",
    "Schedule",
    "Step",
    "WarmRestarts",
    "WarmupCosine",
]

Check = Callable[[str, Any], Any]  # of an argument, by its name: returns it as its own type, or raises


def _real(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidHyperparameter(f"expected {name} to be a finite number; got {value!r}")
    return number


def _positive(name: str, value: Any) -> float:
    number = _real(name, value)
    if number <= 0:
        raise InvalidHyperparameter(f"expected {name} to be above 0; got {value!r}")
    return number


def _share(name: str, value: Any) -> float:
    number = _real(name, value)
    if not 0 < number <= 1:
        raise InvalidHyperparameter(f"expected {name} to be above 0 and at most 1; got {value!r}")
    return number


def _optional(name: str, value: Any) -> float | None:
    return None if value is None else _real(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidHyperparameter(f"expected {name} to be True or False; got {value!r}")
    return value


def _at_least(minimum: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not minimum <= int(value) < 2**63:
            raise InvalidHyperparameter(f"expected {name} to be a whole number, at least {minimum}; got {value!r}")
        return int(value)

    return check


def _one_of(*choices: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise InvalidHyperparameter(f"expected {name} to be {' or '.join(map(repr, choices))}; got {value!r}")
        return str(value)

    return check


def _each(check: Check) -> Check:
    def check_all(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InvalidHyperparameter(f"expected {name} to be several in order; got {value!r}")
        return tuple(check(f"{name}[{index}]", item) for index, item in enumerate(value))

    return check_all


def _boundaries(name: str, value: Any) -> tuple[int, ...]:
    boundaries: tuple[int, ...] = _each(_at_least(1))(name, value)
    if any(left >= right for left, right in itertools.pairwise(boundaries)):
        raise InvalidHyperparameter(f"expected {name} to ascend; got {boundaries}")
    return boundaries


def _schedule(name: str, value: Any) -> "Schedule":
    if not isinstance(value, Schedule):
        raise InvalidHyperparameter(f"expected {name} to be a schedule; got {value!r}")
    return value


Real = Annotated[float, _real]
Positive = Annotated[float, _positive]
Steps = Annotated[int, _at_least(1)]
Begin = Annotated[int, _at_least(0)]
Flag = Annotated[bool, _flag]
Boundaries = Annotated[tuple[int, ...], _boundaries]

if TYPE_CHECKING:
    _Number = float  # a schedule may stand wherever an optimizer takes a number
else:
    _Number = object


@dataclass(frozen=True)
class Schedule(abc.ABC, _Number):
    """A function of the number of updates; raises InvalidHyperparameter for arguments that it can't be built from."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            (check,) = each.type.__metadata__  # type: ignore[union-attr]
            object.__setattr__(self, each.name, check(each.name, getattr(self, each.name)))

    @abc.abstractmethod
    def __call__(self, count: int) -> float:
        """The value for the update that comes after `count` others."""

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value always, as `optax.constant_schedule`: for a part of `Joined`."""

    value: Real

    def __call__(self, count: int) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From one value to another in equal steps, as `optax.linear_schedule`.

        x = clip(t − B, 0, T)/T,    I + (E − I)x

    for B `transition_begin`, T `transition_steps`, from I to E.
    """

    init_value: Real
    end_value: Real
    transition_steps: Steps
    transition_begin: Begin = 0

    def __call__(self, count: int) -> float:
        """I + (E − I)x."""
        x = _clip(count - self.transition_begin, self.transition_steps) / self.transition_steps
        return self.init_value + (self.end_value - self.init_value) * x


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From one value to another, faster at first if `power` P is above 1, as `optax.polynomial_schedule`.

        x = clip(t − B, 0, T)/T,    E + (I − E)(1 − x)ᴾ

    `torch.optim.lr_scheduler.PolynomialLR` is this to 0.
    """

    init_value: Real
    end_value: Real
    power: Positive
    transition_steps: Steps
    transition_begin: Begin = 0

    def __call__(self, count: int) -> float:
        """E + (I − E)(1 − x)ᴾ."""
        x = _clip(count - self.transition_begin, self.transition_steps) / self.transition_steps
        return self.end_value + (self.init_value - self.end_value) * math.pow(1.0 - x, self.power)


@dataclass(frozen=True)
class Exponential(Schedule):
    """Multiplied by r `decay_rate` in every T `transition_steps`, as `optax.exponential_decay`.

        I r^(max(0, t − B)/T)

    With `staircase` the exponent is rounded down. `end_value` is never passed: it bounds from below if r < 1, else from above.
    `torch.optim.lr_scheduler.ExponentialLR` is this with T = 1.
    """

    init_value: Real
    transition_steps: Steps
    decay_rate: Positive
    transition_begin: Begin = 0
    staircase: Flag = False
    end_value: Annotated[float | None, _optional] = None

    def __call__(self, count: int) -> float:
        """I r^(max(0, t − B)/T)."""
        exponent = max(0, count - self.transition_begin) / self.transition_steps
        value = self.init_value * _power(self.decay_rate, math.floor(exponent) if self.staircase else exponent)
        if self.end_value is None:
            return value
        return max(value, self.end_value) if self.decay_rate < 1.0 else min(value, self.end_value)


@dataclass(frozen=True)
class Step(Schedule):
    """Multiplied by γ every `step_size` S updates, as `torch.optim.lr_scheduler.StepLR`.

    I γ^⌊t/S⌋
    """

    init_value: Real
    step_size: Steps
    gamma: Positive = 0.1

    def __call__(self, count: int) -> float:
        """I γ^⌊t/S⌋."""
        return self.init_value * _power(self.gamma, count // self.step_size)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """One value until each boundary, and another from there on: one more value than boundaries.

    As `optax.piecewise_constant_schedule` and `torch.optim.lr_scheduler.MultiStepLR`, which take factors instead of values.
    Keras' `PiecewiseConstantDecay` keeps the value before at the boundary itself.
    """

    values: Annotated[tuple[float, ...], _each(_real)]
    boundaries: Boundaries

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_parts("values", self.values, self.boundaries)

    def __call__(self, count: int) -> float:
        """The value that is on at t."""
        return self.values[bisect_right(self.boundaries, count)]


@dataclass(frozen=True)
class Joined(Schedule):
    """One schedule until each boundary, and another from there on, which counts from it, as `optax.join_schedules`."""

    schedules: Annotated[tuple[Schedule, ...], _each(_schedule)]
    boundaries: Boundaries

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_parts("schedules", self.schedules, self.boundaries)

    def __call__(self, count: int) -> float:
        """The value at t − (the last boundary) of the schedule that is on."""
        index = bisect_right(self.boundaries, count)
        return self.schedules[index](count - (self.boundaries[index - 1] if index else 0))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from one value to another in T `decay_steps`.

        E + ½(I − E)(1 + cos(π min(t, T)/T))

    As `optax.cosine_decay_schedule`, where E/I is `alpha`. `torch.optim.lr_scheduler.CosineAnnealingLR` is this up to T, from
    where it comes back.

    Reference: Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983.
    """

    init_value: Real
    decay_steps: Steps
    end_value: Real = 0.0

    def __call__(self, count: int) -> float:
        """E + ½(I − E)(1 + cos(π min(t, T)/T))."""
        return _cosine(self.init_value, self.end_value, _clip(count, self.decay_steps) / self.decay_steps)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Up linearly in W `warmup_steps`, then down half a cosine, as `optax.warmup_cosine_decay_schedule`.

        t < W:      I + (P − I) t/W
        otherwise:  E + ½(P − E)(1 + cos(π (min(t, T) − W)/(T − W)))

    T `decay_steps` is the length of all of it, warm-up included, as in optax.
    """

    peak_value: Real
    warmup_steps: Begin
    decay_steps: Steps
    init_value: Real = 0.0
    end_value: Real = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps >= self.decay_steps:
            raise InvalidHyperparameter(
                f"expected fewer warmup_steps than decay_steps, which include them; got {self.warmup_steps} and "
                f"{self.decay_steps}"
            )

    def __call__(self, count: int) -> float:
        """The warm-up's value, or the cosine's."""
        if count < self.warmup_steps:
            return self.init_value + (self.peak_value - self.init_value) * (count / self.warmup_steps)
        steps = self.decay_steps - self.warmup_steps
        return _cosine(self.peak_value, self.end_value, _clip(count - self.warmup_steps, steps) / steps)


@dataclass(frozen=True)
class WarmRestarts(Schedule):
    """Half a cosine again and again, as `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.

        E + ½(I − E)(1 + cos(π s/Tₖ))

    for s the updates since the last restart; the first period T₀ is `decay_steps`, and Tₖ₊₁ = `t_mult` Tₖ.

    Reference: Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983.
    """

    init_value: Real
    decay_steps: Steps
    t_mult: Steps = 1
    end_value: Real = 0.0

    def __call__(self, count: int) -> float:
        """E + ½(I − E)(1 + cos(π s/Tₖ))."""
        period = self.decay_steps
        if self.t_mult == 1:
            count %= period
        while count >= period:
            count -= period
            period *= self.t_mult
        return _cosine(self.init_value, self.end_value, count / period)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to a peak and down to almost nothing, as `torch.optim.lr_scheduler.OneCycleLR`, there with `peak_value` as `max_lr`.

        I = P/div_factor,  E = I/final_div_factor,  u = pct_start·T − 1
        from I at t = 0 to P at t = u, to E at t = T − 1, and E from there on

    along half a cosine each, or a line. With `three_phase` it is at I again at t = 2u. Momentum does not follow by itself.

    Reference: Smith & Topin, arXiv:1708.07120.
    """

    peak_value: Real
    total_steps: Steps
    pct_start: Annotated[float, _share] = 0.3
    anneal_strategy: Annotated[str, _one_of("cos", "linear")] = "cos"
    div_factor: Positive = 25.0
    final_div_factor: Positive = 1e4
    three_phase: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pct_start * self.total_steps <= 1.0:
            raise InvalidHyperparameter(
                f"expected pct_start times total_steps to be above 1, or there is no way up; got {self.pct_start} times "
                f"{self.total_steps}"
            )

    def __call__(self, count: int) -> float:
        """The value on the way up, or down."""
        peak, initial = self.peak_value, self.peak_value / self.div_factor
        up, last = self.pct_start * self.total_steps - 1.0, self.total_steps - 1.0
        ways = [(0.0, up, initial, peak)]
        if self.three_phase:
            ways += [(up, 2.0 * up, peak, initial)]
        ways += [(ways[-1][1], last, ways[-1][3], initial / self.final_div_factor)]
        t = min(float(count), last)
        begin, end, start_value, end_value = next(way for way in ways if t <= way[1])
        x = (t - begin) / (end - begin)
        if self.anneal_strategy == "cos":
            return _cosine(start_value, end_value, x)
        return start_value + (end_value - start_value) * x


_KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (
        Constant,
        Linear,
        Polynomial,
        Exponential,
        Step,
        Piecewise,
        Joined,
        Cosine,
        WarmupCosine,
        WarmRestarts,
        OneCycle,
    )
}


def from_arguments(name: str, arguments: Mapping[str, Any]) -> Schedule:
    """The schedule of that name with those arguments; raises InvalidHyperparameter."""
    if name not in _KINDS:
        raise InvalidHyperparameter(f"expected a schedule among {', '.join(_KINDS)}; got {name!r}")
    fields = dataclasses.fields(_KINDS[name])
    required = {each.name for each in fields if each.default is dataclasses.MISSING}
    if not required <= arguments.keys() <= {each.name for each in fields}:
        known = ", ".join(each.name if each.name in required else f"{each.name} (optional)" for each in fields)
        raise InvalidHyperparameter(
            f"expected the arguments {known} of {name}; got {', '.join(sorted(arguments)) or 'none'}"
        )
    return _KINDS[name](**arguments)


def _check_parts(name: str, parts: tuple[Any, ...], boundaries: tuple[int, ...]) -> None:
    if len(parts) != len(boundaries) + 1:
        raise InvalidHyperparameter(
            f"expected one more of {name} than boundaries; got {len(parts)} and {len(boundaries)}"
        )


def _clip(count: int, steps: int) -> int:
    return min(max(count, 0), steps)


def _cosine(start: float, end: float, x: float) -> float:
    """From start to end along half a cosine, for x from 0 to 1."""
    return end + (start - end) * (0.5 * (1.0 + math.cos(math.pi * x)))


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
