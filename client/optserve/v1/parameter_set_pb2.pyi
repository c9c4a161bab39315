import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import policy_pb2 as _policy_pb2
from optserve.v1 import tensor_pb2 as _tensor_pb2
from optserve.v1 import transforms_pb2 as _transforms_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Holds(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOLDS_UNSPECIFIED: _ClassVar[Holds]
    HOLDS_PARAMETERS: _ClassVar[Holds]
    HOLDS_MOMENTS: _ClassVar[Holds]

class StateFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_FORMAT_UNSPECIFIED: _ClassVar[StateFormat]
    STATE_FORMAT_FULL: _ClassVar[StateFormat]
    STATE_FORMAT_BFLOAT16: _ClassVar[StateFormat]
    STATE_FORMAT_INT8: _ClassVar[StateFormat]

class Pushes(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUSHES_UNSPECIFIED: _ClassVar[Pushes]
    PUSHES_GRADIENTS: _ClassVar[Pushes]
    PUSHES_DELTAS: _ClassVar[Pushes]
    PUSHES_PARAMETERS: _ClassVar[Pushes]

class Treatment(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TREATMENT_UNSPECIFIED: _ClassVar[Treatment]
    TREATMENT_AVERAGE: _ClassVar[Treatment]
    TREATMENT_REPLACE: _ClassVar[Treatment]
    TREATMENT_FREEZE: _ClassVar[Treatment]
    TREATMENT_OPTIMIZE: _ClassVar[Treatment]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_MEMORY: _ClassVar[Durability]
    DURABILITY_JOURNAL: _ClassVar[Durability]
    DURABILITY_CHECKPOINT: _ClassVar[Durability]

class Journal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOURNAL_UNSPECIFIED: _ClassVar[Journal]
    JOURNAL_OFF: _ClassVar[Journal]
    JOURNAL_EVERYSEC: _ClassVar[Journal]
    JOURNAL_ALWAYS: _ClassVar[Journal]
HOLDS_UNSPECIFIED: Holds
HOLDS_PARAMETERS: Holds
HOLDS_MOMENTS: Holds
STATE_FORMAT_UNSPECIFIED: StateFormat
STATE_FORMAT_FULL: StateFormat
STATE_FORMAT_BFLOAT16: StateFormat
STATE_FORMAT_INT8: StateFormat
PUSHES_UNSPECIFIED: Pushes
PUSHES_GRADIENTS: Pushes
PUSHES_DELTAS: Pushes
PUSHES_PARAMETERS: Pushes
TREATMENT_UNSPECIFIED: Treatment
TREATMENT_AVERAGE: Treatment
TREATMENT_REPLACE: Treatment
TREATMENT_FREEZE: Treatment
TREATMENT_OPTIMIZE: Treatment
DURABILITY_UNSPECIFIED: Durability
DURABILITY_MEMORY: Durability
DURABILITY_JOURNAL: Durability
DURABILITY_CHECKPOINT: Durability
JOURNAL_UNSPECIFIED: Journal
JOURNAL_OFF: Journal
JOURNAL_EVERYSEC: Journal
JOURNAL_ALWAYS: Journal

class Position(_message.Message):
    __slots__ = ("incarnation", "version", "durable_version")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    version: int
    durable_version: int
    def __init__(self, incarnation: _Optional[int] = ..., version: _Optional[int] = ..., durable_version: _Optional[int] = ...) -> None: ...

class Initial(_message.Message):
    __slots__ = ("constant", "uniform", "normal")
    CONSTANT_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_FIELD_NUMBER: _ClassVar[int]
    NORMAL_FIELD_NUMBER: _ClassVar[int]
    constant: float
    uniform: Uniform
    normal: Normal
    def __init__(self, constant: _Optional[float] = ..., uniform: _Optional[_Union[Uniform, _Mapping]] = ..., normal: _Optional[_Union[Normal, _Mapping]] = ...) -> None: ...

class Uniform(_message.Message):
    __slots__ = ("low", "high", "seed")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    low: float
    high: float
    seed: int
    def __init__(self, low: _Optional[float] = ..., high: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Normal(_message.Message):
    __slots__ = ("std", "seed")
    STD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    std: float
    seed: int
    def __init__(self, std: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class ParameterSetSpec(_message.Message):
    __slots__ = ("id", "tensors", "optimizer", "groups", "holds", "unguarded", "policy", "transforms", "state", "tables", "journal", "pushes", "buffers")
    class TablesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Initial
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Initial, _Mapping]] = ...) -> None: ...
    class BuffersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Treatment
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Treatment, str]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    UNGUARDED_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    id: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    optimizer: _optimizer_pb2.Optimizer
    groups: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.Group]
    holds: Holds
    unguarded: bool
    policy: _policy_pb2.Policy
    transforms: _transforms_pb2.Transforms
    state: StateFormat
    tables: _containers.MessageMap[str, Initial]
    journal: Journal
    pushes: Pushes
    buffers: _containers.ScalarMap[str, Treatment]
    def __init__(self, id: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_optimizer_pb2.Group, _Mapping]]] = ..., holds: _Optional[_Union[Holds, str]] = ..., unguarded: bool = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., transforms: _Optional[_Union[_transforms_pb2.Transforms, _Mapping]] = ..., state: _Optional[_Union[StateFormat, str]] = ..., tables: _Optional[_Mapping[str, Initial]] = ..., journal: _Optional[_Union[Journal, str]] = ..., pushes: _Optional[_Union[Pushes, str]] = ..., buffers: _Optional[_Mapping[str, Treatment]] = ...) -> None: ...

class ParameterSetSummary(_message.Message):
    __slots__ = ("id", "rule", "holds", "position", "tensor_count", "element_count", "state_bytes", "create_time", "journal")
    ID_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    rule: str
    holds: Holds
    position: Position
    tensor_count: int
    element_count: int
    state_bytes: int
    create_time: _timestamp_pb2.Timestamp
    journal: Journal
    def __init__(self, id: _Optional[str] = ..., rule: _Optional[str] = ..., holds: _Optional[_Union[Holds, str]] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., tensor_count: _Optional[int] = ..., element_count: _Optional[int] = ..., state_bytes: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., journal: _Optional[_Union[Journal, str]] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("name", "tensors", "optimizer", "schedules")
    class SchedulesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _optimizer_pb2.Schedule
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_optimizer_pb2.Schedule, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: _containers.RepeatedScalarFieldContainer[str]
    optimizer: _optimizer_pb2.Optimizer
    schedules: _containers.MessageMap[str, _optimizer_pb2.Schedule]
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[_Iterable[str]] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., schedules: _Optional[_Mapping[str, _optimizer_pb2.Schedule]] = ...) -> None: ...

class ParameterSet(_message.Message):
    __slots__ = ("spec", "position", "groups", "create_time", "state_bytes", "element_count", "changes", "policy", "staleness")
    class StalenessEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    SPEC_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    spec: ParameterSetSpec
    position: Position
    groups: _containers.RepeatedCompositeFieldContainer[GroupState]
    create_time: _timestamp_pb2.Timestamp
    state_bytes: int
    element_count: int
    changes: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.Change]
    policy: _policy_pb2.Policy
    staleness: _containers.ScalarMap[int, int]
    def __init__(self, spec: _Optional[_Union[ParameterSetSpec, _Mapping]] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[GroupState, _Mapping]]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state_bytes: _Optional[int] = ..., element_count: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[_optimizer_pb2.Change, _Mapping]]] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., staleness: _Optional[_Mapping[int, int]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("client_id", "join_time", "idle", "pushes", "staleness", "waiting", "quarantined")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    JOIN_TIME_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    join_time: _timestamp_pb2.Timestamp
    idle: _duration_pb2.Duration
    pushes: int
    staleness: int
    waiting: bool
    quarantined: bool
    def __init__(self, client_id: _Optional[str] = ..., join_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., idle: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., pushes: _Optional[int] = ..., staleness: _Optional[int] = ..., waiting: bool = ..., quarantined: bool = ...) -> None: ...
