"""Folding: a round whose gradients are added up as they come, in memory that does not depend on how many there are."""

from dataclasses import dataclass, field

from optserve_server.engine.push import Push
from optserve_server.engine.rows import SparseGradient


@dataclass(slots=True)
class Folded:
    """What the gradients of a round have been added up to so far, beside the mean's arena.

    Each was divided by `divisor` as it was added; `samples` are theirs together. `first` keeps what only one push brings.
    """

    divisor: float
    samples: float = 0.0
    sparse: dict[int, SparseGradient] = field(default_factory=dict)
    first: Push | None = None
