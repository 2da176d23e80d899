"""/metrics, /health, /load, /version: what dashboards and probes read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.histogram import Histogram
from cluster.types import Role
from tests.fakes import FakeWorker
from tests.integration.router_harness import MODEL, http_client, running_router

DOCS = Path(__file__).parents[2] / "docs"
OF_WORKERS = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"),
    *("vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_kv_expired_reqs_total"),
    *("tandem_worker_ready", "tandem_worker_in_flight", "tandem_kv_blocks_free", "tandem_kv_bytes_pulled_total"),
)


async def samples_after_requests(tokens_per_chunk: int = 1) -> dict[tuple[str, ...], float]:
    decode, prefill = [FakeWorker(Role.DECODE, "d0")], [FakeWorker(Role.PREFILL, "p0")]
    decode[0].tokens_per_chunk = tokens_per_chunk
    decode[0].accepted_per_position = (7, 2)
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


async def test_every_answer_is_counted_with_its_status() -> None:
    """Also requests that are refused before there is a sequence."""
    decode = [FakeWorker(Role.DECODE, "d0")]
    async with running_router(decode) as router, http_client(router) as client:
        body = {"prompt": [1, 2, 3], "max_tokens": 2}
        await client.post("/v1/completions", json=body)
        await client.post("/v1/completions", json={**body, "stream": True})
        await client.post("/v1/completions", json={**body, "temperature": -1})
        decode[0].is_up = False
        assert (await client.post("/v1/completions", json=body)).status_code == 503
        await client.get("/health")
        text = (await client.get("/metrics")).text
        decode[0].is_up = True
    counted = {
        (sample.labels["handler"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tandem_http_responses_total"
    }
    assert counted == {
        ("/v1/completions", "200"): 2,
        ("/v1/completions", "400"): 1,
        ("/v1/completions", "503"): 1,
        ("/health", "503"): 1,
    }


@pytest.mark.parametrize("tokens_per_chunk", [1, 3])
async def test_metrics_have_vllms_names_and_count_requests(tokens_per_chunk: int) -> None:
    samples = await samples_after_requests(tokens_per_chunk)
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
    assert samples["vllm:spec_decode_num_accepted_tokens_total", "decode-0"] == 9
    for position, count in (("0", 7), ("1", 2)):
        assert samples["vllm:spec_decode_num_accepted_tokens_per_pos_total", "decode-0", position] == count


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


async def test_every_documented_metric_exists_on_a_running_router() -> None:
    decode, prefill = FakeWorker(Role.DECODE, "d0"), FakeWorker(Role.PREFILL, "p0")
    async with running_router([decode], [prefill]) as router, http_client(router) as client:
        text = (await client.get("/metrics")).text
    documented = re.findall(r"^\| `(\S+)` \| (\w+) \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    assert len(documented) > 50
    for name, kind in documented:
        assert f"# TYPE {name} {kind}\n" in text, name


async def test_histograms_of_workers_are_shown_under_their_names() -> None:
    decode, prefill = FakeWorker(Role.DECODE, "d0"), FakeWorker(Role.PREFILL, "p0")
    histogram = Histogram("vllm:request_queue_time_seconds", (0.1, 1.0))
    stranger = Histogram("evil metric", (0.1,))
    for value in (0.05, 0.5, 5.0):
        histogram.observe(value)
    decode.histograms = (histogram.reading(), stranger.reading())
    async with running_router([decode], [prefill]) as router, http_client(router) as client:
        text = (await client.get("/metrics")).text
    labels = f'engine="decode-0",le="%s",model_name="{MODEL}"'
    for bound, count in (("0.1", 1.0), ("1.0", 2.0), ("+Inf", 3.0)):
        assert f"vllm:request_queue_time_seconds_bucket{{{labels % bound}}} {count}\n" in text
    assert "evil" not in text


async def test_workers_are_counted_by_state() -> None:
    decode = [FakeWorker(Role.DECODE, f"d{index}") for index in range(3)]
    prefill = [FakeWorker(Role.PREFILL, "p0")]
    decode[1].is_up = False
    async with running_router(decode, prefill) as router, http_client(router) as client:
        text = (await client.get("/metrics")).text
        decode[1].is_up = True
    for role, state, count in (("decode", "ready", 2), ("decode", "unreachable", 1), ("prefill", "ready", 1)):
        labels = f'engine="router",model_name="{MODEL}",role="{role}",state="{state}"'
        assert f"tandem_workers{{{labels}}} {count}.0\n" in text


async def test_a_lost_worker_is_counted_as_a_failover() -> None:
    decode = [FakeWorker(Role.DECODE, f"d{index}") for index in range(2)]
    decode[0].dies_at = 3
    async with running_router(decode, [FakeWorker(Role.PREFILL, "p0")]) as router, http_client(router) as client:
        for at in range(16):  # prompts are spread over the workers by their beginning
            answer = await client.post("/v1/completions", json={"prompt": [at] * 32, "max_tokens": 6})
            assert answer.status_code == 200
        text = (await client.get("/metrics")).text
    assert not decode[0].is_up, "no prompt went there"
    assert f'tandem_failovers_total{{engine="router",model_name="{MODEL}"}} 1.0\n' in text
