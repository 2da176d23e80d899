"""One sequence's life between acceptance and its one terminal event.

    place --> prefill --> first token to the client --> decode --> tokens to the client --> end
      ^          |                    |                    |
      +----------+--------------------+--------------------+  worker lost, pair mismatched, KV lost:
                 prompt + emitted tokens, attempt + 1         the same bits go on from the next position

Whoever leaves early (client gone, stop string, deadline, failure) leaves through the same `finally`
blocks: iterators are closed, which cancels on the worker, and a prefill worker whose KV nobody has
taken over is told so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec

from cluster.errors import HandshakeMismatch, Overloaded, TandemError, WorkerLost
from cluster.logs import log_event
from cluster.router.metrics import RouterMetrics
from cluster.router.placement import affinity_of
from cluster.router.pool import Worker, WorkerPair, WorkerPool
from cluster.router.recovery import Recovery, from_wire, kind_of, recovery_for
from cluster.rpc.base import WorkerConnection
from cluster.types import FinishReason, PrefillResult, PrefillStarted, Request, TokenChunk

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.05  # longer with every retry after the first, which is made at once

# Takes the chunks of one sequence in order; True means that it needs no more (a stop string matched).
Deliver = Callable[[TokenChunk], Awaitable[bool]]


class _Journey:
    """What has happened to one sequence so far."""

    def __init__(self, request: Request, session: str, deadline: float) -> None:
        self.original = request
        self.affinity = affinity_of(request.token_ids, session)
        self.deadline = deadline  # on the event loop's clock
        self.emitted: list[int] = []
        self.num_attempts = 0
        self.num_mismatches = 0  # of these
        self.avoid: set[str] = set()  # engine ids that have failed this sequence
        self.computing_at = ""  # engine id of the worker that has the sequence now
        self.has_prompt_logprobs = False

    def request(self, remaining_s: float) -> Request:
        """What a worker is to compute now. `max_tokens` and `min_tokens` stay the client's: they count
        from the end of the client's prompt, not from the end of `token_ids`."""
        original = self.original
        sampling = original.sampling
        if self.has_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return msgspec.structs.replace(
            original,
            token_ids=(*original.token_ids, *self.emitted),
            num_prompt_tokens=len(original.token_ids),
            attempt=self.num_attempts - 1,
            sampling=sampling,
            deadline_s=remaining_s,
        )

    def accept(self, chunk: TokenChunk) -> None:
        """Positions come once and in order, whichever worker computed them."""
        if chunk.index != len(self.emitted):
            raise WorkerLost(f"a worker sent output position {chunk.index}, expected {len(self.emitted)}")
        self.emitted.extend(chunk.token_ids)
        self.has_prompt_logprobs = True


class Flow:
    """Runs sequences on the pool. Shared by all requests; holds no per-request state."""

    def __init__(self, pool: WorkerPool, metrics: RouterMetrics, *, max_attempts: int, failover_wait_s: float) -> None:
        self._pool = pool
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._failover_wait_s = failover_wait_s

    async def run(self, request: Request, deliver: Deliver, *, session: str = "", timeout_s: float) -> None:
        """Return after the terminal chunk was delivered, or after `deliver` wanted no more.

        Raises a `TandemError` when the sequence failed; then no chunk with a finish_reason was delivered.
        """
        journey = _Journey(request, session, asyncio.get_running_loop().time() + timeout_s)
        while True:
            pair = await self._place(journey)
            journey.num_attempts += 1
            try:
                await self._attempt(journey, pair, deliver)
                return
            except TandemError as error:
                self._recover(journey, pair, error)

    async def _place(self, journey: _Journey) -> WorkerPair:
        wait_s = self._failover_wait_s if journey.num_attempts else 0.0
        await asyncio.sleep(RETRY_PAUSE_S * max(0, journey.num_attempts - 1))
        pair = await self._pool.wait_for_place(affinity=journey.affinity, avoid=journey.avoid, timeout_s=wait_s)
        if pair is None:
            raise Overloaded(self._pool.what_is_missing() or "no compatible pair of prefill and decode worker is ready")
        return pair

    def _recover(self, journey: _Journey, pair: WorkerPair, error: TandemError) -> None:
        """Prepare the next attempt, or raise `error`."""
        kind = kind_of(error)
        journey.num_mismatches += issubclass(kind, HandshakeMismatch)
        # A pair that does not fit is tried once, so pairs bound these attempts, and the deadline does.
        counted = journey.num_attempts - journey.num_mismatches
        recovery = recovery_for(kind, attempts=counted, max_attempts=self._max_attempts)
        log_event(
            log,
            logging.WARNING,
            "attempt failed",
            request=journey.original.request_id,
            attempt=journey.num_attempts - 1,
            prefill_worker=pair.prefill.name if pair.prefill else None,
            decode_worker=pair.decode.name,
            tokens=len(journey.emitted),
            code=kind.code,
            recovery=recovery.value,
            message=error.message,
        )
        if issubclass(kind, Overloaded) and not self._has_another(journey):
            recovery = Recovery.FAIL
        if issubclass(kind, HandshakeMismatch):
            self._pool.remember_mismatch(pair.engine_ids)
            self._metrics.count_handshake_refusal(error)
        match recovery:
            case Recovery.FAIL:
                raise error
            case Recovery.ELSEWHERE:
                journey.avoid.add(journey.computing_at)
                self._metrics.num_failovers += 1
            case Recovery.RECOMPUTE:
                journey.avoid.add(pair.engine_ids[0])  # its KV cannot be had; it may still be the only one
            case Recovery.OTHER_PAIR:
                pass  # the pool remembers
        self._metrics.count_recovery(kind.code, is_mid_stream=bool(journey.emitted))

    def _has_another(self, journey: _Journey) -> bool:
        """Whether there is a worker that has not said to be full. In mid-stream any is worth waiting for."""
        pair = self._pool.place(affinity=journey.affinity, avoid={*journey.avoid, journey.computing_at})
        return bool(journey.emitted) or (pair is not None and journey.computing_at not in pair.engine_ids)

    async def _attempt(self, journey: _Journey, pair: WorkerPair, deliver: Deliver) -> None:
        # The prefill worker gets its part before anything is awaited, so it needs no promise.
        with pair.decode.connection.promised():
            if pair.prefill is None:
                journey.computing_at = pair.engine_ids[1]
                with pair.decode.counted() as connection:
                    await _relay(connection, _request_now(journey), journey, deliver)
                return
            with pair.prefill.used():
                await self._split_attempt(journey, pair, pair.prefill, deliver)

    async def _split_attempt(
        self, journey: _Journey, pair: WorkerPair, prefill_worker: Worker, deliver: Deliver
    ) -> None:
        request = _request_now(journey)
        journey.computing_at = pair.engine_ids[0]
        must_release = True
        try:
            with prefill_worker.counted() as prefill:
                result = await _prefill(prefill, request)
            must_release = result.kv is not None
            if await _pass_on(_first_chunk(result), journey, deliver) or result.kv is None:
                return
            journey.computing_at = pair.engine_ids[1]
            with pair.decode.counted() as decode:
                chunks = decode.decode(_request_now(journey), result.kv)
                async with aclosing(chunks):
                    async for chunk in chunks:
                        # the KV has arrived: from here on the decode worker settles with the prefill worker
                        must_release = must_release and not chunk.token_ids
                        if await _pass_on(chunk, journey, deliver):
                            decode.enough(request.request_id, request.attempt)
                            return
            raise WorkerLost(f"decode worker {decode.address} ended without a finish reason")
        finally:
            if must_release:
                prefill_worker.connection.release(request.request_id, request.attempt)
                self._metrics.num_releases += 1


def _request_now(journey: _Journey) -> Request:
    return journey.request(max(0.001, journey.deadline - asyncio.get_running_loop().time()))


async def _prefill(connection: WorkerConnection, request: Request) -> PrefillResult:
    events = connection.prefill(request)
    async with aclosing(events):
        async for event in events:
            match event:
                case PrefillStarted():
                    pass  # decode is asked once the first token is known: it needs that token
                case PrefillResult():
                    return event
    raise WorkerLost(f"prefill worker {connection.address} ended without a result")


def _first_chunk(result: PrefillResult) -> TokenChunk:
    if not result.prompt_logprobs:
        return result.first
    return msgspec.structs.replace(result.first, prompt_logprobs=result.prompt_logprobs)


async def _relay(connection: WorkerConnection, request: Request, journey: _Journey, deliver: Deliver) -> None:
    chunks = connection.decode(request, None)
    async with aclosing(chunks):
        async for chunk in chunks:
            if await _pass_on(chunk, journey, deliver):
                connection.enough(request.request_id, request.attempt)
                return
    raise WorkerLost("a decode worker ended without a finish reason")


async def _pass_on(chunk: TokenChunk, journey: _Journey, deliver: Deliver) -> bool:
    """True when the sequence is over. A worker that gives up says so in its terminal chunk; this router
    has not cancelled (it would have left the iterator), so to the sequence that worker is lost."""
    if chunk.error is not None and chunk.finish_reason is not FinishReason.CANCELLED:
        raise from_wire(chunk.error)
    if chunk.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
        raise WorkerLost("the worker has given up the request")
    journey.accept(chunk)
    return await deliver(chunk) or chunk.finish_reason is not None
