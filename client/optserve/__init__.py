"""optserve: the optimizer step as a service. This package is the SDK; `optserve_server` is the server."""

from optserve import formats, optim
from optserve._allocator import keep_freed_memory
from optserve._client import Client
from optserve._errors import (
    ClientClosed,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    InvalidChunk,
    InvalidFormat,
    InvalidGroup,
    InvalidHyperparameter,
    InvalidName,
    InvalidTensor,
    MessageOrder,
    NoDataDirectory,
    NonFiniteValue,
    NoSharedMemory,
    OptserveError,
    OutcomeUnknown,
    ParameterSetExists,
    ParameterSetNotFound,
    Refusal,
    RolledBack,
    SequenceGap,
    SequenceReused,
    ServerBusy,
    ServerDraining,
    ServerError,
    ServerUnavailable,
    SessionSuperseded,
    SpecificationMismatch,
    TensorMismatch,
    UnknownRule,
)
from optserve._parameter_set import ParameterSet
from optserve._results import Description, Durability, GroupDescription, Parameters, Position, Receipt, Summary
from optserve._specification import Holds, ParameterSetSpec, TensorSpec

__all__ = [
    "Client",
    "ClientClosed",
    "DeadlineExceeded",
    "Description",
    "Durability",
    "FailedPrecondition",
    "GroupDescription",
    "Holds",
    "InvalidArgument",
    "InvalidChunk",
    "InvalidFormat",
    "InvalidGroup",
    "InvalidHyperparameter",
    "InvalidName",
    "InvalidTensor",
    "MessageOrder",
    "NoDataDirectory",
    "NoSharedMemory",
    "NonFiniteValue",
    "OptserveError",
    "OutcomeUnknown",
    "ParameterSet",
    "ParameterSetExists",
    "ParameterSetNotFound",
    "ParameterSetSpec",
    "Parameters",
    "Position",
    "Receipt",
    "Refusal",
    "RolledBack",
    "SequenceGap",
    "SequenceReused",
    "ServerBusy",
    "ServerDraining",
    "ServerError",
    "ServerUnavailable",
    "SessionSuperseded",
    "SpecificationMismatch",
    "Summary",
    "TensorMismatch",
    "TensorSpec",
    "UnknownRule",
    "formats",
    "keep_freed_memory",
    "optim",
]

for _name in __all__:
    if isinstance(_public := globals()[_name], type):
        _public.__module__ = "optserve"  # tracebacks and reprs show the public name
del _name, _public
