"""A worker's gRPC server: sessions with routers, standard health, drain and inspection.

    async with WorkerServer(service, admin, handshake) as server:   # `service`: what the worker offers
        await server.listen("127.0.0.1", 0)

A session owns the requests that came over it: however it ends, they are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.addresses import join_address
from cluster.errors import StartupError
from cluster.rpc import convert, limits
from cluster.rpc.base import WorkerAdmin, WorkerService
from cluster.rpc.pb.serving.v1 import handover_pb2, worker_pb2
from cluster.rpc.session import Session

LAST_CALLS_S = 0.2  # for calls that are no sessions; one that watches the health never ends by itself

Handshake = Callable[[handover_pb2.HandshakeRequest], handover_pb2.HandshakeReply]
"""Answers a peer's handshake; must not block. `ValueError` for a malformed request."""


class WorkerServer:
    """Serves one worker until `close`. All methods are called on the event loop."""

    def __init__(self, service: WorkerService, admin: WorkerAdmin, handshake: Handshake | None = None) -> None:
        self._service = service
        self._admin = admin
        self._handshake_of = handshake
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs predate aio
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._is_closing = False
        self._server = grpc.aio.server(options=limits.SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def listen(self, host: str, port: int) -> str:
        """Bind (port 0: any free one), serve, and return "host:port". `StartupError` names a taken port."""
        target = join_address(host, port)
        try:
            bound = self._server.add_insecure_port(target)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {target}: the port is taken or the address is not ours") from error
        await self._server.start()
        await self.set_serving(True)
        return join_address(host, bound)

    async def set_serving(self, serving: bool) -> None:
        """What standard health checks are told."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", limits.SERVICE_NAME):
            await self._health.set(name, status)

    async def close(self, grace_s: float = 0.0) -> None:
        """End every session and free the port. `grace_s`: for routers to read what is pending; who has not done so by
        then is cut off."""
        self._is_closing = True
        await self._health.enter_graceful_shutdown()
        if grace_s > 0 and self._sessions:
            for session in self._sessions.values():
                session.finish()
            await asyncio.wait(tuple(self._sessions), timeout=grace_s)
        await self._server.stop(min(grace_s, LAST_CALLS_S))

    def _handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        def unary(method: Callable[..., Awaitable[Any]], request: type[Any], reply: type[Any]) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                method, request_deserializer=request.FromString, response_serializer=reply.SerializeToString
            )

        session = grpc.stream_stream_rpc_method_handler(
            self._session,
            request_deserializer=worker_pb2.RouterFrame.FromString,
            response_serializer=worker_pb2.WorkerFrame.SerializeToString,
        )
        methods = {
            "Session": session,
            "Handshake": unary(self._handshake, handover_pb2.HandshakeRequest, handover_pb2.HandshakeReply),
            "Drain": unary(self._drain, worker_pb2.DrainRequest, worker_pb2.DrainReply),
            "GetInfo": unary(self._get_info, worker_pb2.GetInfoRequest, worker_pb2.GetInfoReply),
            "Inspect": unary(self._inspect, worker_pb2.InspectRequest, worker_pb2.InspectReply),
        }
        return grpc.method_handlers_generic_handler(limits.SERVICE_NAME, methods)

    async def _session(self, _: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self._is_closing:
            return
        session = Session(self._service, self._admin)
        task = asyncio.current_task()
        assert task is not None
        self._sessions[task] = session
        try:
            await session.serve(context)
        finally:
            del self._sessions[task]

    async def _handshake(
        self, request: handover_pb2.HandshakeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> handover_pb2.HandshakeReply:
        if self._handshake_of is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker lends no KV")
            raise AssertionError("abort raises")
        try:
            return self._handshake_of(request)
        except ValueError as malformed:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(malformed))
            raise

    async def _drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainReply:
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        await self.set_serving(False)
        return worker_pb2.DrainReply(num_requests=self._admin.drain(timeout_s))

    async def _get_info(
        self, request: worker_pb2.GetInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.GetInfoReply:
        return worker_pb2.GetInfoReply(
            info=convert.info_to_pb(self._service.info()),
            load=convert.load_to_pb(self._service.load()),
            draining=self._admin.is_draining,
        )

    async def _inspect(
        self, request: worker_pb2.InspectRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.InspectReply:
        if len(request.token_ids) > limits.MAX_INSPECT_TOKENS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {limits.MAX_INSPECT_TOKENS} token_ids")
        inspection = await self._admin.inspect(tuple(request.token_ids), request.cache_salt)
        return convert.inspection_to_pb(inspection)
