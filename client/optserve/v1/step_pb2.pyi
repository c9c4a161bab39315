import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import parameter_set_pb2 as _parameter_set_pb2
from optserve.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_GRADIENT: _ClassVar[Role]
    ROLE_PARAMETER: _ClassVar[Role]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_APPLIED: _ClassVar[Outcome]
    OUTCOME_ACCUMULATED: _ClassVar[Outcome]
    OUTCOME_SKIPPED: _ClassVar[Outcome]
    OUTCOME_REFUSED: _ClassVar[Outcome]
    OUTCOME_DISCARDED: _ClassVar[Outcome]
ROLE_UNSPECIFIED: Role
ROLE_GRADIENT: Role
ROLE_PARAMETER: Role
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_APPLIED: Outcome
OUTCOME_ACCUMULATED: Outcome
OUTCOME_SKIPPED: Outcome
OUTCOME_REFUSED: Outcome
OUTCOME_DISCARDED: Outcome

class StepRequest(_message.Message):
    __slots__ = ("open", "push", "chunk", "commit", "pull", "release", "barrier", "leave", "heartbeat")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    push: Push
    chunk: _tensor_pb2.Chunk
    commit: bool
    pull: Pull
    release: bool
    barrier: int
    leave: bool
    heartbeat: bool
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., push: _Optional[_Union[Push, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., commit: bool = ..., pull: _Optional[_Union[Pull, _Mapping]] = ..., release: bool = ..., barrier: _Optional[int] = ..., leave: bool = ..., heartbeat: bool = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("opened", "receipt", "parameters", "chunk", "end", "barriers", "left")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BARRIERS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    receipt: Receipt
    parameters: Parameters
    chunk: _tensor_pb2.Chunk
    end: bool
    barriers: int
    left: bool
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., parameters: _Optional[_Union[Parameters, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., end: bool = ..., barriers: _Optional[int] = ..., left: bool = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("parameter_set_id", "client_id", "epoch", "shared_memory", "join")
    PARAMETER_SET_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    parameter_set_id: str
    client_id: str
    epoch: int
    shared_memory: bool
    join: bool
    def __init__(self, parameter_set_id: _Optional[str] = ..., client_id: _Optional[str] = ..., epoch: _Optional[int] = ..., shared_memory: bool = ..., join: bool = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("socket", "token", "gradient_segment", "gradient_offsets", "parameter_offsets")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    socket: str
    token: bytes
    gradient_segment: int
    gradient_offsets: _containers.RepeatedScalarFieldContainer[int]
    parameter_offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, socket: _Optional[str] = ..., token: _Optional[bytes] = ..., gradient_segment: _Optional[int] = ..., gradient_offsets: _Optional[_Iterable[int]] = ..., parameter_offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("epoch", "last_sequence", "last_receipt", "position", "tensors", "shared_memory", "durable_sequence", "rewinds", "lease", "barriers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAST_RECEIPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    DURABLE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REWINDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BARRIERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    last_sequence: int
    last_receipt: Receipt
    position: _parameter_set_pb2.Position
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    shared_memory: SharedMemory
    durable_sequence: int
    rewinds: int
    lease: _duration_pb2.Duration
    barriers: int
    def __init__(self, epoch: _Optional[int] = ..., last_sequence: _Optional[int] = ..., last_receipt: _Optional[_Union[Receipt, _Mapping]] = ..., position: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., durable_sequence: _Optional[int] = ..., rewinds: _Optional[int] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., barriers: _Optional[int] = ...) -> None: ...

class PushedTensor(_message.Message):
    __slots__ = ("spec", "role", "encoding", "fraction", "rows")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    spec: _tensor_pb2.TensorSpec
    role: Role
    encoding: _tensor_pb2.Encoding
    fraction: float
    rows: bytes
    def __init__(self, spec: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., role: _Optional[_Union[Role, str]] = ..., encoding: _Optional[_Union[_tensor_pb2.Encoding, str]] = ..., fraction: _Optional[float] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("sequence", "base", "tensors", "hyperparameters", "loss_scale", "samples")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    base: _parameter_set_pb2.Position
    tensors: _containers.RepeatedCompositeFieldContainer[PushedTensor]
    hyperparameters: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.GroupHyperparameters]
    loss_scale: float
    samples: float
    def __init__(self, sequence: _Optional[int] = ..., base: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[PushedTensor, _Mapping]]] = ..., hyperparameters: _Optional[_Iterable[_Union[_optimizer_pb2.GroupHyperparameters, _Mapping]]] = ..., loss_scale: _Optional[float] = ..., samples: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("sequence", "position", "outcome", "duplicate", "staleness", "gradient_norm", "learning_rates", "durability", "refusal", "durable_sequence")
    class LearningRatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATES_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    DURABLE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    position: _parameter_set_pb2.Position
    outcome: Outcome
    duplicate: bool
    staleness: int
    gradient_norm: float
    learning_rates: _containers.ScalarMap[str, float]
    durability: _parameter_set_pb2.Durability
    refusal: Refusal
    durable_sequence: int
    def __init__(self, sequence: _Optional[int] = ..., position: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., duplicate: bool = ..., staleness: _Optional[int] = ..., gradient_norm: _Optional[float] = ..., learning_rates: _Optional[_Mapping[str, float]] = ..., durability: _Optional[_Union[_parameter_set_pb2.Durability, str]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., durable_sequence: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("tensor", "rows")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    rows: bytes
    def __init__(self, tensor: _Optional[str] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Pull(_message.Message):
    __slots__ = ("newer_than", "tensors", "dtype", "in_shared_memory", "evaluation", "rows")
    NEWER_THAN_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    IN_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    newer_than: _parameter_set_pb2.Position
    tensors: _containers.RepeatedScalarFieldContainer[str]
    dtype: _tensor_pb2.DType
    in_shared_memory: bool
    evaluation: bool
    rows: _containers.RepeatedCompositeFieldContainer[Rows]
    def __init__(self, newer_than: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ..., tensors: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., in_shared_memory: bool = ..., evaluation: bool = ..., rows: _Optional[_Iterable[_Union[Rows, _Mapping]]] = ...) -> None: ...

class Parameters(_message.Message):
    __slots__ = ("position", "unchanged", "tensors", "segment", "tables")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    position: _parameter_set_pb2.Position
    unchanged: bool
    tensors: _containers.RepeatedScalarFieldContainer[int]
    segment: int
    tables: _containers.RepeatedCompositeFieldContainer[TableRows]
    def __init__(self, position: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ..., unchanged: bool = ..., tensors: _Optional[_Iterable[int]] = ..., segment: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableRows, _Mapping]]] = ...) -> None: ...

class TableRows(_message.Message):
    __slots__ = ("tensor", "count")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    count: int
    def __init__(self, tensor: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...
