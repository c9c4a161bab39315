from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FollowRequest(_message.Message):
    __slots__ = ("hello", "progress", "echo", "deposition", "resignation")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    DEPOSITION_FIELD_NUMBER: _ClassVar[int]
    RESIGNATION_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    progress: Progress
    echo: int
    deposition: Deposition
    resignation: Resignation
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., echo: _Optional[int] = ..., deposition: _Optional[_Union[Deposition, _Mapping]] = ..., resignation: _Optional[_Union[Resignation, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("standby", "address", "primary_incarnation", "parameter_sets", "promote_after", "promoted")
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SETS_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_AFTER_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    standby: str
    address: str
    primary_incarnation: int
    parameter_sets: _containers.RepeatedCompositeFieldContainer[FollowedSet]
    promote_after: float
    promoted: bool
    def __init__(self, standby: _Optional[str] = ..., address: _Optional[str] = ..., primary_incarnation: _Optional[int] = ..., parameter_sets: _Optional[_Iterable[_Union[FollowedSet, _Mapping]]] = ..., promote_after: _Optional[float] = ..., promoted: bool = ...) -> None: ...

class FollowedSet(_message.Message):
    __slots__ = ("id", "incarnation", "event")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    event: int
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., event: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("taken", "confirmed", "complete")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    taken: int
    confirmed: _containers.RepeatedCompositeFieldContainer[FollowedSet]
    complete: bool
    def __init__(self, taken: _Optional[int] = ..., confirmed: _Optional[_Iterable[_Union[FollowedSet, _Mapping]]] = ..., complete: bool = ...) -> None: ...

class Deposition(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resignation(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("parameter_set_id", "welcome", "checkpoint", "event", "deletion", "heartbeat", "deposed", "data")
    PARAMETER_SET_ID_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    DELETION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DEPOSED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    parameter_set_id: str
    welcome: Welcome
    checkpoint: CheckpointHeader
    event: EventHeader
    deletion: Deletion
    heartbeat: Heartbeat
    deposed: Deposed
    data: bytes
    def __init__(self, parameter_set_id: _Optional[str] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointHeader, _Mapping]] = ..., event: _Optional[_Union[EventHeader, _Mapping]] = ..., deletion: _Optional[_Union[Deletion, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., deposed: _Optional[_Union[Deposed, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("incarnation", "parameter_set_ids")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SET_IDS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    parameter_set_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, incarnation: _Optional[int] = ..., parameter_set_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckpointHeader(_message.Message):
    __slots__ = ("incarnation", "event", "last_event", "files")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    event: int
    last_event: int
    files: _containers.RepeatedCompositeFieldContainer[CheckpointFile]
    def __init__(self, incarnation: _Optional[int] = ..., event: _Optional[int] = ..., last_event: _Optional[int] = ..., files: _Optional[_Iterable[_Union[CheckpointFile, _Mapping]]] = ...) -> None: ...

class CheckpointFile(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class EventHeader(_message.Message):
    __slots__ = ("number", "message_size", "size")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    number: int
    message_size: int
    size: int
    def __init__(self, number: _Optional[int] = ..., message_size: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class Deletion(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("number", "events", "leased")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    number: int
    events: int
    leased: bool
    def __init__(self, number: _Optional[int] = ..., events: _Optional[int] = ..., leased: bool = ...) -> None: ...

class Deposed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
