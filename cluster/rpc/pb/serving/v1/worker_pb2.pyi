from cluster.rpc.pb.serving.v1 import common_pb2 as _common_pb2
from cluster.rpc.pb.serving.v1 import handover_pb2 as _handover_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Submit(_message.Message):
    __slots__ = ("request", "kv")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    request: _common_pb2.Request
    kv: bytes
    def __init__(self, request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ..., kv: _Optional[bytes] = ...) -> None: ...

class RequestRef(_message.Message):
    __slots__ = ("request_id", "attempt", "served")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    served: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., served: _Optional[bool] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("protocol_version", "submits", "cancels", "releases", "settled")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    cancels: _containers.RepeatedCompositeFieldContainer[RequestRef]
    releases: _containers.RepeatedCompositeFieldContainer[RequestRef]
    settled: bool
    def __init__(self, protocol_version: _Optional[int] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[RequestRef, _Mapping]]] = ..., releases: _Optional[_Iterable[_Union[RequestRef, _Mapping]]] = ..., settled: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("chunk", "prefill_started", "prefill_result")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STARTED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RESULT_FIELD_NUMBER: _ClassVar[int]
    chunk: _common_pb2.TokenChunk
    prefill_started: _common_pb2.PrefillStarted
    prefill_result: _common_pb2.PrefillResult
    def __init__(self, chunk: _Optional[_Union[_common_pb2.TokenChunk, _Mapping]] = ..., prefill_started: _Optional[_Union[_common_pb2.PrefillStarted, _Mapping]] = ..., prefill_result: _Optional[_Union[_common_pb2.PrefillResult, _Mapping]] = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("hello", "events", "load", "draining", "last")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.WorkerInfo
    events: _containers.RepeatedCompositeFieldContainer[Event]
    load: _common_pb2.WorkerLoad
    draining: bool
    last: bool
    def __init__(self, hello: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ..., draining: _Optional[bool] = ..., last: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("num_requests",)
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    def __init__(self, num_requests: _Optional[int] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoReply(_message.Message):
    __slots__ = ("info", "load", "draining")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    load: _common_pb2.WorkerLoad
    draining: bool
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("token_ids", "cache_salt")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("num_blocks", "num_free", "num_owned", "num_leased", "num_draining", "integrity_error", "num_digest_tokens", "kv_digests", "num_requests", "num_leases")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_OWNED_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASED_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAINING_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_DIGEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_free: int
    num_owned: int
    num_leased: int
    num_draining: int
    integrity_error: str
    num_digest_tokens: int
    kv_digests: _containers.RepeatedScalarFieldContainer[int]
    num_requests: int
    num_leases: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_free: _Optional[int] = ..., num_owned: _Optional[int] = ..., num_leased: _Optional[int] = ..., num_draining: _Optional[int] = ..., integrity_error: _Optional[str] = ..., num_digest_tokens: _Optional[int] = ..., kv_digests: _Optional[_Iterable[int]] = ..., num_requests: _Optional[int] = ..., num_leases: _Optional[int] = ...) -> None: ...
