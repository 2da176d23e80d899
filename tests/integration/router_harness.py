"""A router on a loopback port with fake workers behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx

from cluster.router.config import RouterConfig
from cluster.router.server import bind, run_router
from cluster.stop import Stop
from tests.fakes import ByteCodec, FakeWorker

MODEL = "fake-model"
WAIT_S = 60.0


class RunningRouter:
    def __init__(self, url: str, stop: Stop, task: asyncio.Task[None], workers: Sequence[FakeWorker]) -> None:
        self.url = url
        self.stop = stop
        self.task = task
        self.workers = workers

    async def settle(self) -> None:
        """Wait until no worker holds anything for this router; fails the test when that does not come."""
        async with asyncio.timeout(WAIT_S):
            while not all(worker.is_idle for worker in self.workers):  # noqa: ASYNC110  the fakes have no events
                await asyncio.sleep(0.01)


def config_for(**changes: object) -> RouterConfig:
    values: dict[str, object] = {
        "model_name": MODEL,
        "model_path": "unused",
        "port": 0,
        "drain_timeout_s": 5.0,
        "failover_wait_s": 0.5,
        **changes,
    }
    return RouterConfig(**values)  # type: ignore[arg-type]


@asynccontextmanager
async def running_router(
    decode: Sequence[FakeWorker], prefill: Sequence[FakeWorker] | None = None, **changes: object
) -> AsyncIterator[RunningRouter]:
    """Afterwards: everything is closed, nothing is held by any worker, no task is left."""
    config = config_for(**changes)
    for worker in decode:
        worker.peers = list(prefill or ())
    before = asyncio.all_tasks()
    stop = Stop()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    listener = bind(config.host, config.port)
    task = asyncio.create_task(
        run_router(
            config,
            ByteCodec(),
            prefill=prefill,
            decode=decode,
            listener=listener,
            stop=stop,
            on_ready=ready.set_result,
        )
    )
    workers = [*decode, *(prefill or ())]
    router = RunningRouter(await asyncio.wait_for(ready, WAIT_S), stop, task, workers)
    try:
        yield router
        await router.settle()
    finally:
        stop.request()
        await asyncio.wait_for(task, WAIT_S)
    assert all(worker.is_closed for worker in workers)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


@asynccontextmanager
async def http_client(router: RunningRouter) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.url, timeout=WAIT_S, trust_env=False) as client:
        yield client
