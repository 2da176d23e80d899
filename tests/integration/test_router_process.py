"""`python -m cluster.router` as its launcher sees it, with workers behind real gRPC."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.router.config import RouterConfig
from cluster.router.server import bind
from cluster.rpc.base import EventSink, Inspection, RouterSession
from cluster.rpc.server import WorkerServer
from cluster.tokenizer.token_bytes import byte_level_bytes
from cluster.types import Request, Role, WorkerInfo, WorkerLoad
from tests.fakes import FakeWorker, expected_tokens

PROMPT = list(range(40))
WAIT_S = 60.0


class ServedFake:
    """A `FakeWorker` in a worker's clothes: what `WorkerServer` needs."""

    is_draining = False

    def __init__(self, worker: FakeWorker, group: asyncio.TaskGroup) -> None:
        self.worker = worker
        self._group = group
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    def info(self) -> WorkerInfo:
        assert self.worker.info is not None
        return self.worker.info

    def load(self) -> WorkerLoad:
        assert self.worker.load is not None
        return self.worker.load

    def submit(self, request: Request, kv: bytes | None, sink: EventSink) -> None:
        key = (request.request_id, request.attempt)
        self._tasks[key] = self._group.create_task(self._run(request, kv, sink))

    async def _run(self, request: Request, kv: bytes | None, sink: EventSink) -> None:
        if self.worker.role is Role.PREFILL:
            async for event in self.worker.prefill(request):
                sink(event)
        else:
            async for chunk in self.worker.decode(request, kv):
                sink(chunk)

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        task = self._tasks.pop((request_id, attempt), None)
        if task is not None:
            task.cancel()

    def release(self, request_id: str, attempt: int) -> None:
        self.worker.release(request_id, attempt)

    def drain(self, timeout_s: float | None) -> int:
        return 0

    def attach(self, session: RouterSession) -> None:
        pass

    def settle(self, session: RouterSession) -> None:
        pass

    async def inspect(self, token_ids: tuple[int, ...], cache_salt: bytes) -> Inspection:
        raise NotImplementedError


def write_model(directory: Path) -> None:
    """A byte-level tokenizer whose ids are bytes, as in `tests.fakes`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=byte_level_bytes)
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    (directory / "model.safetensors").write_bytes(b"")


@asynccontextmanager
async def router_process(
    directory: Path, port: int, prefill: tuple[str, ...], decode: tuple[str, ...]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[dict[str, str]]]]:
    """The process and its events up to the one that says whether it serves."""
    config = RouterConfig(
        model_name="m", model_path=str(directory), port=port, prefill=prefill, decode=decode, drain_timeout_s=5.0
    )
    path = directory / "router.json"
    path.write_bytes(msgspec.json.encode(config))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster.router", "--config", str(path)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    events: list[dict[str, str]] = []
    try:
        async with asyncio.timeout(WAIT_S):
            while not events or events[-1]["event"] == "progress":
                events.append(json.loads(await process.stdout.readline()))
        yield process, events
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_serves_over_grpc_drains_on_sigterm_and_leaves(tmp_path: Path) -> None:
    write_model(tmp_path)
    fakes = [FakeWorker(Role.PREFILL, "p0"), FakeWorker(Role.DECODE, "d0", step_s=0.005)]
    fakes[1].peers = [fakes[0]]
    async with asyncio.TaskGroup() as group:
        served = [ServedFake(fake, group) for fake in fakes]
        async with WorkerServer(served[0], served[0]) as prefill, WorkerServer(served[1], served[1]) as decode:
            addresses = [await server.listen("127.0.0.1", 0) for server in (prefill, decode)]
            async with router_process(tmp_path, 0, (addresses[0],), (addresses[1],)) as (process, events):
                assert events[-1]["event"] == "ready"
                url = f"http://{events[-1]['address']}"
                assert events[-1]["detail"] == url
                await _wait_until_healthy(url)
                await _chat_works(url)
                await _stream_survives_sigterm(url, process)
                assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
    assert all(fake.is_idle for fake in fakes)


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=WAIT_S)


async def _wait_until_healthy(url: str) -> None:
    async with client_of(url) as client, asyncio.timeout(WAIT_S):
        while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110  another process has no events
            await asyncio.sleep(0.05)


async def _chat_works(url: str) -> None:
    async with client_of(url) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "seed": 4, "max_tokens": 6}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        expected = bytes(expected_tokens(list(b"<user>hi"), 4, 6)).decode()
        assert answer["choices"][0]["message"]["content"] == expected
        tokenized = (await client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        assert tokenized["tokens"] == list("hé".encode())
        assert tokenized["max_model_len"] == 2048
        assert (await client.post("/detokenize", json={"tokens": tokenized["tokens"]})).json() == {"prompt": "hé"}


async def _stream_survives_sigterm(url: str, process: asyncio.subprocess.Process) -> None:
    """Also when it is told twice: by who stops the whole group of processes, and by its launcher."""
    body = {"prompt": PROMPT, "seed": 9, "max_tokens": 60, "stream": True, "return_token_ids": True}
    token_ids: list[int] = []
    num_told, is_done = 0, False
    async with (
        client_of(url) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            is_done = is_done or line == "data: [DONE]"
            if line.startswith("data: {"):
                token_ids += json.loads(line[6:])["choices"][0]["token_ids"]
                if len(token_ids) >= 5 * (num_told + 1) and num_told < 2:
                    num_told += 1
                    process.send_signal(signal.SIGTERM)
    assert token_ids == expected_tokens(PROMPT, 9, 60)
    assert is_done
    assert num_told == 2


async def test_taken_port_is_one_failed_event(tmp_path: Path) -> None:
    write_model(tmp_path)
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        async with router_process(tmp_path, port, (), ("127.0.0.1:1",)) as (process, events):
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 1
    assert [event["event"] for event in events] == ["failed"]
    assert events[0]["code"] == "startup_error"
    assert f"port {port} on 127.0.0.1 is already taken" in events[0]["message"]
