"""A router's connection to a worker in the same process: no gRPC, no copies (`--monolithic`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from cluster.errors import TandemError, WorkerLost
from cluster.rpc.base import PrefillEvent, WorkerAdmin, WorkerService, refused
from cluster.types import (
    PrefillResult,
    PrefillStarted,
    Request,
    Role,
    TokenChunk,
    WorkerInfo,
    WorkerLoad,
)

_Event = PrefillStarted | PrefillResult | TokenChunk


class EmbeddableWorker(WorkerService, WorkerAdmin, Protocol):
    """A worker as this connection needs it."""


class EmbeddedConnection:
    """A `WorkerConnection` to a decode worker that outlives it. Used on one event loop, the worker's."""

    def __init__(self, worker: EmbeddableWorker) -> None:
        self.address = "in this process"
        self.role = Role.DECODE
        self.num_drains = 0  # the process ends with it
        self.num_promised = 0
        self._worker = worker
        self._is_closed = False
        self._served: set[tuple[str, int]] = set()  # running requests of which nothing more is wanted

    @property
    def info(self) -> WorkerInfo:
        return self._worker.info()

    @property
    def load(self) -> WorkerLoad:
        return self._worker.load()

    @property
    def is_ready(self) -> bool:
        return not self._is_closed and not self._worker.is_draining

    @property
    def last_error(self) -> str:
        return "the connection was closed" if self._is_closed else ""

    def promised(self) -> AbstractContextManager[None]:
        return nullcontext()  # what is placed here is submitted at once

    def prefill(self, request: Request) -> AsyncGenerator[PrefillEvent, None]:
        raise AssertionError("a monolithic deployment has no prefill pool")

    async def decode(self, request: Request, kv: bytes | None) -> AsyncGenerator[TokenChunk, None]:
        if self._is_closed:
            raise WorkerLost("the connection was closed")
        inbox: asyncio.Queue[_Event] = asyncio.Queue()  # bounded by the request's max_tokens
        has_ended = False
        key = (request.request_id, request.attempt)
        try:
            self._worker.submit(request, kv, inbox.put_nowait)
        except TandemError as refusal:
            yield refused(request.request_id, request.attempt, refusal)
            return
        try:
            while not has_ended:
                chunk = await inbox.get()
                assert isinstance(chunk, TokenChunk), "a decode worker sends chunks only"
                has_ended = chunk.finish_reason is not None
                yield chunk
        finally:
            if not has_ended:
                self._worker.cancel(*key, is_served=key in self._served)
            self._served.discard(key)

    def enough(self, request_id: str, attempt: int) -> None:
        self._served.add((request_id, attempt))

    def release(self, request_id: str, attempt: int) -> None:
        self._worker.release(request_id, attempt)

    async def close(self) -> None:
        self._is_closed = True
