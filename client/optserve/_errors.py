"""Everything that can go wrong, as one tree shared by the server and the SDK.

OptserveError
├── InvalidArgument                the request can never succeed as it is
│   ├── InvalidName                an id, or the name of a tensor, group or client
│   ├── InvalidTensor              a tensor's dtype, shape or initial values
│   ├── InvalidGroup               a group of tensors
│   ├── UnknownRule                no such optimizer
│   ├── InvalidRule                a rule of one's own that can't be used
│   ├── InvalidFormat              a wire format that does not exist, or does not fit
│   ├── InvalidPolicy              a policy that does not exist, or that the server has no room for
│   ├── InvalidTransform           a transform that does not exist, or that the set could never have
│   ├── InvalidState               a state that the set could never be in
│   ├── InvalidHyperparameter      unknown, of the wrong type, out of range, or fixed for life
│   ├── TensorMismatch             a push or pull names what the set does not have
│   ├── InvalidChunk               bytes that are truncated, overlap, or miss their tensor
│   ├── NonFiniteValue             NaN or infinity
│   └── SequenceReused             one identity, two different gradients
├── ParameterSetNotFound
├── ParameterSetExists
├── FailedPrecondition             the request came at the wrong moment
│   ├── SpecificationMismatch      the set exists and is a different one
│   ├── SequenceGap                pushes are missing before this one
│   ├── MessageOrder               a stream's messages came in an illegal order
│   ├── NoDataDirectory            stable storage was asked of a server that has none
│   ├── VersionNotKept             a version that can't be brought back
│   ├── TooStale                   a gradient of parameters from too long ago
│   ├── WorkerQuarantined          a gradient, or a worker, that is not trusted
│   └── NoSharedMemory             shared memory was asked of a server that can't be reached so
├── SessionSuperseded              a newer stream of the same client took over
├── ServerBusy                     try again later; the SDK does
│   └── RoundIncomplete            too few workers pushed in time for a synchronous update
├── ServerUnavailable              no connection; the SDK tries again
│   ├── ServerDraining             the server is about to stop and took nothing in; the SDK tries again
│   ├── HistoryChanged             the set was rewound just now; the SDK connects to it again
│   └── StorageFailed              the server's disk refused; nothing is acknowledged that is not there
├── RolledBack                     the set stands at an older state than its worker knew
├── OutcomeUnknown                 a push was sent, its receipt never came
├── DeadlineExceeded
├── ClientClosed
└── ServerError                    the server failed; its log says why
"""

from dataclasses import dataclass
from typing import ClassVar, Self

LONGEST_MESSAGE = 1500  # bytes; status messages travel percent-encoded, up to three for one, in metadata of 8 KB

# Numbers of the gRPC status codes (https://grpc.io/docs/guides/status-codes), for refusals inside of messages.
STATUS_NUMBERS = {
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
}


class OptserveError(Exception):
    """Base of all errors that optserve raises on purpose."""

    code: ClassVar[str] = "INTERNAL"  # name of the gRPC status code
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(message))

    @classmethod
    def reason(cls) -> str:
        """Stable name for programs in any language: `TensorMismatch` is `TENSOR_MISMATCH`."""
        return "".join(f"_{letter}" if letter.isupper() else letter for letter in cls.__name__)[1:].upper()


class InvalidArgument(OptserveError, ValueError):
    """The request can never succeed as it is; nothing changed."""

    code = "INVALID_ARGUMENT"


class InvalidName(InvalidArgument):
    """An id, or the name of a tensor, group or client, is ill-formed."""


class InvalidTensor(InvalidArgument):
    """A tensor's dtype, shape or initial values can't be used."""


class InvalidGroup(InvalidArgument):
    """A group of tensors is ill-formed, unknown, or claims nothing."""


class UnknownRule(InvalidArgument, AttributeError):
    """There is no optimizer of that name."""


class InvalidRule(InvalidArgument):
    """A rule of one's own can't be used as it is: its file, its name, or its function."""


class InvalidFormat(InvalidArgument):
    """A wire format is ill-formed, or does not fit where it was asked for."""


class InvalidPolicy(InvalidArgument):
    """A policy is ill-formed, or one that this server could never follow."""


class InvalidTransform(InvalidArgument):
    """A transform is ill-formed, or one that this set could never have."""


class InvalidState(InvalidArgument):
    """A state is ill-formed, or one that a set of its specification could never be in."""


class InvalidHyperparameter(InvalidArgument):
    """A hyperparameter is unknown, of the wrong type, out of range, or fixed for the life of its set."""


class TensorMismatch(InvalidArgument):
    """Names, shapes or dtypes differ from those that the set was created with."""


class InvalidChunk(InvalidArgument):
    """Tensor bytes are truncated, overlap, lie outside their tensor, or are incomplete."""


class NonFiniteValue(InvalidArgument):
    """A gradient or an initial value is NaN or infinite; the push was refused whole and its sequence is consumed."""


class SequenceReused(InvalidArgument):
    """A push came again under the same identity with other gradients."""


class ParameterSetNotFound(OptserveError, LookupError):
    """No parameter set has that id."""

    code = "NOT_FOUND"


class ParameterSetExists(OptserveError):
    """A parameter set of that id exists already."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(OptserveError):
    """The request is well-formed but came at the wrong moment; nothing changed."""

    code = "FAILED_PRECONDITION"


class SpecificationMismatch(FailedPrecondition):
    """The parameter set exists and was created from a different specification."""


class SequenceGap(FailedPrecondition):
    """Pushes are missing before this one."""


class MessageOrder(FailedPrecondition):
    """The messages of a stream came in an illegal order."""


class NoDataDirectory(FailedPrecondition):
    """Stable storage was asked of a server that runs without a data directory."""


class VersionNotKept(FailedPrecondition):
    """A version of a set was asked for that neither checkpoints nor journal lead to."""


class TooStale(FailedPrecondition):
    """A push was discarded since its parameters are from before the last round, or from too many updates ago."""


class WorkerQuarantined(FailedPrecondition):
    """A push was discarded since it is far larger than others, or comes from a worker whose were."""


class NoSharedMemory(FailedPrecondition):
    """Shared memory was asked for, but the server is on another host, belongs to another user, or has none left."""


class SessionSuperseded(OptserveError):
    """A newer stream of the same client took the session over; use one handle per worker."""

    code = "ABORTED"


class ServerBusy(OptserveError):
    """The server has no room for this now; the same request may succeed after `retry_after` seconds."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True
    retry_after: ClassVar[float] = 0.1


class RoundIncomplete(ServerBusy):
    """Too few workers pushed before the deadline of a synchronous update; nothing was applied, nobody's push is consumed."""


class ServerUnavailable(OptserveError, ConnectionError):
    """The server can't be reached, or the connection broke; the same request may succeed later."""

    code = "UNAVAILABLE"
    retryable = True


class ServerDraining(ServerUnavailable):
    """The server is about to stop and took nothing of this in; the same request may succeed once it is back."""


class HistoryChanged(ServerUnavailable):
    """The set was rewound, and this stream was of what it was before; the SDK opens another, and then raises RolledBack."""


class StorageFailed(ServerUnavailable):
    """The server could not write to its disk and acknowledges nothing that is not there; the SDK tries again."""


class RolledBack(OptserveError):
    """The set stands at an older state than this handle knew: updates that it had seen, or its own pushes, are gone.

    The server came back from an older state, or somebody rewound the set. `to` is the version that it stands at, None if that
    is not known. The handle goes on from there; decide whether to repeat what was lost.
    """

    code = "DATA_LOSS"

    def __init__(self, message: str, to: int | None = None) -> None:
        super().__init__(message)
        self.to = to


class OutcomeUnknown(OptserveError):
    """A push was sent and its receipt did not come in time.

    `ParameterSet.settle` finds out whether it was applied; to push the same gradients again without asking may apply them
    twice.
    """

    code = "UNKNOWN"


class DeadlineExceeded(OptserveError, TimeoutError):
    """A call took longer than its timeout; creations and deletions may have happened all the same."""

    code = "DEADLINE_EXCEEDED"


class ClientClosed(OptserveError):
    """The client was closed before this call."""

    code = "CANCELLED"


class ServerError(OptserveError):
    """The server failed in a way that it did not expect; its log has the details."""


def _shortened(message: str) -> str:
    data = message.encode(errors="replace")
    return message if len(data) <= LONGEST_MESSAGE else f"{data[:LONGEST_MESSAGE].decode(errors='ignore')} ..."


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as a value that can be kept and sent: its code's name, reason and message."""

    code: str
    reason: str
    message: str

    @classmethod
    def of(cls, error: OptserveError) -> Self:
        """The error without its traceback, which would keep everything alive that was on the stack."""
        return cls(error.code, error.reason(), str(error))

    def error(self) -> OptserveError:
        """A new exception that says the same."""
        return error_from(self.code, self.reason, self.message)


def _tree(root: type[OptserveError]) -> list[type[OptserveError]]:
    return [root, *(error for child in root.__subclasses__() for error in _tree(child))]


def error_from(code: str, reason: str | None, message: str) -> OptserveError:
    """The error that a status code name, a reason and a message stand for; unknown reasons fall back on the code."""
    errors = _tree(OptserveError)
    by_reason = {error.reason(): error for error in errors}
    by_code = {error.code: error for error in reversed(errors) if error is not OptserveError}
    return by_reason.get(reason or "", by_code.get(code, ServerError))(message)
