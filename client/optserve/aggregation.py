"""Robust aggregation: what a synchronous round makes of its pushes in place of their mean, and which pushes never join one.

A single push can move a mean anywhere. The aggregates here stay near the honest pushes as long as those of faulty or hostile
workers, called Byzantine, are few enough; the documentation says what they do not protect from. They are written for the
gradients g₁, ..., gₙ of the n pushes of a round. Each push counts once: its number of samples is only what its worker says.
"""

from dataclasses import dataclass
from typing import ClassVar

from optserve._transforms import MOST_PUSHES
from optserve.staleness import MOST_UPDATES, check_count, check_number

__all__ = ["Aggregation", "Krum", "Median", "Quarantine", "TrimmedMean"]


@dataclass(frozen=True, slots=True)
class Median:
    """The median of each element over the pushes; of an even number of them, the mean of the middle two, as `np.median`.

    With fewer than half of the pushes Byzantine, every element of the result lies between the least and the largest
    that honest pushes have there, whatever the others are.

    Reference: Yin et al., ICML 2018, arXiv:1803.01498.
    """

    @property
    def least(self) -> int:
        """Pushes that a round needs: 3, since the median of fewer is their mean."""
        return 3


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """The mean of each element over the pushes, without its `trimmed` largest and its `trimmed` smallest values:

        result = 1/(n − 2k) · Σ g₍ᵢ₎ for i = k + 1, ..., n − k   where g₍₁₎ ≤ ... ≤ g₍ₙ₎ and k = trimmed

    With at most k pushes Byzantine, every element of the result lies between the least and the largest that honest pushes
    have there. k is a number of pushes, at least 1, where the paper has a share of them, β = k/n. Raises InvalidPolicy.

    Reference: Yin et al., ICML 2018, arXiv:1803.01498.
    """

    trimmed: int

    def __post_init__(self) -> None:
        check_count("trimmed", self.trimmed, 1, (MOST_PUSHES - 1) // 2)

    @property
    def least(self) -> int:
        """Pushes that a round needs: 2k + 1, so that one is left."""
        return 2 * self.trimmed + 1


@dataclass(frozen=True, slots=True)
class Krum:
    """The push with the lowest score, or the mean of the `selected` ones with the lowest (Multi-Krum):

        score(i) = Σ ‖gᵢ − gⱼ‖² over the n − f − 2 pushes j ≠ i that are nearest to i   where f = byzantine

    Norms are over all tensors together; of equal scores the one of the first client id is lower. With at most f pushes
    Byzantine, those far from the honest ones are never selected. Raises InvalidPolicy.

    Reference: Blanchard et al., NeurIPS 2017, arXiv:1703.02757; `selected` is at most n − f − 2, as in Damaskinos et al.,
    AggregaThor, MLSys 2019.
    """

    byzantine: int
    selected: int = 1

    def __post_init__(self) -> None:
        check_count("byzantine", self.byzantine, 0, (MOST_PUSHES - 3) // 2)
        check_count("selected", self.selected, 1, MOST_PUSHES - 2 - self.byzantine)

    @property
    def least(self) -> int:
        """Pushes that a round needs: 2f + 3, and selected + f + 2."""
        return max(2 * self.byzantine + 3, self.selected + self.byzantine + 2)


Aggregation = Median | TrimmedMean | Krum


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Discards outliers: pushes whose gradient norm is above `factor` times the median of those that were accepted last.

    The median is that of the `window` norms accepted last, of all clients; until there are `least` of them, and where it is
    0, no finite norm is an outlier. After `strikes` outliers of a client in a row, whatever that client pushes is discarded
    for `updates` updates of the set; then it begins with no strikes. Raises InvalidPolicy.
    """

    window: ClassVar[int] = 100
    least: ClassVar[int] = 10

    factor: float = 10.0
    strikes: int = 3
    updates: int = 100

    def __post_init__(self) -> None:
        check_number("factor", self.factor, 1.0)
        check_count("strikes", self.strikes, 1, MOST_PUSHES)
        check_count("updates", self.updates, 1, MOST_UPDATES)
        object.__setattr__(self, "factor", float(self.factor))
