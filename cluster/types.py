"""The data that flows between router, prefill workers and decode workers.

Every struct here is frozen and plain: no torch, no sockets, no clocks. The same value is what the
router decides on, what `rpc/convert.py` puts on the wire and what an engine is given.

    HTTP -> Request -> Prefill -> PrefillResult(first TokenChunk, sealed KVHandle | finished)
                    -> Decode(Request, handle) -> TokenChunk ... -> TokenChunk(finish_reason=...)

Ownership: a `Request` is owned by the router from acceptance to its one terminal event. A worker
owns the blocks it allocated for `(request_id, attempt)` until it has released them.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from cluster.errors import InvalidRequest

MAX_TOKENS_LIMIT = 1 << 20
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20


class FinishReason(str, Enum):
    """Why a request ended; the first two are OpenAI's words, the others are ours."""

    STOP = "stop"  # end-of-sequence, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context was reached
    CANCELLED = "cancelled"  # the client went away or an operator aborted it
    ERROR = "error"  # see TokenChunk.error


class Role(str, Enum):
    """What a worker does. A monolithic deployment is a decode pool without a prefill pool."""

    PREFILL = "prefill"
    DECODE = "decode"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn. `seed` is always set: the router draws one when the client gave none,
    so that a continuation on another worker draws the same tokens."""

    max_tokens: int
    seed: int  # 0 <= seed < 2**63; keyed together with the absolute position
    min_tokens: int = 0
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # ascending token id
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # matched where text exists (router or embedded), never in the engine
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range."""
        _in_range("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _in_range("seed", self.seed, 0, (1 << 63) - 1)
        _in_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_k", self.top_k, 0, 1 << 31)
        _in_range("top_p", self.top_p, 1e-9, 1.0)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        _in_range("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS)
        _in_range("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_LOGPROBS)
        _at_most("stop", len(self.stop), MAX_STOP_STRINGS)
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id in self.stop_token_ids:
            _in_range("stop_token_ids", token_id, 0, vocab_size - 1)
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                message = f"logit_bias: keys are token ids from 0 to {vocab_size - 1}, got {token_id}"
                raise InvalidRequest(message, param="logit_bias")
            _in_range("logit_bias", bias, -100.0, 100.0)


def _in_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequest(f"{field} must be between {low} and {high}, got {value}", param=field)


def _at_most(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{field} has {count} entries, at most {limit} are allowed", param=field)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sequence to complete. `n` > 1 at the edge becomes n requests with distinct seeds.

    `request_id` is made by the router, never taken from a client. `attempt` grows with every retry.
    """

    request_id: str
    token_ids: tuple[int, ...]  # the prompt; on a continuation the prompt plus the emitted tokens
    sampling: SamplingParams
    attempt: int = 0
    num_prompt_tokens: int = 0  # the client's prompt length; 0 means len(token_ids)
    deadline_s: float | None = None  # a duration from acceptance, not a time: clocks differ
    tenant: str = ""
    cache_salt: bytes = b""  # keys the prefix cache; tenants with different salts share nothing
    traceparent: str = ""

    @property
    def prompt_length(self) -> int:
        """Length of the client's prompt; tokens after it in `token_ids` were emitted before."""
        return self.num_prompt_tokens or len(self.token_ids)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of one token under the raw logits (before temperature and penalties).

    `logprob` is an fp32 value; Python's float holds it exactly, so bits survive the wire.
    """

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...] = ()  # most likely first, ties by lower id


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # one per sequence and step; holds no cycle
    """New tokens of one request. The one chunk with a `finish_reason` is its terminal event."""

    request_id: str
    attempt: int
    index: int  # output position of token_ids[0], counted from the end of the client's prompt
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # parallel to token_ids, or empty when not asked for
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token id that ended it, if one did
    error: RequestError | None = None
    num_cached_tokens: int = 0  # prompt tokens served from the prefix cache (set on the first chunk)
    # Set on the first chunk by a worker that computed the prompt itself without handing it over; parallel
    # to the prompt, the first entry is None. A prefill worker answers them in its PrefillResult instead.
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class RequestError(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A typed failure of one request, as it crosses the wire. `code` names a class of errors.py."""

    code: str
    message: str


class KVHandle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a finished (or filling) prompt's KV lies on a prefill worker.

    How far a block is filled, its current generation and its digest are not in here: they lie in the
    prefill worker's registered ledger (`kvconnector/ledger.py`) and are READ with the data, like a
    seqlock. Opaque to the router, which carries it sealed (`kvconnector/ticket.py`). The blocks stay pinned on
    the prefill side until it is told `done`, or until `lease_s` has passed there without a renewal.
    """

    engine_id: str  # of the prefill process; new at each start, so a restarted worker is fenced
    request_id: str
    attempt: int
    endpoint: str  # gRPC address of the prefill worker, for the handshake only
    num_tokens: int  # the prompt's; the first sampled token's KV does not exist yet
    block_size: int
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]  # parallel to block_ids
    lease_s: float
    nonce: bytes  # makes the ticket single-use
    weight_version: str = ""


class PrefillStarted(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks are allocated and pinned, computing begins: the handle may be carried to a decode worker
    already, which can then read while the prompt is computed. At most one per (request_id, attempt).
    """

    request_id: str
    attempt: int
    kv: bytes


class PrefillResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefill worker answers. Exactly one of these per accepted (request_id, attempt).

    `kv` is None when `first` already ends the request (max_tokens=1, EOS, error): nothing is leased.
    """

    first: TokenChunk
    kv: bytes | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself when a router connects."""

    engine_id: str
    role: Role
    model_name: str
    model_digest: str
    numeric_fingerprint: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    weight_version: str = ""


class HistogramReading(msgspec.Struct, frozen=True):
    """What a histogram has counted since its process started; `counts` are per bucket, not cumulative."""

    name: str
    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds: the last is of what exceeds them all
    sum: float


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A gauge reading, sent with step frames; what placement and /metrics are fed with."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_leased_blocks: int = 0
    num_draining_blocks: int = 0
    prompt_tokens: int = 0  # counters since the process started
    generation_tokens: int = 0
    cached_tokens: int = 0
    cache_queries: int = 0
    preemptions: int = 0
    kv_bytes_pulled: int = 0
    kv_transfers: int = 0
    kv_transfer_failures: int = 0
    kv_leases_expired: int = 0
    handshake_refusals: int = 0
    kv_leases_granted: int = 0
    kv_loads_failed: int = 0  # hand-overs that ended without KV
    kv_failed_notifications: int = 0
    stale_reads_rejected: int = 0  # blocks that were reused before they had been read
    digests_rejected: int = 0  # reads whose content was not what the ledger says
    external_cache_queries: int = 0  # prompt tokens wanted from prefill workers
    external_cache_hits: int = 0  # of these, arrived and verified
    spec_drafts: int = 0  # proposals of draft tokens, one per sequence and step
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0  # draft tokens that were what the model draws
    spec_accepted_per_position: tuple[int, ...] = ()  # of these, by place in the proposal; empty: no speculation
    # Read anew a few times per second at most; the same object in between, so it need not be sent again.
    histograms: tuple[HistogramReading, ...] = ()
