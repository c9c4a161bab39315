"""Policies: when pushes into a parameter set become an update."""

from dataclasses import dataclass

from optserve._errors import InvalidPolicy

MOST_WORKERS = 65_536
LONGEST_DEADLINE = 86_400.0  # seconds


@dataclass(frozen=True, slots=True)
class Async:
    """Every push is an update of its own, in the order in which pushes come."""


@dataclass(frozen=True, slots=True)
class Sync:
    """A push of each of `workers` workers makes one update, of the mean of their gradients; they wait for each other.

    A round that is not complete `deadline` seconds after its first push is given up: nobody's push of it was applied, and
    those who wait get RoundIncomplete, upon which the SDK tries again. Raises InvalidPolicy.
    """

    workers: int
    deadline: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.workers, int) or not 1 <= self.workers <= MOST_WORKERS:
            raise InvalidPolicy(f"expected 1 to {MOST_WORKERS} workers in a round; got {self.workers!r}")
        if not (isinstance(self.deadline, int | float) and 0 < self.deadline <= LONGEST_DEADLINE):
            raise InvalidPolicy(
                f"expected a deadline of up to {LONGEST_DEADLINE:g} seconds for a round; got {self.deadline!r}"
            )


Policy = Async | Sync
ASYNC = Async()
