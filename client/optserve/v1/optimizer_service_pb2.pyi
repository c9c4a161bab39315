from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import parameter_set_pb2 as _parameter_set_pb2
from optserve.v1 import policy_pb2 as _policy_pb2
from optserve.v1 import standby_pb2 as _standby_pb2
from optserve.v1 import state_pb2 as _state_pb2
from optserve.v1 import step_pb2 as _step_pb2
from optserve.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_RESTORING: _ClassVar[Phase]
    PHASE_SERVING: _ClassVar[Phase]
    PHASE_DRAINING: _ClassVar[Phase]
    PHASE_STANDBY: _ClassVar[Phase]
    PHASE_DEPOSED: _ClassVar[Phase]
    PHASE_LAPSED: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
PHASE_RESTORING: Phase
PHASE_SERVING: Phase
PHASE_DRAINING: Phase
PHASE_STANDBY: Phase
PHASE_DEPOSED: Phase
PHASE_LAPSED: Phase

class CreateParameterSetRequest(_message.Message):
    __slots__ = ("spec", "exist_ok", "chunk", "state")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    EXIST_OK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    spec: _parameter_set_pb2.ParameterSetSpec
    exist_ok: bool
    chunk: _tensor_pb2.Chunk
    state: _state_pb2.State
    def __init__(self, spec: _Optional[_Union[_parameter_set_pb2.ParameterSetSpec, _Mapping]] = ..., exist_ok: bool = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., state: _Optional[_Union[_state_pb2.State, _Mapping]] = ...) -> None: ...

class CreateParameterSetResponse(_message.Message):
    __slots__ = ("parameter_set", "created")
    PARAMETER_SET_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    parameter_set: _parameter_set_pb2.ParameterSet
    created: bool
    def __init__(self, parameter_set: _Optional[_Union[_parameter_set_pb2.ParameterSet, _Mapping]] = ..., created: bool = ...) -> None: ...

class GetParameterSetRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetParameterSetResponse(_message.Message):
    __slots__ = ("parameter_set",)
    PARAMETER_SET_FIELD_NUMBER: _ClassVar[int]
    parameter_set: _parameter_set_pb2.ParameterSet
    def __init__(self, parameter_set: _Optional[_Union[_parameter_set_pb2.ParameterSet, _Mapping]] = ...) -> None: ...

class ExportParameterSetRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ExportParameterSetResponse(_message.Message):
    __slots__ = ("spec", "groups", "state", "chunk")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    spec: _parameter_set_pb2.ParameterSetSpec
    groups: _containers.RepeatedCompositeFieldContainer[_parameter_set_pb2.GroupState]
    state: _state_pb2.State
    chunk: _tensor_pb2.Chunk
    def __init__(self, spec: _Optional[_Union[_parameter_set_pb2.ParameterSetSpec, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_parameter_set_pb2.GroupState, _Mapping]]] = ..., state: _Optional[_Union[_state_pb2.State, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class ListParameterSetsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListParameterSetsResponse(_message.Message):
    __slots__ = ("parameter_sets",)
    PARAMETER_SETS_FIELD_NUMBER: _ClassVar[int]
    parameter_sets: _containers.RepeatedCompositeFieldContainer[_parameter_set_pb2.ParameterSetSummary]
    def __init__(self, parameter_sets: _Optional[_Iterable[_Union[_parameter_set_pb2.ParameterSetSummary, _Mapping]]] = ...) -> None: ...

class UpdateParameterSetRequest(_message.Message):
    __slots__ = ("id", "hyperparameters", "policy")
    ID_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    id: str
    hyperparameters: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.GroupHyperparameters]
    policy: _policy_pb2.Policy
    def __init__(self, id: _Optional[str] = ..., hyperparameters: _Optional[_Iterable[_Union[_optimizer_pb2.GroupHyperparameters, _Mapping]]] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[_parameter_set_pb2.Worker]
    def __init__(self, workers: _Optional[_Iterable[_Union[_parameter_set_pb2.Worker, _Mapping]]] = ...) -> None: ...

class UpdateParameterSetResponse(_message.Message):
    __slots__ = ("parameter_set",)
    PARAMETER_SET_FIELD_NUMBER: _ClassVar[int]
    parameter_set: _parameter_set_pb2.ParameterSet
    def __init__(self, parameter_set: _Optional[_Union[_parameter_set_pb2.ParameterSet, _Mapping]] = ...) -> None: ...

class DeleteParameterSetRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteParameterSetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointParameterSetRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CheckpointParameterSetResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _parameter_set_pb2.Position
    def __init__(self, position: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ...) -> None: ...

class RewindParameterSetRequest(_message.Message):
    __slots__ = ("id", "version")
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    id: str
    version: int
    def __init__(self, id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RewindParameterSetResponse(_message.Message):
    __slots__ = ("position", "rewinds")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REWINDS_FIELD_NUMBER: _ClassVar[int]
    position: _parameter_set_pb2.Position
    rewinds: int
    def __init__(self, position: _Optional[_Union[_parameter_set_pb2.Position, _Mapping]] = ..., rewinds: _Optional[int] = ...) -> None: ...

class ForkParameterSetRequest(_message.Message):
    __slots__ = ("id", "new_id", "version", "optimizer")
    ID_FIELD_NUMBER: _ClassVar[int]
    NEW_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    id: str
    new_id: str
    version: int
    optimizer: _optimizer_pb2.Optimizer
    def __init__(self, id: _Optional[str] = ..., new_id: _Optional[str] = ..., version: _Optional[int] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ...) -> None: ...

class ForkParameterSetResponse(_message.Message):
    __slots__ = ("parameter_set",)
    PARAMETER_SET_FIELD_NUMBER: _ClassVar[int]
    parameter_set: _parameter_set_pb2.ParameterSet
    def __init__(self, parameter_set: _Optional[_Union[_parameter_set_pb2.ParameterSet, _Mapping]] = ...) -> None: ...

class GetServerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerStatusResponse(_message.Message):
    __slots__ = ("phase", "bytes_read", "bytes_total", "primary", "promotable", "standby", "lag")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    PROMOTABLE_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    bytes_read: int
    bytes_total: int
    primary: str
    promotable: bool
    standby: str
    lag: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., bytes_read: _Optional[int] = ..., bytes_total: _Optional[int] = ..., primary: _Optional[str] = ..., promotable: bool = ..., standby: _Optional[str] = ..., lag: _Optional[int] = ...) -> None: ...

class PromoteServerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PromoteServerResponse(_message.Message):
    __slots__ = ("promoted", "deposed")
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    DEPOSED_FIELD_NUMBER: _ClassVar[int]
    promoted: bool
    deposed: bool
    def __init__(self, promoted: bool = ..., deposed: bool = ...) -> None: ...

class ListRulesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRulesResponse(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.RuleDescription]
    def __init__(self, rules: _Optional[_Iterable[_Union[_optimizer_pb2.RuleDescription, _Mapping]]] = ...) -> None: ...
