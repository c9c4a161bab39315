from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Value(_message.Message):
    __slots__ = ("number", "integer", "boolean", "text", "list", "null", "schedule")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    NULL_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    number: float
    integer: int
    boolean: bool
    text: str
    list: ValueList
    null: _struct_pb2.NullValue
    schedule: Schedule
    def __init__(self, number: _Optional[float] = ..., integer: _Optional[int] = ..., boolean: bool = ..., text: _Optional[str] = ..., list: _Optional[_Union[ValueList, _Mapping]] = ..., null: _Optional[_Union[_struct_pb2.NullValue, str]] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("name", "arguments")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    arguments: _containers.MessageMap[str, Value]
    def __init__(self, name: _Optional[str] = ..., arguments: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class ValueList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("rule", "hyperparameters")
    class HyperparametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    RULE_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    rule: str
    hyperparameters: _containers.MessageMap[str, Value]
    def __init__(self, rule: _Optional[str] = ..., hyperparameters: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "tensors", "hyperparameters")
    class HyperparametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: _containers.RepeatedScalarFieldContainer[str]
    hyperparameters: _containers.MessageMap[str, Value]
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[_Iterable[str]] = ..., hyperparameters: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class GroupHyperparameters(_message.Message):
    __slots__ = ("group", "hyperparameters")
    class HyperparametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    group: str
    hyperparameters: _containers.MessageMap[str, Value]
    def __init__(self, group: _Optional[str] = ..., hyperparameters: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("version", "group", "hyperparameters")
    class HyperparametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    group: str
    hyperparameters: _containers.MessageMap[str, Value]
    def __init__(self, version: _Optional[int] = ..., group: _Optional[str] = ..., hyperparameters: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class RuleDescription(_message.Message):
    __slots__ = ("rule", "summary", "documentation", "hyperparameters", "slots")
    RULE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTATION_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    rule: str
    summary: str
    documentation: str
    hyperparameters: _containers.RepeatedCompositeFieldContainer[HyperparameterDescription]
    slots: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rule: _Optional[str] = ..., summary: _Optional[str] = ..., documentation: _Optional[str] = ..., hyperparameters: _Optional[_Iterable[_Union[HyperparameterDescription, _Mapping]]] = ..., slots: _Optional[_Iterable[str]] = ...) -> None: ...

class HyperparameterDescription(_message.Message):
    __slots__ = ("name", "default_value", "documentation", "live")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_VALUE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTATION_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    default_value: Value
    documentation: str
    live: bool
    def __init__(self, name: _Optional[str] = ..., default_value: _Optional[_Union[Value, _Mapping]] = ..., documentation: _Optional[str] = ..., live: bool = ...) -> None: ...
