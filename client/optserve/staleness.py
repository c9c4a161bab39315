"""What is done about stale gradients: those computed at parameters that have had τ updates since.

A policy takes one of these as its `staleness`; without one, nothing is done. In the order of what they look at: nothing but τ,
then the parameters of now (θ) and those that the gradient was computed at (θ_base), element by element. The server keeps
θ_base for every member of such a set: a copy for each version that somebody has.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from optserve._errors import InvalidPolicy

__all__ = ["DelayCompensation", "DivideLearningRate", "GapAware", "Polynomial", "Reject", "Staleness"]

MOST_UPDATES = (1 << 53) - 1


def check_number(what: str, value: Any, least: float, most: float = math.inf, *, above: bool = True) -> None:
    """Raises InvalidPolicy unless a value is a finite number above `least` (or at it, too) and at most `most`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value > least or (value == least and not above)) or value > most:
        bounds = f"{'above' if above else 'of at least'} {least:g}" + (f", at most {most:g}" if most < math.inf else "")
        raise InvalidPolicy(f"expected {what} to be a number {bounds}; got {value!r}")


def check_count(what: str, value: Any, least: int, most: int) -> None:
    """Raises InvalidPolicy unless a value is a whole number between two others."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidPolicy(f"expected {what} to be a whole number from {least} to {most}; got {value!r}")


@dataclass(frozen=True, slots=True)
class Reject:
    """Discard what is stale by more than `bound` updates."""

    bound: int

    def __post_init__(self) -> None:
        check_count("bound", self.bound, 0, MOST_UPDATES)


@dataclass(frozen=True, slots=True)
class DivideLearningRate:
    """η / max(1, τ) for an update of one push; where several make one, the weight of each is divided, as in n-softsync.

    Reference: Zhang et al., "Staleness-aware Async-SGD", IJCAI 2016, arXiv:1511.05950.
    """


@dataclass(frozen=True, slots=True)
class Polynomial:
    """(1 + τ)^−a · g: FedAsync's weight, and with a = 1/2 that of FedBuff.

    References: Xie, Koyejo & Gupta, 2019, arXiv:1903.03934; Nguyen et al., AISTATS 2022, arXiv:2106.06639.
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        check_number("a", self.a, 0.0)


@dataclass(frozen=True, slots=True)
class DelayCompensation:
    """g + scale · g² · (θ − θ_base): the gradient at θ to first order, its curvature taken from its own square (DC-ASGD-c).

    Reference: Zheng et al., ICML 2017, arXiv:1609.08326; the default scale is that of MXNet's DCASGD.
    """

    scale: float = 0.04

    def __post_init__(self) -> None:
        check_number("scale", self.scale, 0.0)


@dataclass(frozen=True, slots=True)
class GapAware:
    """g / (1 + |θ − θ_base| / C): what has moved by n of its usual steps counts 1 / (1 + n).

        S ← decay · S + (1 − decay) · (θ_t − θ_(t−1))²         C = √(S / (1 − decay^t))

    C is an element's own running root mean square of a step, counted since the server started or the policy was set.

    Reference: Barkai, Hakimi & Schuster, ICLR 2020, arXiv:1909.10802.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        check_number("decay", self.decay, 0.0, 1.0)
        if self.decay == 1:
            raise InvalidPolicy("expected decay to be below 1; got 1")


Staleness = Reject | DivideLearningRate | Polynomial | DelayCompensation | GapAware
