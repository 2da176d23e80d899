"""What workers measure of a hand-over, by counting what was done to them."""

from __future__ import annotations

from cluster.control.driver import WorkerDriver
from cluster.router.metric_tables import WORKER_HISTOGRAMS
from tests.integration.handover_harness import Pair, prompt


def counts(driver: WorkerDriver) -> dict[str, int]:
    return {reading.name: sum(reading.counts) for reading in driver.histograms()}


def sums(driver: WorkerDriver) -> dict[str, float]:
    return {reading.name: reading.sum for reading in driver.histograms()}


def test_each_side_times_its_part_of_a_request() -> None:
    pair = Pair()
    for at in range(3):
        pair.split(prompt(f"r{at}", 70, seed=at, max_tokens=5))
    prefill, decode = counts(pair.prefill.driver), counts(pair.decode)
    assert prefill["vllm:request_queue_time_seconds"] == 3
    assert prefill["vllm:request_prefill_time_seconds"] == 3
    assert prefill["vllm:request_decode_time_seconds"] == 0, "it hands over instead"
    assert prefill["vllm:request_inference_time_seconds"] == 3
    assert decode["vllm:request_queue_time_seconds"] == 3
    assert decode["vllm:request_prefill_time_seconds"] == 0, "their KV was loaded"
    assert decode["vllm:request_decode_time_seconds"] == 3
    assert decode["vllm:request_inference_time_seconds"] == 3
    assert decode["tandem_handover_seconds"] == 3
    assert set(prefill) | set(decode) == {name for name, _ in WORKER_HISTOGRAMS}


def test_tokens_computed_and_tokens_pulled() -> None:
    pair = Pair()
    pair.split(prompt("first", 100, max_tokens=5))
    assert sums(pair.prefill.driver)["vllm:request_prefill_kv_computed_tokens"] == 100
    assert sums(pair.prefill.driver)["vllm:iteration_tokens_total"] == 100
    assert sums(pair.decode)["vllm:iteration_tokens_total"] == 4, "the first token came from the prefill worker"
    counters = pair.decode.counters
    assert counters.external_cache_queries == counters.external_cache_hits == 100
    pair.split(prompt("second", 100, max_tokens=5))
    assert 0 < counters.external_cache_hits - 100 < 100, "the prefix was there already"
    assert sums(pair.prefill.driver)["vllm:request_prefill_kv_computed_tokens"] < 200
    assert pair.prefill.driver.counters.kv_leases_granted == 2


def test_only_reads_of_kv_are_in_the_transfer_histograms() -> None:
    pair = Pair()
    pair.split(prompt("r", 100, max_tokens=5))
    measured, counters = counts(pair.decode), pair.decode.counters
    num_reads = measured["vllm:nixl_xfer_time_seconds"]
    assert num_reads == measured["vllm:nixl_post_time_seconds"] == measured["vllm:nixl_num_descriptors"] >= 1
    assert counters.kv_transfers > num_reads, "a ledger was read too"
    assert sums(pair.decode)["vllm:nixl_bytes_transferred"] < counters.kv_bytes_pulled


def test_rejected_reads_are_counted() -> None:
    pair = Pair()
    request = prompt("r", 100, max_tokens=5)
    result = pair.compute(request)
    pair.prefill.driver.engine.kv_cache.kv_NL2HSD[:] = 1
    pair.start_decode(request, result)
    pair.run()
    assert pair.decode.counters.digests_rejected >= 1
    assert pair.decode.counters.kv_loads_failed == 1
    assert pair.decode.counters.external_cache_queries == 100
    assert pair.decode.counters.external_cache_hits == 0


def test_histograms_are_published_at_most_twice_a_second() -> None:
    pair = Pair()
    pair.split(prompt("first", 40, max_tokens=5))
    told = pair.decode.turn(pair.now + 1.0)
    assert told is not None
    pair.start_decode(request := prompt("second", 40, max_tokens=5), pair.compute(request))
    soon = pair.decode.turn(pair.now + 1.2)
    assert soon is not None
    assert soon.load.histograms is told.load.histograms, "the same object need not be sent again"
    pair.run()
    later = pair.decode.turn(pair.now + 2.0)
    assert later is not None
    assert later.load.histograms != told.load.histograms
