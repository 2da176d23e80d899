"""One-shot calls to a worker, for operators and tools. Each opens its own channel and is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from cluster.errors import WorkerLost
from cluster.rpc import convert, limits
from cluster.rpc.base import Inspection
from cluster.rpc.pb.serving.v1 import worker_pb2 as pb
from cluster.types import WorkerInfo, WorkerLoad

TIMEOUT_S = 30.0


async def inspect(address: str, token_ids: tuple[int, ...] = (), cache_salt: bytes = b"") -> Inspection:
    """Block accounting of a worker, and digests of the KV that it still has of a prompt."""
    request = pb.InspectRequest(token_ids=token_ids, cache_salt=cache_salt)
    return convert.inspection_from_pb(await _call(address, "Inspect", request, pb.InspectReply.FromString))


async def drain(address: str, timeout_s: float | None = None) -> int:
    """Begin to drain a worker; returns how many requests it still has."""
    reply = await _call(address, "Drain", pb.DrainRequest(timeout_s=timeout_s), pb.DrainReply.FromString)
    return int(reply.num_requests)


async def get_info(address: str) -> tuple[WorkerInfo, WorkerLoad, bool]:
    """What a worker is and does, and whether it drains, whoever asked it to."""
    reply = await _call(address, "GetInfo", pb.GetInfoRequest(), pb.GetInfoReply.FromString)
    return convert.info_from_pb(reply.info), convert.load_from_pb(reply.load), reply.draining


async def _call(address: str, method: str, request: Any, decode: Callable[[bytes], Any]) -> Any:
    """Raises `WorkerLost` if there is no answer."""
    path = f"/{limits.SERVICE_NAME}/{method}"
    try:
        async with grpc.aio.insecure_channel(address, options=limits.CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(
                path, request_serializer=type(request).SerializeToString, response_deserializer=decode
            )
            return await call(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise WorkerLost(f"worker {address} does not answer {method}: {error.code().name.lower()}") from error
