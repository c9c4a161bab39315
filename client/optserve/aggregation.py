"""Robust aggregation: what a synchronous round's gradients become, instead of their mean."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Median:
    """The median of each coordinate."""

    @property
    def least(self) -> int:
        """How many pushes it needs."""
        return 1


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """The mean of each coordinate without the largest and smallest."""

    trimmed: int

    @property
    def least(self) -> int:
        """How many pushes it needs."""
        return 2 * self.trimmed + 1


@dataclass(frozen=True, slots=True)
class Krum:
    """The gradient nearest to others."""

    byzantine: int
    selected: int = 1

    @property
    def least(self) -> int:
        """How many pushes it needs."""
        return 2 * self.byzantine + 3


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Discards what is far too large."""

    factor: float = 10.0
    strikes: int = 3
    updates: int = 100


Aggregation = Median | TrimmedMean | Krum
