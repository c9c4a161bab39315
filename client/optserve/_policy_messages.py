"""Policies to protobuf messages and back."""

from dataclasses import asdict

from google.protobuf import duration_pb2

from optserve._errors import InvalidPolicy
from optserve._policies import Async, BoundedStaleness, Buffered, Late, Policy, Sync
from optserve.aggregation import Aggregation, Krum, Median, Quarantine, TrimmedMean
from optserve.staleness import DelayCompensation, DivideLearningRate, GapAware, Polynomial, Reject, Staleness
from optserve.v1 import policy_pb2


def encode_policy(policy: Policy) -> policy_pb2.Policy:
    """A policy as a message; raises InvalidPolicy for what is none."""
    if not isinstance(policy, Policy):
        raise InvalidPolicy(f"expected a policy, such as Sync(workers=4); got {policy!r}")
    message, stale = policy_pb2.Policy(), _encode_staleness(policy.staleness)
    match policy:
        case Async():
            getattr(message, "async").CopyFrom(policy_pb2.Async(staleness=stale))  # a keyword in Python
        case Sync():
            message.sync.CopyFrom(_encode_sync(policy, stale))
        case BoundedStaleness():
            message.bounded_staleness.CopyFrom(policy_pb2.BoundedStaleness(bound=policy.bound, staleness=stale))
            set_seconds(message.bounded_staleness.deadline, policy.deadline)
        case Buffered():
            buffered = policy_pb2.Buffered(pushes=policy.pushes, samples=policy.samples, staleness=stale)
            message.buffered.CopyFrom(buffered)
    return message


def decode_policy(message: policy_pb2.Policy) -> Policy:
    """A policy from its message; raises InvalidPolicy."""
    match message.WhichOneof("kind"):
        case "sync":
            return _decode_sync(message.sync)
        case "bounded_staleness":
            bounded = message.bounded_staleness
            return BoundedStaleness(bounded.bound, seconds_of(bounded.deadline), _decode_staleness(bounded.staleness))
        case "buffered":
            buffered = message.buffered
            pushes = buffered.pushes if buffered.HasField("pushes") else None
            samples = buffered.samples if buffered.HasField("samples") else None
            return Buffered(pushes, samples, _decode_staleness(buffered.staleness))
        case _:
            return Async(_decode_staleness(getattr(message, "async").staleness))


def _encode_sync(policy: Sync, stale: policy_pb2.Staleness | None) -> policy_pb2.Sync:
    message = policy_pb2.Sync(
        workers=policy.workers or 0,
        quorum=policy.quorum or 0,
        late=policy_pb2.LATE_CARRY if policy.late is Late.CARRY else policy_pb2.LATE_DISCARD,
        deterministic=policy.deterministic,
        staleness=stale,
    )
    set_seconds(message.deadline, policy.deadline)
    set_seconds(message.grace, policy.grace)
    match policy.aggregation:
        case Median():
            message.aggregation.median.SetInParent()
        case TrimmedMean(trimmed):
            message.aggregation.trimmed_mean = trimmed
        case Krum(byzantine, selected):
            message.aggregation.krum.CopyFrom(policy_pb2.Krum(byzantine=byzantine, selected=selected))
    if policy.quarantine is not None:
        message.quarantine.CopyFrom(policy_pb2.Quarantine(**asdict(policy.quarantine)))
    return message


def _decode_sync(message: policy_pb2.Sync) -> Sync:
    quarantine = message.quarantine
    if message.late not in policy_pb2.Late.values():
        raise InvalidPolicy(f"expected late to be LATE_DISCARD or LATE_CARRY; got {message.late}")
    return Sync(
        workers=message.workers or None,
        deadline=seconds_of(message.deadline),
        quorum=message.quorum or None,
        grace=seconds_of(message.grace),
        late=Late.CARRY if message.late == policy_pb2.LATE_CARRY else Late.DISCARD,
        deterministic=message.deterministic,
        staleness=_decode_staleness(message.staleness),
        aggregation=_decode_aggregation(message.aggregation) if message.HasField("aggregation") else None,
        quarantine=Quarantine(quarantine.factor, quarantine.strikes, quarantine.updates)
        if message.HasField("quarantine")
        else None,
    )


def _decode_aggregation(message: policy_pb2.Aggregation) -> Aggregation:
    match message.WhichOneof("kind"):
        case "median":
            return Median()
        case "trimmed_mean":
            return TrimmedMean(message.trimmed_mean)
        case "krum":
            return Krum(message.krum.byzantine, message.krum.selected)
        case _:
            raise InvalidPolicy(
                "expected a kind of aggregation: median, trimmed_mean or krum; got none that is known here"
            )


def _encode_staleness(choice: Staleness | None) -> policy_pb2.Staleness | None:
    match choice:
        case None:
            return None
        case Reject(bound):
            return policy_pb2.Staleness(reject_beyond=bound)
        case DivideLearningRate():
            return policy_pb2.Staleness(divide_learning_rate=policy_pb2.DivideLearningRate())
        case Polynomial(a):
            return policy_pb2.Staleness(polynomial=a)
        case DelayCompensation(scale):
            return policy_pb2.Staleness(delay_compensation=scale)
        case GapAware(decay):
            return policy_pb2.Staleness(gap_aware=decay)


def _decode_staleness(message: policy_pb2.Staleness) -> Staleness | None:
    match message.WhichOneof("kind"):
        case "reject_beyond":
            return Reject(message.reject_beyond)
        case "divide_learning_rate":
            return DivideLearningRate()
        case "polynomial":
            return Polynomial(message.polynomial)
        case "delay_compensation":
            return DelayCompensation(message.delay_compensation)
        case "gap_aware":
            return GapAware(message.gap_aware)
        case _:
            return None


def set_seconds(message: duration_pb2.Duration, seconds: float) -> None:
    """Let a duration be so many seconds."""
    message.FromNanoseconds(round(seconds * 1e9))


def seconds_of(message: duration_pb2.Duration) -> float:
    """A duration in seconds."""
    return message.ToNanoseconds() / 1e9
