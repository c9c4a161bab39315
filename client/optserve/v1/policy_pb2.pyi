import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Late(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LATE_UNSPECIFIED: _ClassVar[Late]
    LATE_DISCARD: _ClassVar[Late]
    LATE_CARRY: _ClassVar[Late]
LATE_UNSPECIFIED: Late
LATE_DISCARD: Late
LATE_CARRY: Late

class Staleness(_message.Message):
    __slots__ = ("reject_beyond", "divide_learning_rate", "polynomial", "delay_compensation", "gap_aware")
    REJECT_BEYOND_FIELD_NUMBER: _ClassVar[int]
    DIVIDE_LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    POLYNOMIAL_FIELD_NUMBER: _ClassVar[int]
    DELAY_COMPENSATION_FIELD_NUMBER: _ClassVar[int]
    GAP_AWARE_FIELD_NUMBER: _ClassVar[int]
    reject_beyond: int
    divide_learning_rate: DivideLearningRate
    polynomial: float
    delay_compensation: float
    gap_aware: float
    def __init__(self, reject_beyond: _Optional[int] = ..., divide_learning_rate: _Optional[_Union[DivideLearningRate, _Mapping]] = ..., polynomial: _Optional[float] = ..., delay_compensation: _Optional[float] = ..., gap_aware: _Optional[float] = ...) -> None: ...

class DivideLearningRate(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Async(_message.Message):
    __slots__ = ("staleness",)
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    staleness: Staleness
    def __init__(self, staleness: _Optional[_Union[Staleness, _Mapping]] = ...) -> None: ...

class Sync(_message.Message):
    __slots__ = ("workers", "deadline", "quorum", "grace", "late", "deterministic", "staleness", "aggregation", "quarantine")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    workers: int
    deadline: _duration_pb2.Duration
    quorum: int
    grace: _duration_pb2.Duration
    late: Late
    deterministic: bool
    staleness: Staleness
    aggregation: Aggregation
    quarantine: Quarantine
    def __init__(self, workers: _Optional[int] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., quorum: _Optional[int] = ..., grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., late: _Optional[_Union[Late, str]] = ..., deterministic: bool = ..., staleness: _Optional[_Union[Staleness, _Mapping]] = ..., aggregation: _Optional[_Union[Aggregation, _Mapping]] = ..., quarantine: _Optional[_Union[Quarantine, _Mapping]] = ...) -> None: ...

class Aggregation(_message.Message):
    __slots__ = ("median", "trimmed_mean", "krum")
    MEDIAN_FIELD_NUMBER: _ClassVar[int]
    TRIMMED_MEAN_FIELD_NUMBER: _ClassVar[int]
    KRUM_FIELD_NUMBER: _ClassVar[int]
    median: Median
    trimmed_mean: int
    krum: Krum
    def __init__(self, median: _Optional[_Union[Median, _Mapping]] = ..., trimmed_mean: _Optional[int] = ..., krum: _Optional[_Union[Krum, _Mapping]] = ...) -> None: ...

class Median(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Krum(_message.Message):
    __slots__ = ("byzantine", "selected")
    BYZANTINE_FIELD_NUMBER: _ClassVar[int]
    SELECTED_FIELD_NUMBER: _ClassVar[int]
    byzantine: int
    selected: int
    def __init__(self, byzantine: _Optional[int] = ..., selected: _Optional[int] = ...) -> None: ...

class Quarantine(_message.Message):
    __slots__ = ("factor", "strikes", "updates")
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    STRIKES_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    factor: float
    strikes: int
    updates: int
    def __init__(self, factor: _Optional[float] = ..., strikes: _Optional[int] = ..., updates: _Optional[int] = ...) -> None: ...

class BoundedStaleness(_message.Message):
    __slots__ = ("bound", "deadline", "staleness")
    BOUND_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    bound: int
    deadline: _duration_pb2.Duration
    staleness: Staleness
    def __init__(self, bound: _Optional[int] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., staleness: _Optional[_Union[Staleness, _Mapping]] = ...) -> None: ...

class Buffered(_message.Message):
    __slots__ = ("pushes", "samples", "staleness")
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    pushes: int
    samples: float
    staleness: Staleness
    def __init__(self, pushes: _Optional[int] = ..., samples: _Optional[float] = ..., staleness: _Optional[_Union[Staleness, _Mapping]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("sync", "bounded_staleness", "buffered")
    ASYNC_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    BOUNDED_STALENESS_FIELD_NUMBER: _ClassVar[int]
    BUFFERED_FIELD_NUMBER: _ClassVar[int]
    sync: Sync
    bounded_staleness: BoundedStaleness
    buffered: Buffered
    def __init__(self, sync: _Optional[_Union[Sync, _Mapping]] = ..., bounded_staleness: _Optional[_Union[BoundedStaleness, _Mapping]] = ..., buffered: _Optional[_Union[Buffered, _Mapping]] = ..., **kwargs) -> None: ...
