"""Every metric there is, as tables. vLLM's names stand for what means the same there; ours begin with
`tandem_`. docs/metrics.md is written from here (`metrics_reference.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.histogram import REQUEST_BUCKETS_S, TOKEN_BUCKETS
from cluster.types import WorkerLoad

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WORKER_STATES = ("ready", "draining", "unreachable")

# Beside model_name and engine.
EXTRA_LABELS: dict[str, tuple[str, ...]] = {
    "vllm:request_success": ("finished_reason",),
    "tandem_recoveries": ("code", "when"),
    "tandem_http_responses": ("handler", "status"),
    "tandem_handshake_refusals": ("field",),
    "tandem_workers": ("role", "state"),
    "vllm:spec_decode_num_accepted_tokens_per_pos": ("position",),
}


class RouterCounts(Protocol):
    """The router's plain counters (`RouterMetrics`)."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    num_releases: int
    num_failovers: int


WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerLoad], float]], ...] = (
    ("vllm:num_requests_running", "Sequences in the running batch.", lambda load: load.num_running),
    (
        "vllm:num_requests_waiting",
        "Sequences waiting for a place, for blocks or for their KV.",
        lambda load: load.num_waiting,
    ),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1.",
        lambda load: 1.0 - load.num_free_blocks / max(1, load.num_blocks),
    ),
    ("tandem_kv_blocks", "KV blocks of the worker.", lambda load: load.num_blocks),
    ("tandem_kv_blocks_free", "Free KV blocks, unowned cached ones included.", lambda load: load.num_free_blocks),
    ("tandem_kv_blocks_leased", "KV blocks pinned for a reader.", lambda load: load.num_leased_blocks),
    ("tandem_kv_blocks_draining", "KV blocks still open to a transfer.", lambda load: load.num_draining_blocks),
)
WORKER_COUNTERS: tuple[tuple[str, str, Callable[[WorkerLoad], float]], ...] = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda load: load.cache_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda load: load.cached_tokens),
    (
        "vllm:external_prefix_cache_queries",
        "Prompt tokens whose KV a decode worker wanted from a prefill worker.",
        lambda load: load.external_cache_queries,
    ),
    (
        "vllm:external_prefix_cache_hits",
        "Of these, the ones whose KV arrived and was verified.",
        lambda load: load.external_cache_hits,
    ),
    ("vllm:num_preemptions", "Sequences put back into the queue.", lambda load: load.preemptions),
    ("vllm:nixl_num_failed_transfers", "KV transfers that failed.", lambda load: load.kv_transfer_failures),
    (
        "vllm:nixl_num_failed_notifications",
        "Notifications to prefill workers that did not leave.",
        lambda load: load.kv_failed_notifications,
    ),
    ("vllm:nixl_num_kv_expired_reqs", "Leases that ended unread.", lambda load: load.kv_leases_expired),
    ("tandem_kv_leases", "Prompts whose KV was offered to a reader.", lambda load: load.kv_leases_granted),
    ("tandem_kv_transfers", "READs started, those of ledgers included.", lambda load: load.kv_transfers),
    ("tandem_kv_bytes_pulled", "Bytes read from prefill workers.", lambda load: load.kv_bytes_pulled),
    ("tandem_kv_loads_failed", "Hand-overs that ended without KV.", lambda load: load.kv_loads_failed),
    (
        "tandem_stale_reads_rejected",
        "Reads of blocks that had been reused meanwhile.",
        lambda load: load.stale_reads_rejected,
    ),
    (
        "tandem_digests_rejected",
        "Reads whose content had another digest than computed at the source.",
        lambda load: load.digests_rejected,
    ),
    (
        "vllm:spec_decode_num_drafts",
        "Proposals of draft tokens, one per sequence and step.",
        lambda load: load.spec_drafts,
    ),
    ("vllm:spec_decode_num_draft_tokens", "Draft tokens that were verified.", lambda load: load.spec_draft_tokens),
    (
        "vllm:spec_decode_num_accepted_tokens",
        "Of these, the ones that were what the model draws.",
        lambda load: load.spec_accepted_tokens,
    ),
    ("tandem_worker_handshake_refusals", "Peers a worker has refused.", lambda load: load.handshake_refusals),
    ("tandem_worker_prompt_tokens", "Prompt tokens a worker has computed.", lambda load: load.prompt_tokens),
    ("tandem_worker_generation_tokens", "Tokens a worker has sampled.", lambda load: load.generation_tokens),
)
WORKER_HISTOGRAMS: tuple[tuple[str, str], ...] = (
    (
        "vllm:request_queue_time_seconds",
        "From arrival at a worker to the running batch; on a decode worker the hand-over is in it.",
    ),
    ("vllm:request_prefill_time_seconds", "From the running batch to the first token, where the prompt is computed."),
    ("vllm:request_decode_time_seconds", "From the first token, or from the loaded KV, to the last token."),
    ("vllm:request_inference_time_seconds", "From the running batch to the end, or to the hand-over."),
    ("vllm:request_prefill_kv_computed_tokens", "Tokens computed for a prompt, without those from the prefix cache."),
    ("vllm:iteration_tokens_total", "Tokens computed in one step."),
    ("vllm:nixl_xfer_time_seconds", "Duration of one READ of KV, from its posting to its end."),
    ("vllm:nixl_post_time_seconds", "Time it takes to post one READ of KV."),
    ("vllm:nixl_bytes_transferred", "Bytes of one READ of KV."),
    ("vllm:nixl_num_descriptors", "Descriptors of one READ of KV."),
    ("tandem_handover_seconds", "From the arrival of a handle at a decode worker to verified KV."),
)
ROUTER_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("vllm:time_to_first_token_seconds", "From acceptance to the first token.", FIRST_TOKEN_BUCKETS_S),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", INTER_TOKEN_BUCKETS_S),
    (
        "vllm:request_time_per_output_token_seconds",
        "Mean time between the tokens of a sequence.",
        INTER_TOKEN_BUCKETS_S,
    ),
    ("vllm:e2e_request_latency_seconds", "From acceptance to the last token.", REQUEST_BUCKETS_S),
    ("vllm:request_prompt_tokens", "Prompt tokens of a sequence.", TOKEN_BUCKETS),
    ("vllm:request_generation_tokens", "Generated tokens of a sequence.", TOKEN_BUCKETS),
)
ROUTER_COUNTERS: tuple[tuple[str, str, Callable[[RouterCounts], float]], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens of accepted sequences.", lambda counts: counts.num_prompt_tokens),
    ("vllm:prompt_tokens_cached", "Of these, served from a prefix cache.", lambda counts: counts.num_cached_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda counts: counts.num_generation_tokens),
    ("tandem_releases", "Prefill results nobody read, released by the router.", lambda counts: counts.num_releases),
    ("tandem_failovers", "Attempts made on another worker after one was lost.", lambda counts: counts.num_failovers),
)
