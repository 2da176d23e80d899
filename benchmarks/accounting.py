"""What the workers of a deployment hold, asked over their admin interface."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time

from benchmarks.deployment import Deployment
from cluster.rpc.admin import inspect

SETTLE_TIMEOUT_S = 15.0
_WORKER_READY = re.compile(r"((?:prefill|decode)-\d+) +\| ready at ([\d.]+:\d+)")
_EMBEDDED_WORKER = re.compile(r"worker at ([\d.]+:\d+)")


def worker_addresses(running: Deployment) -> dict[str, str]:
    """name -> address, from what the launcher printed."""
    log = running.log.read_text(errors="replace")
    addresses = dict(_WORKER_READY.findall(log))
    if not addresses and (embedded := _EMBEDDED_WORKER.search(log)):
        addresses["decode-0"] = embedded[1]
    assert addresses, f"no worker has said where it listens:\n{log}"
    return addresses


def assert_settled(running: Deployment) -> None:
    """After the last answer every block is free, nothing is leased or draining and the books agree, on
    every worker, within a bounded time (a release may still be on its way)."""
    for name, address in worker_addresses(running).items():
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            state = asyncio.run(inspect(address))
            held = (state.num_requests, state.num_leases, state.num_draining, state.num_blocks - state.num_free)
            if held == (0, 0, 0, 0):
                break
            assert time.monotonic() < deadline, f"{name} still holds something: {state}"
            time.sleep(0.1)
        assert state.integrity_error == "", f"{name}: {state.integrity_error}"


async def kv_digests(address: str, token_ids: tuple[int, ...], cache_salt: str) -> tuple[int, tuple[int, ...]]:
    """How many tokens of the prompt the worker's prefix cache still covers, and the digests of their KV,
    one per KV head, over all layers."""
    salt = hashlib.blake2b(cache_salt.encode(), digest_size=16).digest()  # as the router derives it
    state = await inspect(address, token_ids, salt)
    return state.num_digest_tokens, tuple(state.kv_digests)
