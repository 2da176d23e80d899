"""Routes and failures: every answer that is no success is one error object, whatever went wrong where."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cluster.errors import Cancelled, Overloaded, TandemError
from cluster.router.asgi import Reply, check_not_forged, client_request_id, discard_body, has_body
from cluster.router.endpoints import Endpoints
from cluster.router.responses import ErrorBody, ErrorEnvelope

log = logging.getLogger(__name__)

NO_HANDLER = "none"  # for metrics: no such route, not with this method, not HTTP
CLIENT_GONE = 499  # for metrics: nobody was there any more to be told a status

Handler = Callable[[Scope, Receive, Reply], Awaitable[None]]


class _Endpoint:
    """An ASGI application around one handler. `count` is told the status of every answer."""

    def __init__(
        self, handler: Handler, count: Callable[[int], None], *, takes_body: bool, body_timeout_s: float
    ) -> None:
        self._handler = handler
        self._body_timeout_s = body_timeout_s
        self._count = count
        self._takes_body = takes_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, client_request_id(scope) or secrets.token_hex(16))
        reply.closes_connection = has_body(scope)  # until it has been read
        try:
            if self._takes_body:
                check_not_forged(scope)
            else:
                await discard_body(scope, receive, timeout_s=self._body_timeout_s)
            await self._handler(scope, receive, reply)
        except Cancelled as gone:
            log.info("request %s: %s", reply.request_id, gone.message)
            abort_connection(scope)  # a socket that is still there is one that nobody reads
        except TandemError as error:
            if self._takes_body and not reply.has_begun_to_read:
                await discard_body(scope, receive, timeout_s=self._body_timeout_s)
            await reply.error(error)
        except asyncio.CancelledError:  # the server has waited for this request long enough
            await reply.error(Overloaded("this router is shutting down", retry_after_s=5.0))
        except Exception:
            reply.status = reply.status or 500  # which the application says
            raise
        finally:
            self._count(reply.status or CLIENT_GONE)


def make_app(endpoints: Endpoints) -> Starlette:
    body_timeout_s = endpoints.config.body_timeout_s

    def route(method: str, path: str, handler: Handler) -> Route:
        count = partial(endpoints.metrics.count_response, path)
        endpoint = _Endpoint(handler, count, takes_body=method == "POST", body_timeout_s=body_timeout_s)
        return Route(path, endpoint, methods=[method])

    async def refused(request: HttpRequest, error: Exception) -> Response:
        await discard_body(request.scope, request.receive, timeout_s=body_timeout_s)
        response = _http_error(request, error)
        endpoints.metrics.count_response(NO_HANDLER, response.status_code)
        return response

    app = Starlette(
        routes=[
            route("POST", "/v1/chat/completions", endpoints.chat),
            route("POST", "/v1/completions", endpoints.complete),
            route("GET", "/v1/models", endpoints.models),
            route("GET", "/v1/models/{model:path}", endpoints.model),
            route("GET", "/health", endpoints.health),
            route("GET", "/metrics", endpoints.metrics_page),
            route("GET", "/version", endpoints.version),
            route("GET", "/load", endpoints.load),
            route("POST", "/tokenize", endpoints.tokenize),
            route("POST", "/detokenize", endpoints.detokenize),
        ],
        exception_handlers={HTTPException: refused, Exception: _internal_error},
    )
    app.router.redirect_slashes = False  # to where a client's Host header says, and without a body
    return app


def _http_error(request: HttpRequest, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:256]
    match error.status_code:
        case 404:
            message, code = f"there is nothing at {path}", "not_found"
        case 405:
            message, code = f"{request.method[:32]} is not allowed at {path}", "method_not_allowed"
        case _:
            message, code = error.detail, "http_error"
    return _error_response(request, error.status_code, message, code, dict(error.headers or {}))


async def _internal_error(request: HttpRequest, error: Exception) -> Response:
    """A bug of ours. The server logs its traceback; a client learns nothing of our insides."""
    return _error_response(request, 500, "internal error, see the router's log", "internal_error", {})


def _error_response(request: HttpRequest, status: int, message: str, code: str, headers: dict[str, str]) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = msgspec.json.encode(ErrorEnvelope(ErrorBody(message, kind, None, code)))
    headers["x-request-id"] = client_request_id(request.scope) or secrets.token_hex(16)
    if has_body(request.scope):
        headers["connection"] = "close"  # nobody has read it
    return Response(body, status, headers, media_type="application/json")


def abort_connection(scope: Scope) -> None:
    """Drop the connection without waiting for its buffers; needs `connection.BoundedHttpProtocol`."""
    abort = scope.get("tandem.abort")
    if abort is not None:
        abort()
