"""Launch proof with a real Ray: pools placed, an actor of each pool killed, pools grown and shrunk, all under load.
Every request has exactly one end, none is lost and none differs in a bit.

    python -m benchmarks.launch_ray                  the demo model, with result lines
    python -m benchmarks.launch_ray --dry-run        the same, prints only

The reference is the same deployment before anything happens to it, with cold caches.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec

from benchmarks.deployment import Deployment, deployment
from benchmarks.drain import num_leaked, status, tell
from benchmarks.ray_head import ray_head
from benchmarks.results import Parameter, append_result
from benchmarks.streams import Tally, steady_load
from cluster.launch.control_messages import Done, Scale, WorkerStatus
from cluster.types import Role
from cluster.verify.model import VerifyOptions
from cluster.verify.side import Side, built_in_cases

NUM_CPUS = 8  # as Ray is told: what the workers may take is up to this machine
NUM_CASES = 8
MAX_TOKENS = 12
CONCURRENCY = 6
TIMEOUT_S = 300.0
REPLACED_TIMEOUT_S = 120.0
POOLS = ("prefill.replicas=2", "decode.replicas=2")
THREADS = ("prefill.engine.num_threads=1", "decode.engine.num_threads=1")


class Proof(msgspec.Struct, frozen=True):
    tally: Tally
    replaced: int  # workers whose actor was killed and that served again, under a new engine id
    scaled: int  # changes of the pools' size that were carried out
    leaked_blocks: int

    @property
    def is_good(self) -> bool:
        tally = self.tally
        return not (tally.lost or tally.not_one_end or tally.wrong or self.leaked_blocks) and tally.streams > 0


async def prove(running: Deployment, concurrency: int = CONCURRENCY, pools: Sequence[Role] = tuple(Role)) -> Proof:
    """Under a steady load: kill the actor of a worker of each of `pools`, which have two, then scale them to three and
    back."""
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        side = await Side.open(client, running.url)
        cases = await built_in_cases([side], VerifyOptions(num_prompts=NUM_CASES, max_tokens=MAX_TOKENS))
    replaced = scaled = 0
    async with steady_load(side, cases, concurrency, TIMEOUT_S) as tally:
        for role in pools:
            await asyncio.sleep(1.0)  # for streams to be in flight
            victim = (await workers(running, role))[0]
            os.kill(actor_of(victim), signal.SIGKILL)
            replaced += await until_replaced(running, victim)
        for count in (3, 2):
            answer = await tell(running, Scale(dict.fromkeys(pools, count)))
            if not isinstance(answer, Done):
                raise RuntimeError(f"scaling to {count}: {answer}")
            scaled += len(pools)
    return Proof(tally, replaced, scaled, await num_leaked(running))


async def until_replaced(running: Deployment, worker: WorkerStatus) -> bool:
    """Whether the same worker serves again as a new engine, in bounded time."""
    give_up_at = time.monotonic() + REPLACED_TIMEOUT_S
    while time.monotonic() < give_up_at:
        [now] = [each for each in await workers(running, worker.role) if each.name == worker.name]
        if now.state == "ready" and now.engine_id not in ("", worker.engine_id):
            return True
        await asyncio.sleep(0.1)
    return False


def actor_of(worker: WorkerStatus) -> int:
    """The process of the actor, which is the parent of the worker's."""
    text = Path(f"/proc/{worker.pid}/status").read_text()
    [parent] = [int(line.split()[1]) for line in text.splitlines() if line.startswith("PPid:")]
    if not Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"ray::RankActor"):
        raise RuntimeError(f"{worker.name} is no child of an actor")
    return parent


async def workers(running: Deployment, role: Role) -> list[WorkerStatus]:
    return [worker for worker in (await status(running)).workers if worker.role is role]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dry-run", action="store_true", help="append nothing")
    options = parser.parse_args()
    with ray_head(NUM_CPUS) as head:
        settings = (*POOLS, *THREADS, "launch.backend=ray", f"launch.ray.address={head.address}")
        with deployment(options.model, settings, environment=head.environment) as running:
            proof = asyncio.run(prove(running))
    sys.stdout.write(f"{proof}\n")
    is_good = proof.is_good and proof.replaced == len(Role) and proof.scaled == 2 * len(Role)
    if not options.dry_run:
        params: dict[str, Parameter] = {"launcher": "ray", "roles": "2P+2D", "model": options.model}
        params |= {"replaced": proof.replaced, "scaled": proof.scaled, "leaked_blocks": proof.leaked_blocks}
        params |= msgspec.structs.asdict(proof.tally)
        append_result("launch", "launchers_ok", int(is_good), "launchers", params)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
