from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KVLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_size", "block_size", "dtype", "num_planes")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PLANES_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    num_planes: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., num_planes: _Optional[int] = ...) -> None: ...

class KVIdentity(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "config_digest", "weights_digest", "revision", "quantisation", "adapters", "weight_version", "kv_dtype", "attention_kind", "num_layers", "num_kv_heads", "head_size", "rope", "kv_layout", "invariant", "numeric_fingerprint", "transports")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    INVARIANT_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    config_digest: str
    weights_digest: str
    revision: str
    quantisation: str
    adapters: _containers.RepeatedScalarFieldContainer[str]
    weight_version: str
    kv_dtype: str
    attention_kind: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    rope: str
    kv_layout: str
    invariant: bool
    numeric_fingerprint: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., config_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., revision: _Optional[str] = ..., quantisation: _Optional[str] = ..., adapters: _Optional[_Iterable[str]] = ..., weight_version: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., attention_kind: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., rope: _Optional[str] = ..., kv_layout: _Optional[str] = ..., invariant: _Optional[bool] = ..., numeric_fingerprint: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("name", "address", "num_bytes", "device_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: int
    num_bytes: int
    device_id: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[int] = ..., num_bytes: _Optional[int] = ..., device_id: _Optional[int] = ...) -> None: ...

class PeerDescription(_message.Message):
    __slots__ = ("engine_id", "transport", "agent_metadata", "regions")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    AGENT_METADATA_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    transport: str
    agent_metadata: bytes
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, engine_id: _Optional[str] = ..., transport: _Optional[str] = ..., agent_metadata: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class KVShard(_message.Message):
    __slots__ = ("layout", "first_layer", "first_kv_head", "peer")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    layout: KVLayout
    first_layer: int
    first_kv_head: int
    peer: PeerDescription
    def __init__(self, layout: _Optional[_Union[KVLayout, _Mapping]] = ..., first_layer: _Optional[int] = ..., first_kv_head: _Optional[int] = ..., peer: _Optional[_Union[PeerDescription, _Mapping]] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("engine_id", "identity", "expected_engine_id")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    identity: KVIdentity
    expected_engine_id: str
    def __init__(self, engine_id: _Optional[str] = ..., identity: _Optional[_Union[KVIdentity, _Mapping]] = ..., expected_engine_id: _Optional[str] = ...) -> None: ...

class FieldMismatch(_message.Message):
    __slots__ = ("field", "ours", "theirs")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    OURS_FIELD_NUMBER: _ClassVar[int]
    THEIRS_FIELD_NUMBER: _ClassVar[int]
    field: str
    ours: str
    theirs: str
    def __init__(self, field: _Optional[str] = ..., ours: _Optional[str] = ..., theirs: _Optional[str] = ...) -> None: ...

class HandshakeReply(_message.Message):
    __slots__ = ("engine_id", "mismatches", "shards", "protocol_version")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    mismatches: _containers.RepeatedCompositeFieldContainer[FieldMismatch]
    shards: _containers.RepeatedCompositeFieldContainer[KVShard]
    protocol_version: int
    def __init__(self, engine_id: _Optional[str] = ..., mismatches: _Optional[_Iterable[_Union[FieldMismatch, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[KVShard, _Mapping]]] = ..., protocol_version: _Optional[int] = ...) -> None: ...
