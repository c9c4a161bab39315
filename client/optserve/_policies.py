"""Policies: when pushes become an update, and what becomes of those that come late."""

import enum
from dataclasses import dataclass

from optserve._errors import InvalidPolicy
from optserve.aggregation import Aggregation, Quarantine
from optserve.staleness import Staleness, check_count, check_number

MOST_WORKERS = 65_536
MOST_PUSHES = 1 << 20
LONGEST_DEADLINE = 86_400.0  # seconds
LEAST_SAMPLES, MOST_SAMPLES = (
    1e-9,
    1e12,
)  # weights outside of these make zeros and infinities of ordinary gradients in float32


class Late(enum.Enum):
    """What becomes of a push that was computed before the last round was over."""

    DISCARD = "discard"
    CARRY = "carry"

    @classmethod
    def _missing_(cls, value: object) -> "Late":
        raise InvalidPolicy(f"expected late to be 'discard' or 'carry'; got {value!r}")


@dataclass(frozen=True, slots=True)
class Async:
    """Every push is an update of its own, in the order in which pushes come. Raises InvalidPolicy."""

    staleness: Staleness | None = None

    def __post_init__(self) -> None:
        _check_staleness(self.staleness)


@dataclass(frozen=True, slots=True)
class Sync:
    """A push of each worker makes one update, of the mean of their gradients, weighted by samples; they wait for each other.

    `workers` is how many, None for all members there are. A member whose lease ends, or that leaves, is waited for no more,
    until another comes in its place. With a `quorum` of k, the first k make the update, and those that come within `grace`
    seconds. A round is over `deadline` seconds after its first push: with fewer than the quorum (all, if none is given; one,
    if `workers` is None) it is given up: nobody's push of it was applied, and those who wait get RoundIncomplete, upon which
    the SDK tries again.

    What was computed before an update that was made without its worker comes too late: it is discarded, and its receipt says
    so, or carried over to the present round (`late="carry"`), where `staleness` may say what to do about it.

    Gradients are added up as they come, in one arena whatever the number of workers. `deterministic` keeps them until the
    round is over and adds them up in the order of client ids, so that the order of arrival changes no bit. So does an
    `aggregation`, which takes the place of the mean. `quarantine` discards what is far too large. Raises InvalidPolicy.
    """

    workers: int | None = None
    deadline: float = 60.0
    quorum: int | None = None
    grace: float = 0.0
    late: Late | str = Late.DISCARD
    deterministic: bool = False
    staleness: Staleness | None = None
    aggregation: Aggregation | None = None
    quarantine: Quarantine | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_count("workers", self.workers, 1, MOST_WORKERS)
        _check_deadline(self.deadline)
        if self.quorum is not None:
            check_count("quorum", self.quorum, 1, self.workers or MOST_WORKERS)
        check_number("grace", self.grace, 0.0, LONGEST_DEADLINE, above=False)
        object.__setattr__(self, "late", Late(self.late))
        _check_staleness(self.staleness)
        if self.staleness is not None and self.late is Late.DISCARD:
            raise InvalidPolicy(
                f"expected late='carry' with a staleness, since what is late is discarded; got {self.staleness}"
            )
        if not isinstance(self.aggregation, Aggregation | None):
            raise InvalidPolicy(f"expected aggregation to be one of {Aggregation}; got {self.aggregation!r}")
        if not isinstance(self.quarantine, Quarantine | None):
            raise InvalidPolicy(f"expected a Quarantine, or none; got {self.quarantine!r}")
        least, most = self.aggregation.least if self.aggregation is not None else 1, self.quorum or self.workers
        if most is not None and most < least:
            raise InvalidPolicy(f"expected rounds of at least {least} pushes for {self.aggregation}; got {most}")

    @property
    def keeps(self) -> bool:
        """Whether all pushes of a round are kept until it is over."""
        return self.deterministic or self.aggregation is not None


@dataclass(frozen=True, slots=True)
class BoundedStaleness:
    """Every push is an update of its own, and nobody is more than `bound` pushes ahead of the slowest member: who is, waits.

    A member that others have waited for longer than `deadline` seconds is waited for no more, as if its lease had ended; what
    it then pushes of parameters from before is discarded. Raises InvalidPolicy.

    Reference: Ho et al., "Stale Synchronous Parallel", NeurIPS 2013.
    """

    bound: int
    deadline: float = 60.0
    staleness: Staleness | None = None

    def __post_init__(self) -> None:
        check_count("bound", self.bound, 0, MOST_PUSHES)
        _check_deadline(self.deadline)
        _check_staleness(self.staleness)


@dataclass(frozen=True, slots=True)
class Buffered:
    """Every `pushes` pushes, or as many as have so many `samples`, make one update of their mean; nobody waits.

    The mean is weighted by samples, ḡ = Σ nᵢ s(τᵢ) gᵢ / Σ nᵢ, with s the staleness's weight. Raises InvalidPolicy.

    Reference: FedBuff (Nguyen et al., AISTATS 2022, arXiv:2106.06639).
    """

    pushes: int | None = None
    samples: float | None = None
    staleness: Staleness | None = None

    def __post_init__(self) -> None:
        if (self.pushes is None) == (self.samples is None):
            raise InvalidPolicy(f"expected pushes or samples; got {self.pushes} and {self.samples}")
        if self.pushes is not None:
            check_count("pushes", self.pushes, 1, MOST_PUSHES)
        if self.samples is not None:
            check_samples(self.samples)
        _check_staleness(self.staleness)


Policy = Async | Sync | BoundedStaleness | Buffered


def in_rounds(policy: Policy) -> Sync | None:
    """The policy, if pushes wait for each other: not those of a single worker."""
    return policy if isinstance(policy, Sync) and policy.workers != 1 else None


def check_samples(value: object) -> float:
    """How many samples a gradient is the mean of; raises InvalidPolicy."""
    check_number("samples", value, LEAST_SAMPLES, MOST_SAMPLES, above=False)
    return float(value)  # type: ignore[arg-type]


def _check_deadline(value: object) -> None:
    check_number("deadline", value, 0.0, LONGEST_DEADLINE)


def _check_staleness(value: object) -> None:
    if not isinstance(value, Staleness | None):
        raise InvalidPolicy(f"expected one of optserve.staleness, or none; got {value!r}")


ASYNC = Async()
