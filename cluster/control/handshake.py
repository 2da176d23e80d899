"""The handshake on the wire: identities and KV geometry to and from protobuf, and both ends of the call.

`*_from_pb` is given what a peer sent: the answer is a well-formed struct or `ValueError` naming the
field. What is compared, and what follows from it, is decided in `kvconnector/core/handshake.py`.
"""

from __future__ import annotations

import grpc
import grpc.aio
import msgspec

from cluster.control.messages import PeerAnswer, PeerQuestion
from cluster.engine.kv_cache import KVLayout
from cluster.rpc import limits
from cluster.rpc.pb.serving.v1 import handover_pb2 as pb
from kvconnector.base import PeerDescription, Region
from kvconnector.core.handshake import FieldMismatch, KVIdentity, common_version, compare
from kvconnector.mapping import Shard

TIMEOUT_S = 4.0
MAX_TEXT = 4096
MAX_LIST = 64
MAX_METADATA_BYTES = 1 << 20
_HANDSHAKE_METHOD = f"/{limits.SERVICE_NAME}/Handshake"
_DTYPES = ("bfloat16", "float16", "float32")


class HandshakeServer:
    """A prefill worker's end: what it answers to every decode worker."""

    def __init__(self, engine_id: str, identity: KVIdentity, shard: Shard, description: PeerDescription) -> None:
        self._engine_id = engine_id
        self._identity = identity
        self._shard = shard_to_pb(shard, description)

    def answer(self, request: pb.HandshakeRequest) -> pb.HandshakeReply:
        """`ValueError` for a malformed request."""
        theirs = identity_from_pb(request.identity)
        mismatches = compare(self._identity, theirs)
        if mismatches:
            listed = [pb.FieldMismatch(field=each.field, ours=each.ours, theirs=each.theirs) for each in mismatches]
            return pb.HandshakeReply(engine_id=self._engine_id, mismatches=listed)
        version = common_version(self._identity, theirs)
        assert version is not None
        return pb.HandshakeReply(engine_id=self._engine_id, shards=[self._shard], protocol_version=version)


class HandshakeClient:
    """A decode worker's end."""

    def __init__(self, engine_id: str, identity: KVIdentity) -> None:
        self._engine_id = engine_id
        self._identity = identity_to_pb(identity)

    async def ask(self, question: PeerQuestion) -> PeerAnswer:
        """Shake hands with one prefill worker. Bounded; every failure is an answer."""
        request = pb.HandshakeRequest(
            engine_id=self._engine_id, identity=self._identity, expected_engine_id=question.engine_id
        )
        try:
            async with grpc.aio.insecure_channel(question.endpoint, options=limits.CHANNEL_OPTIONS) as channel:
                call = channel.unary_unary(
                    _HANDSHAKE_METHOD,
                    request_serializer=pb.HandshakeRequest.SerializeToString,
                    response_deserializer=pb.HandshakeReply.FromString,
                )
                reply: pb.HandshakeReply = await call(request, timeout=TIMEOUT_S)
            return read_reply(question, reply)
        except grpc.aio.AioRpcError as error:
            failure = f"{question.endpoint} does not answer the handshake: {error.code().name.lower()}"
        except ValueError as error:
            failure = f"{question.endpoint} answered the handshake with nonsense: {error}"
        return PeerAnswer(question.engine_id, failure=failure)


def read_reply(question: PeerQuestion, reply: pb.HandshakeReply) -> PeerAnswer:
    """What an answer means; `ValueError` if it is malformed."""
    if reply.engine_id != question.engine_id:
        return PeerAnswer(question.engine_id, failure=f"{question.endpoint} was restarted")
    if reply.mismatches:
        _at_most("mismatches", len(reply.mismatches), MAX_LIST)
        listed = tuple(
            FieldMismatch(_text(each.field), _text(each.ours), _text(each.theirs)) for each in reply.mismatches
        )
        return PeerAnswer(question.engine_id, mismatches=listed)
    if len(reply.shards) != 1:
        return PeerAnswer(
            question.engine_id, failure=f"{question.endpoint} has {len(reply.shards)} ranks, 1 is supported"
        )
    shard, description = shard_from_pb(reply.shards[0])
    if description.engine_id != question.engine_id:
        raise ValueError("peer.engine_id differs from engine_id")
    return PeerAnswer(question.engine_id, shards=((shard, description),))


def identity_to_pb(identity: KVIdentity) -> pb.KVIdentity:
    return pb.KVIdentity(**msgspec.structs.asdict(identity))


def identity_from_pb(message: pb.KVIdentity) -> KVIdentity:
    for field in ("protocol_min", "protocol_max", "num_layers", "num_kv_heads", "head_size"):
        if not 0 < getattr(message, field) < 1 << 20:
            raise ValueError(f"identity.{field} is {getattr(message, field)}")
    texts = {
        name: _text(getattr(message, name))
        for name in (
            "config_digest",
            "weights_digest",
            "revision",
            "quantisation",
            "weight_version",
            "kv_dtype",
            "attention_kind",
            "rope",
            "kv_layout",
            "numeric_fingerprint",
        )
    }
    return KVIdentity(
        **texts,
        adapters=_texts("adapters", list(message.adapters)),
        transports=_texts("transports", list(message.transports)),
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_size=message.head_size,
        invariant=message.invariant,
        protocol_min=message.protocol_min,
        protocol_max=message.protocol_max,
    )


def shard_to_pb(shard: Shard, peer: PeerDescription) -> pb.KVShard:
    regions = [pb.Region(**msgspec.structs.asdict(region)) for region in peer.regions]
    return pb.KVShard(
        layout=pb.KVLayout(**msgspec.structs.asdict(shard.layout)),
        first_layer=shard.first_layer,
        first_kv_head=shard.first_kv_head,
        peer=pb.PeerDescription(
            engine_id=peer.engine_id, transport=peer.transport, agent_metadata=peer.agent_metadata, regions=regions
        ),
    )


def shard_from_pb(message: pb.KVShard) -> tuple[Shard, PeerDescription]:
    layout, peer = message.layout, message.peer
    for field in ("num_layers", "num_kv_heads", "head_size", "block_size"):
        if not 0 < getattr(layout, field) < 1 << 16:
            raise ValueError(f"layout.{field} is {getattr(layout, field)}")
    if layout.num_planes > 2:
        raise ValueError(f"layout.num_planes is {layout.num_planes}")
    if layout.dtype not in _DTYPES:
        raise ValueError(f"layout.dtype is {layout.dtype[:64]!r}")
    _at_most("agent_metadata", len(peer.agent_metadata), MAX_METADATA_BYTES)
    _at_most("regions", len(peer.regions), MAX_LIST)
    shard = Shard(
        layout=KVLayout(
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_size=layout.head_size,
            block_size=layout.block_size,
            dtype=layout.dtype,
            num_planes=layout.num_planes or 2,
        ),
        first_layer=message.first_layer,
        first_kv_head=message.first_kv_head,
    )
    regions = tuple(
        Region(_text(region.name), region.address, region.num_bytes, region.device_id) for region in peer.regions
    )
    return shard, PeerDescription(_text(peer.engine_id), _text(peer.transport), peer.agent_metadata, regions)


def _text(value: str) -> str:
    _at_most("a text", len(value), MAX_TEXT)
    return value


def _texts(field: str, values: list[str]) -> tuple[str, ...]:
    _at_most(field, len(values), MAX_LIST)
    return tuple(map(_text, values))


def _at_most(field: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{field} has a size of {size}, at most {limit} is allowed")
