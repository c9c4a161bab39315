from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import policy_pb2 as _policy_pb2
from optserve.v1 import step_pb2 as _step_pb2
from optserve.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Event(_message.Message):
    __slots__ = ("number", "version", "pushes", "tensors", "chunks", "sizes", "gathered", "loss_scale", "hyperparameters", "policy")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    GATHERED_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    number: int
    version: int
    pushes: _containers.RepeatedCompositeFieldContainer[JournaledPush]
    tensors: _containers.RepeatedCompositeFieldContainer[_step_pb2.PushedTensor]
    chunks: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Chunk]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    gathered: bool
    loss_scale: float
    hyperparameters: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.GroupHyperparameters]
    policy: _policy_pb2.Policy
    def __init__(self, number: _Optional[int] = ..., version: _Optional[int] = ..., pushes: _Optional[_Iterable[_Union[JournaledPush, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[_step_pb2.PushedTensor, _Mapping]]] = ..., chunks: _Optional[_Iterable[_Union[_tensor_pb2.Chunk, _Mapping]]] = ..., sizes: _Optional[_Iterable[int]] = ..., gathered: bool = ..., loss_scale: _Optional[float] = ..., hyperparameters: _Optional[_Iterable[_Union[_optimizer_pb2.GroupHyperparameters, _Mapping]]] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ...) -> None: ...

class JournaledPush(_message.Message):
    __slots__ = ("client_id", "epoch", "digest", "receipt", "samples")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    epoch: int
    digest: bytes
    receipt: _step_pb2.Receipt
    samples: float
    def __init__(self, client_id: _Optional[str] = ..., epoch: _Optional[int] = ..., digest: _Optional[bytes] = ..., receipt: _Optional[_Union[_step_pb2.Receipt, _Mapping]] = ..., samples: _Optional[float] = ...) -> None: ...
