"""Staleness: what a policy's choice makes of a gradient that is stale by so many updates."""

from optserve._errors import TooStale
from optserve._policies import BoundedStaleness, Late, Policy, in_rounds
from optserve.staleness import DelayCompensation, DivideLearningRate, GapAware, Polynomial, Reject, Staleness
from optserve_server.engine.commit import Commit
from optserve_server.engine.loops import Compensation

EXACT = 16  # from here on, pushes are counted by the power of two that their staleness reaches


def weight(choice: Staleness | None, staleness: int | None, *, alone: bool) -> float:
    """What a gradient is multiplied by; `alone` if it makes an update of its own."""
    match choice:
        case Polynomial(a):
            return float((1.0 + (staleness or 0)) ** -a)
        case DivideLearningRate() if not alone:
            return 1.0 / max(1, staleness or 0)
        case _:
            return 1.0


def learning_rate_divisor(choice: Staleness | None, staleness: int | None, *, alone: bool) -> int:
    """What the learning rate of an update is divided by."""
    return max(1, staleness or 0) if alone and isinstance(choice, DivideLearningRate) else 1


def compensation(choice: Staleness | None) -> Compensation:
    """What is done to the elements of a gradient."""
    match choice:
        case DelayCompensation():
            return Compensation.DELAY
        case GapAware():
            return Compensation.GAP
        case _:
            return Compensation.NONE


def bucket(staleness: int) -> int:
    """The least staleness that is counted together with this one."""
    return staleness if staleness < EXACT else 1 << (staleness.bit_length() - 1)


def check_staleness(
    commit: Commit, policy: Policy, version: int, barred: int | None, *, missed: bool, known: bool
) -> None:
    """Raises TooStale for a push that is not to be part of an update any more.

    `barred` is the version at which others ceased to wait for its worker, if they did; `missed` says whether the last update
    was made without it, `known` whether the parameters that the push was computed at are, as far as that matters.
    """
    base, staleness = commit.push.base, commit.staleness
    if base is None or staleness is None:
        if not known:
            raise TooStale(
                "expected parameters that were trained from some that this worker had pulled since the server started; got "
                "others; they were discarded. Pull, and go on from there"
            )
        return
    if not staleness:
        return
    since = (
        f"computed at version {base.version}, and the set is at {version}; it was discarded. Pull, and go on from there"
    )
    if (rounds := in_rounds(policy)) is not None and rounds.late is Late.DISCARD and missed:
        raise TooStale(f"expected a push of the present round; got one of a round that is over, {since}")
    if isinstance(policy.staleness, Reject) and staleness > policy.staleness.bound:
        raise TooStale(f"expected a staleness of at most {policy.staleness.bound}; got one of {staleness}, {since}")
    if isinstance(policy, BoundedStaleness) and barred is not None and base.version <= barred:
        raise TooStale(f"expected a push of a worker that others waited for; got one {since}")
    if not known:
        raise TooStale(f"expected a push from a version that is still kept for its worker; got one {since}")
