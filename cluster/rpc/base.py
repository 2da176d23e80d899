"""The seam between router and worker: what `client.py` offers and what `server.py` needs.

One long-lived bidirectional gRPC stream per (router, worker) carries many requests; a worker sends
one frame per engine step with the news of all its requests. A fake of either side is a small class
in a test.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from cluster.errors import TandemError
from cluster.types import (
    FinishReason,
    PrefillResult,
    PrefillStarted,
    Request,
    RequestError,
    Role,
    TokenChunk,
    WorkerInfo,
    WorkerLoad,
)

PrefillEvent = PrefillStarted | PrefillResult


class WorkerConnection(Protocol):
    """The router's view of one worker. Made by `client.connect`; closed by whoever made it.

    Leaving an iterator early (cancelled task, `aclose`) cancels the request on the worker. When the
    stream breaks, every iterator raises `WorkerLost` once. Nothing here waits without a bound.
    """

    address: str
    role: Role
    num_drains: int  # how often a worker has begun to drain, over all processes at this address
    num_promised: int  # callers inside `promised`

    @property
    def info(self) -> WorkerInfo | None:
        """None until the worker has introduced itself."""
        ...

    @property
    def load(self) -> WorkerLoad | None: ...

    @property
    def is_ready(self) -> bool:
        """Connected, introduced, not draining."""
        ...

    @property
    def last_error(self) -> str:
        """Why there is no connection (for logs and /health); empty while there is one."""
        ...

    def promised(self) -> AbstractContextManager[None]:
        """Entered when work is placed on this worker that will be submitted later: until it is left, a drain of the
        worker waits, and takes it. Enter it without awaiting anything between finding the worker ready and this."""
        ...

    def prefill(self, request: Request) -> AsyncGenerator[PrefillEvent, None]:
        """At most one PrefillStarted, then exactly one PrefillResult."""
        ...

    def decode(self, request: Request, kv: bytes | None) -> AsyncGenerator[TokenChunk, None]:
        """Chunks in order of `index`; the last one has a finish_reason. With a handle: `request`'s
        prompt has been computed elsewhere and its first token is in `request.token_ids` already.
        Without (`kv` None): the worker computes the prompt itself."""
        ...

    def enough(self, request_id: str, attempt: int) -> None:
        """What has come of a request is all that is wanted (a stop string). When its iterator is left the worker counts
        it as served, not as given up."""
        ...

    def release(self, request_id: str, attempt: int) -> None:
        """Tell a prefill worker that nobody will read this request's blocks. Idempotent, best effort
        (the lease ends it otherwise)."""
        ...

    async def close(self) -> None: ...


EventSink = Callable[[PrefillStarted | PrefillResult | TokenChunk], None]


class WorkerService(Protocol):
    """What a worker process offers to `server.py`. Called on the event loop; must not block."""

    def info(self) -> WorkerInfo: ...

    def load(self) -> WorkerLoad: ...

    def submit(self, request: Request, kv: bytes | None, sink: EventSink) -> None:
        """Accept a request. From now on `sink` gets its events, ending with exactly one terminal one
        (PrefillResult, or a TokenChunk with finish_reason). `sink` is called on the event loop."""
        ...

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        """Idempotent; an unknown id is ignored. The terminal event is a CANCELLED chunk. `is_served`: the router had
        all that it wanted, so the request counts among those that were served."""
        ...

    def release(self, request_id: str, attempt: int) -> None: ...


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's block accounting between two steps, and the KV digests of a cached prompt.

    Every block is exactly one of free (cached, but unowned included), owned by a running sequence,
    leased to a peer, or draining (an aborted transfer may still write it).
    """

    num_blocks: int
    num_free: int
    num_owned: int
    num_leased: int = 0
    num_draining: int = 0
    num_requests: int = 0
    num_leases: int = 0
    integrity_error: str = ""  # empty: check_integrity() holds
    num_digest_tokens: int = 0  # whole blocks only
    kv_digests: tuple[int, ...] = ()  # uint64 per KV head, over all layers and num_digest_tokens tokens


class RouterSession(Protocol):
    """A router's session, as its worker knows it."""

    def on_drain(self) -> None:
        """A drain has begun: the router is to learn of it now, not with the next heartbeat."""
        ...


class WorkerAdmin(Protocol):
    """What operators and tools ask of a worker process; also offered to `server.py`.

    A router places a request on two workers and comes to the second one when the first has computed the
    prompt. So a drain has two parts: routers place nothing more, and each says when it has settled, that
    is, when nothing of what it had placed is still to come. Until then its submits are accepted.
    """

    @property
    def is_draining(self) -> bool: ...

    def drain(self, timeout_s: float | None) -> int:
        """End when routers have settled and nothing runs; cancel what still runs after `timeout_s` (None: the
        worker's own bound). Returns the number of requests that run now. Idempotent."""
        ...

    def attach(self, session: RouterSession) -> None:
        """A router may submit from now on."""
        ...

    def settle(self, session: RouterSession) -> None:
        """It submits nothing more. Idempotent; called at the end of the session at the latest."""
        ...

    async def inspect(self, token_ids: tuple[int, ...], cache_salt: bytes) -> Inspection: ...


def refused(request_id: str, attempt: int, refusal: TandemError) -> TokenChunk:
    """The terminal event of a request that a worker did not accept."""
    return TokenChunk(
        request_id=request_id,
        attempt=attempt,
        index=0,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=RequestError(code=refusal.code, message=refusal.message),
    )
