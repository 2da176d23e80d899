"""/metrics, /health, /load, /version: what dashboards and probes read."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.types import Role
from tests.fakes import FakeWorker
from tests.integration.router_harness import MODEL, http_client, running_router

OF_WORKERS = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"),
    *("vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_kv_expired_reqs_total"),
    *("tandem_worker_ready", "tandem_worker_in_flight", "tandem_kv_blocks_free", "tandem_kv_bytes_pulled_total"),
)


async def samples_after_requests() -> dict[tuple[str, ...], float]:
    decode, prefill = [FakeWorker(Role.DECODE, "d0")], [FakeWorker(Role.PREFILL, "p0")]
    async with running_router(decode, prefill) as router, http_client(router) as client:
        for fields in ({"max_tokens": 5}, {"max_tokens": 3, "n": 2}):
            await client.post("/v1/completions", json={"prompt": list(range(32)), **fields})
        text = (await client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == MODEL
            rest = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[(sample.name, *rest)] = sample.value
    return found


async def test_metrics_have_vllms_names_and_count_requests() -> None:
    samples = await samples_after_requests()
    for name in OF_WORKERS:
        assert (name, "decode-0") in samples
        assert (name, "prefill-0") in samples
    assert samples["vllm:prompt_tokens_total", "router"] == 3 * 32
    assert samples["vllm:prompt_tokens_cached_total", "router"] == 3 * 32
    assert samples["vllm:generation_tokens_total", "router"] == 11
    assert samples["vllm:request_success_total", "router", "length"] == 3
    assert samples["vllm:request_success_total", "router", "abort"] == 0
    for name, count in (
        ("vllm:time_to_first_token_seconds", 3),
        ("vllm:inter_token_latency_seconds", 8),
        ("vllm:e2e_request_latency_seconds", 3),
        ("vllm:request_prompt_tokens", 3),
        ("vllm:request_generation_tokens", 3),
    ):
        assert samples[f"{name}_count", "router"] == count
    assert samples["vllm:request_generation_tokens_bucket", "router", "2.0"] == 0
    assert samples["vllm:request_generation_tokens_bucket", "router", "5.0"] == 3


@pytest.mark.parametrize("lost", ["d0", "p0"])
async def test_health_needs_every_configured_pool(lost: str) -> None:
    decode, prefill = FakeWorker(Role.DECODE, "d0"), FakeWorker(Role.PREFILL, "p0")
    async with running_router([decode], [prefill]) as router, http_client(router) as client:
        assert (await client.get("/health")).status_code == 200
        worker = {"d0": decode, "p0": prefill}[lost]
        worker.is_up = False
        answer = await client.get("/health")
        assert answer.status_code == 503
        assert lost in answer.json()["error"]["message"]
        worker.is_up = True
        assert (await client.get("/load")).json() == {"server_load": 0, "workers": {"prefill-0": 0, "decode-0": 0}}
        assert (await client.get("/version")).json()["version"]
