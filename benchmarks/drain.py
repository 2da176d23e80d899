"""Drain proof: every worker of 2P+2D is drained and replaced under load; no answer is lost or differs in a bit.

    python -m benchmarks.drain                  200 streams, with result lines
    python -m benchmarks.drain --streams 16     a small one, prints only

The reference is the same deployment before the first drain, with cold caches.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import httpx
import msgspec

from benchmarks.deployment import Deployment, deployment
from benchmarks.results import Parameter, append_result
from benchmarks.streams import stream
from cluster.errors import ConfigError
from cluster.launch.control_messages import Answer, Command, Done, Drain, Scale, Status
from cluster.launch.control_messages import Deployment as DeploymentStatus
from cluster.launch.control_socket import ask, find_launch
from cluster.rpc.admin import inspect
from cluster.verify.model import Case, Output, VerifyOptions
from cluster.verify.side import Side, built_in_cases

NUM_STREAMS = 200
MAX_TOKENS = 12
CONCURRENCY = 8
SETTLE_S = 15.0
TIMEOUT_S = 300.0
SETTINGS = ("prefill.replicas=2", "decode.replicas=2")


class Outcome(msgspec.Struct, frozen=True):
    streams: int
    lost: int  # no finish reason, an error, or a refusal
    wrong: int  # token ids or logprob bits differ from the undisturbed run
    leaked_blocks: int
    replaced: int  # workers
    drained_under_load: int  # workers that were told to drain while streams ran


class _Load:
    """All streams, `CONCURRENCY` at a time."""

    def __init__(self, client: httpx.AsyncClient, side: Side, cases: tuple[Case, ...], salt: str) -> None:
        self.num_done = 0
        self.outputs: dict[int, Output | None] = {}
        self._client, self._side, self._cases, self._salt = client, side, cases, salt

    async def run(self) -> list[Output | None]:
        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(index: int, case: Case) -> None:
            async with gate:
                self.outputs[index] = (await stream(self._client, self._side, case, self._salt)).output
                self.num_done += 1

        async with asyncio.TaskGroup() as group:
            for index, case in enumerate(self._cases):
                group.create_task(one(index, case))
        return [self.outputs[index] for index in range(len(self._cases))]


async def prove(running: Deployment, num_streams: int) -> Outcome:
    """Undisturbed, then disturbed; compare; look at every block."""
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        side = await Side.open(client, running.url)
        cases = await built_in_cases([side], VerifyOptions(num_prompts=num_streams, max_tokens=MAX_TOKENS))
        undisturbed = await _Load(client, side, cases, "undisturbed").run()
        load = _Load(client, side, cases, "disturbed")
        disturbed = asyncio.create_task(load.run())
        replaced, under_load = await _replace_all(running, load, num_streams)
        outputs = await disturbed
    if any(output is None for output in undisturbed):
        raise ConfigError("the undisturbed run lost streams")
    lost = sum(output is None for output in outputs)
    wrong = sum(got is not None and got != expected for got, expected in zip(outputs, undisturbed, strict=True))
    return Outcome(num_streams, lost, wrong, await num_leaked(running), replaced, under_load)


async def _replace_all(running: Deployment, load: _Load, num_streams: int) -> tuple[int, int]:
    """Each of the first workers in turn, spread over the streams: drain, then start another."""
    first = (await status(running)).workers
    under_load = 0
    for turn, worker in enumerate(first):
        while load.num_done < turn * num_streams // (len(first) + 1):  # noqa: ASYNC110  many tasks count
            await asyncio.sleep(0.02)
        under_load += load.num_done < num_streams
        for command in (Drain(worker.name), Scale({worker.role: 2})):
            answer = await tell(running, command)
            if not isinstance(answer, Done):
                raise ConfigError(f"{command}: {answer}")
    now = {worker.engine_id for worker in (await status(running)).workers}
    return len(first) - len(now & {worker.engine_id for worker in first}), under_load


async def num_leaked(running: Deployment) -> int:
    """Blocks that are not free when everything has settled, or SETTLE_S later."""
    addresses = [worker.address for worker in (await status(running)).workers]
    give_up_at = asyncio.get_running_loop().time() + SETTLE_S
    while True:
        states = [await inspect(address) for address in addresses]
        leaked = sum(state.num_blocks - state.num_free for state in states)
        if errors := [state.integrity_error for state in states if state.integrity_error]:
            raise ConfigError(f"the books of a worker do not agree: {errors[0]}")
        if leaked == 0 or asyncio.get_running_loop().time() > give_up_at:
            return leaked
        await asyncio.sleep(0.1)


async def status(running: Deployment) -> DeploymentStatus:
    answer = await tell(running, Status())
    assert isinstance(answer, DeploymentStatus)
    return answer


async def tell(running: Deployment, command: Command) -> Answer:
    return await asyncio.to_thread(ask, find_launch(running.launcher.pid), command, lambda what: None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=NUM_STREAMS)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with deployment(options.model, SETTINGS) as running:
        outcome = asyncio.run(prove(running, options.streams))
    sys.stdout.write(f"{outcome}\n")
    if options.streams >= NUM_STREAMS:
        params: dict[str, Parameter] = {"roles": "2P+2D", "model": options.model, "replaced": outcome.replaced}
        params |= {"drained_under_load": outcome.drained_under_load, "max_tokens": MAX_TOKENS}
        for metric in ("streams", "lost", "wrong", "leaked_blocks"):
            unit = "blocks" if metric == "leaked_blocks" else "streams"
            append_result("drain", metric, getattr(outcome, metric), unit, params)
    return 1 if outcome.lost or outcome.wrong or outcome.leaked_blocks else 0


if __name__ == "__main__":
    sys.exit(main())
