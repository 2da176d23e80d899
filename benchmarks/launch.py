"""Launch proof: 2P+1D as four ranks of each outer launcher serves the demo with the bits of one process, drains
without losing a stream, ends when a rank is killed, and refuses a wrong number of ranks.

    python -m benchmarks.launch                          every launcher, with result lines
    python -m benchmarks.launch torchrun --dry-run       one, prints only

`slurm-env` and `lws-env` have the variables of srun and of a LeaderWorkerSet without their controllers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from benchmarks.outer_launchers import Job, descendants, is_available, running_job
from benchmarks.processes import wait_gone
from benchmarks.results import Parameter, append_result
from benchmarks.streams import Streamed, stream
from cluster.launch.companion import monolithic_companion
from cluster.launch.ports import choose_free_port
from cluster.verify.model import Case, Output, VerifyOptions
from cluster.verify.side import Side, built_in_cases

MODEL = "demo"
NUM_RANKS = 4
NUM_PROMPTS, MAX_TOKENS, CONCURRENCY = 24, 12, 8
NUM_STREAMS, STREAM_TOKENS = 8, 96
START_S, END_S, WRONG_WORLD_S = 300.0, 90.0, 10.0
TIMEOUT_S = 300.0
VICTIM = (2, "prefill-1")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """`problem` empty: all of it holds."""

    problem: str = ""
    equal_prompts: int = 0
    whole_streams: int = 0  # of those that ran while the job was told to stop
    drain_s: float = 0.0
    killed_rank_s: float = 0.0  # from the death of one rank to the end of the last one
    wrong_world_s: float = 0.0


class Reference(msgspec.Struct, frozen=True):
    """What one process answers."""

    cases: tuple[Case, ...]
    outputs: tuple[Output, ...]
    long_cases: tuple[Case, ...]
    long_outputs: tuple[Output, ...]


async def ask_one_process(url: str) -> Reference:
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        side = await Side.open(client, url)
        cases = await built_in_cases([side], VerifyOptions(num_prompts=NUM_PROMPTS, max_tokens=MAX_TOKENS))
        long = await built_in_cases([side], VerifyOptions(num_prompts=NUM_STREAMS, max_tokens=STREAM_TOKENS))
        outputs = await side.generate(cases, CONCURRENCY, 2)
        return Reference(cases, outputs, long, await side.generate(long, CONCURRENCY, 2))


@contextmanager
def job_of(launcher: str, num_ranks: int = NUM_RANKS) -> Iterator[tuple[Job, str]]:
    port = choose_free_port("127.0.0.1")
    arguments = ["launch", MODEL, "--prefill", "2", "--decode", "1", "--port", str(port)]
    with (
        tempfile.TemporaryDirectory(prefix="tandem-launch-proof-") as directory,
        running_job(launcher, num_ranks, arguments, Path(directory)) as job,
    ):
        yield job, f"http://127.0.0.1:{port}"


async def serve_and_drain(job: Job, url: str, reference: Reference) -> tuple[int, int, float]:
    """How many prompts are equal, how many streams whole and equal, and how long the end took."""
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        side = await Side.open(client, url)
        outputs = await side.generate(reference.cases, CONCURRENCY, 2)
        num_equal = sum(got == expected for got, expected in zip(outputs, reference.outputs, strict=True))
        streams = [asyncio.create_task(stream(client, side, case, "drain")) for case in reference.long_cases]
        while not await _all_running(client, url):  # noqa: ASYNC110  the router counts them
            await asyncio.sleep(0.02)
        assert not any(task.done() for task in streams), "a stream was over before the stop"
        stopped_at = time.monotonic()
        job.drain()
        results = await asyncio.gather(*streams)
    exit_codes = await asyncio.to_thread(job.wait, END_S)
    if job.launcher != "torchrun":  # which calls a stop by a signal a failure of its own
        assert set(exit_codes) == {0}, f"exit codes {exit_codes}:\n{job.log_tail()}"
    num_whole = sum(got == Streamed(expected, 1) for got, expected in zip(results, reference.long_outputs, strict=True))
    return num_equal, num_whole, time.monotonic() - stopped_at


async def _all_running(client: httpx.AsyncClient, url: str) -> bool:
    page = (await client.get(f"{url}/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith("vllm:num_requests_running") and "decode-0" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) >= NUM_STREAMS


def check_serving(launcher: str, reference: Reference) -> Outcome:
    with job_of(launcher) as (job, url):
        job.wait_for(f"Serving {MODEL} at", START_S)
        assert sorted(job.rank_pids()) == list(range(NUM_RANKS))
        below = [process.pid for process in job.outer] + descendants([process.pid for process in job.outer])
        num_equal, num_whole, drain_s = asyncio.run(serve_and_drain(job, url, reference))
        wait_gone(below, END_S)
        assert list(job.log.parent.glob("tandem-launch-*")) == [], "a private directory is left"
    if num_equal != NUM_PROMPTS or num_whole != NUM_STREAMS:
        return Outcome(
            problem="answers are lost or differ from those of one process",
            equal_prompts=num_equal,
            whole_streams=num_whole,
        )
    return Outcome(equal_prompts=num_equal, whole_streams=num_whole, drain_s=drain_s)


def check_killed_rank(launcher: str) -> float:
    """The others end in a bounded time and say which rank is gone, and where."""
    rank, name = VICTIM
    with job_of(launcher) as (job, _):
        job.wait_for(f"Serving {MODEL} at", START_S)
        below = descendants([process.pid for process in job.outer])
        killed_at = time.monotonic()
        os.kill(job.rank_pids()[rank], signal.SIGKILL)
        exit_codes = job.wait(END_S)
        seconds = time.monotonic() - killed_at
        assert all(exit_codes), f"exit codes {exit_codes}"
        said = [line for line in job.lines if f"rank {rank} ({name}) on" in line and "is gone" in line]
        assert len(said) >= NUM_RANKS - 1, f"not every rank says why:\n{job.log_tail()}"
        wait_gone(below, END_S)  # private directories of killed ranks stay for the next launch: mpirun kills after 1 s
    return seconds


def check_wrong_world(launcher: str) -> float:
    started_at = time.monotonic()
    with job_of(launcher, NUM_RANKS - 1) as (job, _):
        exit_codes = job.wait(END_S)
        seconds = time.monotonic() - started_at
        assert all(exit_codes), f"exit codes {exit_codes}"
        told = [line for line in job.lines if line.startswith("configuration: ")]
        assert len(told) == 1, f"{len(told)} messages:\n{job.log_tail()}"
        assert "started 3 ranks, but this configuration means 4 ranks" in told[0]
        assert seconds < WRONG_WORLD_S, f"it took {seconds:.1f} s"
    return seconds


def prove_ranks(launcher: str, reference: Reference) -> Outcome:
    """All of it for one launcher of ranks."""
    try:
        outcome = check_serving(launcher, reference)
        if outcome.problem:
            return outcome
        return msgspec.structs.replace(
            outcome, killed_rank_s=check_killed_rank(launcher), wrong_world_s=check_wrong_world(launcher)
        )
    except (AssertionError, subprocess.TimeoutExpired, httpx.HTTPError) as error:
        return Outcome(problem=str(error))


# Another way in, such as Ray, is one more line here.
LAUNCHERS: dict[str, Callable[[str, Reference], Outcome]] = {
    "torchrun": prove_ranks,
    "mpirun": prove_ranks,
    "slurm-env": prove_ranks,
    "lws-env": prove_ranks,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launchers", nargs="*", metavar="LAUNCHER", help=f"of {', '.join(LAUNCHERS)}; all if none")
    parser.add_argument("--dry-run", action="store_true", help="append nothing")
    options = parser.parse_args()
    names = options.launchers or list(LAUNCHERS)
    if unknown := [name for name in names if name not in LAUNCHERS]:
        parser.error(f"not known: {', '.join(unknown)}")
    if missing := [name for name in names if not is_available(name)]:
        parser.error(f"not installed: {', '.join(missing)}")
    with monolithic_companion(MODEL) as url:
        reference = asyncio.run(ask_one_process(url))
    num_failed = 0
    for name in names:
        outcome = LAUNCHERS[name](name, reference)
        sys.stdout.write(f"{name}: {outcome}\n")
        num_failed += bool(outcome.problem)
        if not options.dry_run:
            params: dict[str, Parameter] = {"launcher": name, "roles": "2P+1D", "ranks": NUM_RANKS, "model": MODEL}
            params |= {key: value for key, value in msgspec.structs.asdict(outcome).items() if key != "problem"}
            append_result("launch", "launchers_ok", int(not outcome.problem), "launchers", params)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
