from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class State(_message.Message):
    __slots__ = ("version", "steps", "memory", "group_memory", "parts", "accumulated", "skipped", "samples", "divisor")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    GROUP_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DIVISOR_FIELD_NUMBER: _ClassVar[int]
    version: int
    steps: _containers.RepeatedScalarFieldContainer[int]
    memory: _containers.RepeatedCompositeFieldContainer[TensorMemory]
    group_memory: _containers.RepeatedCompositeFieldContainer[GroupMemory]
    parts: _containers.RepeatedCompositeFieldContainer[StatePart]
    accumulated: int
    skipped: int
    samples: float
    divisor: float
    def __init__(self, version: _Optional[int] = ..., steps: _Optional[_Iterable[int]] = ..., memory: _Optional[_Iterable[_Union[TensorMemory, _Mapping]]] = ..., group_memory: _Optional[_Iterable[_Union[GroupMemory, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[StatePart, _Mapping]]] = ..., accumulated: _Optional[int] = ..., skipped: _Optional[int] = ..., samples: _Optional[float] = ..., divisor: _Optional[float] = ...) -> None: ...

class TensorMemory(_message.Message):
    __slots__ = ("name", "tensors", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: _containers.RepeatedScalarFieldContainer[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[_Iterable[int]] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class GroupMemory(_message.Message):
    __slots__ = ("group", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    group: str
    values: _containers.ScalarMap[str, float]
    def __init__(self, group: _Optional[str] = ..., values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class StatePart(_message.Message):
    __slots__ = ("name", "tensors", "shapes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: _containers.RepeatedScalarFieldContainer[int]
    shapes: _containers.RepeatedCompositeFieldContainer[StateShape]
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[_Iterable[int]] = ..., shapes: _Optional[_Iterable[_Union[StateShape, _Mapping]]] = ...) -> None: ...

class StateShape(_message.Message):
    __slots__ = ("sizes",)
    SIZES_FIELD_NUMBER: _ClassVar[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sizes: _Optional[_Iterable[int]] = ...) -> None: ...
