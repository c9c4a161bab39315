from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Convention(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONVENTION_UNSPECIFIED: _ClassVar[Convention]
    CONVENTION_TORCH: _ClassVar[Convention]
    CONVENTION_OPTAX: _ClassVar[Convention]
    CONVENTION_KERAS: _ClassVar[Convention]
CONVENTION_UNSPECIFIED: Convention
CONVENTION_TORCH: Convention
CONVENTION_OPTAX: Convention
CONVENTION_KERAS: Convention

class Clip(_message.Message):
    __slots__ = ("global_norm", "norm", "value", "adaptive", "eps", "convention")
    GLOBAL_NORM_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    global_norm: float
    norm: float
    value: float
    adaptive: float
    eps: float
    convention: Convention
    def __init__(self, global_norm: _Optional[float] = ..., norm: _Optional[float] = ..., value: _Optional[float] = ..., adaptive: _Optional[float] = ..., eps: _Optional[float] = ..., convention: _Optional[_Union[Convention, str]] = ...) -> None: ...

class SkipNonFinite(_message.Message):
    __slots__ = ("at_most",)
    AT_MOST_FIELD_NUMBER: _ClassVar[int]
    at_most: int
    def __init__(self, at_most: _Optional[int] = ...) -> None: ...

class Average(_message.Message):
    __slots__ = ("ema_decay", "swa")
    EMA_DECAY_FIELD_NUMBER: _ClassVar[int]
    SWA_FIELD_NUMBER: _ClassVar[int]
    ema_decay: float
    swa: Swa
    def __init__(self, ema_decay: _Optional[float] = ..., swa: _Optional[_Union[Swa, _Mapping]] = ...) -> None: ...

class Swa(_message.Message):
    __slots__ = ("start", "every")
    START_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    start: int
    every: int
    def __init__(self, start: _Optional[int] = ..., every: _Optional[int] = ...) -> None: ...

class Lookahead(_message.Message):
    __slots__ = ("every", "alpha")
    EVERY_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    every: int
    alpha: float
    def __init__(self, every: _Optional[int] = ..., alpha: _Optional[float] = ...) -> None: ...

class Transforms(_message.Message):
    __slots__ = ("skip_nonfinite", "accumulate", "clip", "lookahead", "average")
    SKIP_NONFINITE_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATE_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    skip_nonfinite: SkipNonFinite
    accumulate: int
    clip: Clip
    lookahead: Lookahead
    average: Average
    def __init__(self, skip_nonfinite: _Optional[_Union[SkipNonFinite, _Mapping]] = ..., accumulate: _Optional[int] = ..., clip: _Optional[_Union[Clip, _Mapping]] = ..., lookahead: _Optional[_Union[Lookahead, _Mapping]] = ..., average: _Optional[_Union[Average, _Mapping]] = ...) -> None: ...
