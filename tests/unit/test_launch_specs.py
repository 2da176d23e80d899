"""What each process is told, and the monolithic process's own connection between router and worker."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from cluster.config import ClusterConfig, load_config
from cluster.control import worker_config
from cluster.errors import Overloaded
from cluster.launch.embedded import EmbeddedConnection
from cluster.launch.monolithic_config import MonolithicConfig
from cluster.launch.process import ProcessSpec
from cluster.launch.specs import process_specs
from cluster.launch.topology import plan_topology, with_ports
from cluster.model_files.source import ModelSource, SourceKind
from cluster.router import config as router_config
from cluster.rpc.base import EventSink, Inspection, RouterSession
from cluster.types import FinishReason, Request, SamplingParams, TokenChunk, WorkerInfo, WorkerLoad
from tests.worker_info import IDLE, worker_info

MODEL = ModelSource(SourceKind.GGUF, Path("/models/tiny.gguf"), name="tiny", revision="abc")


def configured(**keys: str) -> ClusterConfig:
    return load_config(overrides=[("test", key.replace("__", "."), text) for key, text in keys.items()])


def specs_of(config: ClusterConfig, directory: Path) -> list[ProcessSpec]:
    ports = iter(range(40_000, 41_000))
    topology = with_ports(plan_topology(config, num_cores=4), lambda host: next(ports))
    key_file = directory / "cluster.key"
    key_file.write_bytes(b"k" * 64)
    return process_specs(config, topology, MODEL, "served", directory, key_file)


def test_router_and_workers_agree_on_addresses_and_model(tmp_path: Path) -> None:
    specs = specs_of(configured(prefill__replicas="2", router__port="0"), tmp_path)
    assert [spec.name for spec in specs] == ["router", "prefill-0", "prefill-1", "decode-0"]
    assert [spec.command[0] for spec in specs] == ["cluster.router", "prefill", "prefill", "decode"]
    router = router_config.read_config(Path(specs[0].command[2]))
    workers = [worker_config.read_config(spec.command[2]) for spec in specs[1:]]
    addresses = [f"{worker.host}:{worker.port}" for worker in workers]
    [prefill], [decode] = router.prefill, router.decode
    members = [json.loads(Path(entry.removeprefix("file:")).read_bytes()) for entry in (prefill, decode)]
    assert [*members[0].values(), *members[1].values()] == addresses
    assert [*members[0], *members[1]] == ["prefill-0", "prefill-1", "decode-0"]
    assert len({router.port, *(worker.port for worker in workers)}) == 4
    assert {worker.model for worker in workers} == {router.model_path} == {"/models/tiny.gguf"}
    assert {worker.model_name for worker in workers} == {router.model_name} == {"served"}
    assert {worker.model_revision for worker in workers} == {"abc"}


def test_the_router_is_drained_before_the_workers(tmp_path: Path) -> None:
    router, *workers = specs_of(configured(), tmp_path)
    assert all(router.stop_order < worker.stop_order for worker in workers)


def test_every_setting_arrives(tmp_path: Path) -> None:
    config = configured(
        router__max_attempts="7",
        model__quantization="fp8",
        model__residual_dtype="float32",
        decode__engine__block_size="64",
        decode__engine__num_threads="3",
        connector__lease_s="12.5",
        connector__on_failure="fail",
        launch__drain_timeout_s="4",
        logging__level="debug",
    )
    router_spec, prefill_spec, decode_spec = specs_of(config, tmp_path)
    router = router_config.read_config(Path(router_spec.command[2]))
    decode = worker_config.read_config(decode_spec.command[2])
    assert (router.max_attempts, router.drain_timeout_s, router.log_level) == (7, 4.0, "debug")
    assert (decode.engine.block_size, decode.engine.num_threads) == (64, 3)
    assert (decode.model_quantization, decode.model_residual_dtype) == ("fp8", "float32")
    assert (decode.lease_s, decode.on_failure, decode.drain_timeout_s) == (12.5, "fail", 4.0)
    assert decode_spec.environment["OMP_NUM_THREADS"] == "3"
    assert worker_config.read_config(prefill_spec.command[2]).engine.num_threads == 4


def test_no_secret_is_in_a_command_an_environment_or_a_config(tmp_path: Path) -> None:
    for spec in specs_of(configured(), tmp_path):
        shown = " ".join([*spec.command, *spec.environment.values(), Path(spec.command[2]).read_text()])
        assert "kkkk" not in shown


def test_monolithic_is_one_process_without_addresses(tmp_path: Path) -> None:
    (spec,) = specs_of(configured(monolithic="true"), tmp_path)
    assert spec.command[0] == "cluster.launch.monolithic"
    both = msgspec.json.decode(Path(spec.command[2]).read_bytes(), type=MonolithicConfig)
    assert both.router.prefill == both.router.decode == ()
    assert both.worker.engine.num_threads == 4


class FakeWorker:
    """Keeps what it was given; the test plays the engine through `sink`."""

    def __init__(self) -> None:
        self.sinks: dict[str, EventSink] = {}
        self.cancelled: list[tuple[str, int]] = []
        self.served: list[tuple[str, int]] = []  # of those
        self.is_draining = False
        self.refusal: Overloaded | None = None

    def info(self) -> WorkerInfo:
        return worker_info()

    def load(self) -> WorkerLoad:
        return IDLE

    def submit(self, request: Request, kv: bytes | None, sink: EventSink) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.sinks[request.request_id] = sink

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        self.cancelled.append((request_id, attempt))
        if is_served:
            self.served.append((request_id, attempt))

    def release(self, request_id: str, attempt: int) -> None:
        raise AssertionError("nothing is leased in one process")

    def drain(self, timeout_s: float | None) -> int:
        raise AssertionError("the process drains the worker, not its router")

    def attach(self, session: RouterSession) -> None:
        raise AssertionError("a router in this process has no session")

    def settle(self, session: RouterSession) -> None:
        raise AssertionError("a router in this process has no session")

    async def inspect(self, token_ids: tuple[int, ...], cache_salt: bytes) -> Inspection:
        raise AssertionError("not asked")


REQUEST = Request(request_id="r", token_ids=(1, 2), sampling=SamplingParams(max_tokens=4, seed=0))


def chunk(index: int, finish_reason: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(request_id="r", attempt=0, index=index, token_ids=(index,), finish_reason=finish_reason)


async def test_an_embedded_worker_streams_until_its_terminal_chunk() -> None:
    worker = FakeWorker()
    stream = EmbeddedConnection(worker).decode(REQUEST, None)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    worker.sinks["r"](chunk(0))
    worker.sinks["r"](chunk(1, FinishReason.LENGTH))
    assert (await first).index == 0
    assert [each.index async for each in stream] == [1]
    assert worker.cancelled == []


async def test_leaving_the_stream_cancels_on_the_worker() -> None:
    worker = FakeWorker()
    stream = EmbeddedConnection(worker).decode(REQUEST, None)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    worker.sinks["r"](chunk(0))
    await first
    await stream.aclose()
    assert worker.cancelled == [("r", 0)]


async def test_a_request_of_which_nothing_more_is_wanted_is_cancelled_as_served() -> None:
    worker = FakeWorker()
    connection = EmbeddedConnection(worker)
    for is_enough in (True, False):
        stream = connection.decode(REQUEST, None)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        worker.sinks["r"](chunk(0))
        await first
        if is_enough:
            connection.enough("r", 0)
        await stream.aclose()
    assert worker.cancelled == [("r", 0), ("r", 0)]
    assert worker.served == [("r", 0)]


async def test_a_cancelled_reader_cancels_on_the_worker() -> None:
    worker = FakeWorker()
    stream = EmbeddedConnection(worker).decode(REQUEST, None)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert worker.cancelled == [("r", 0)]


async def test_a_refusal_is_a_terminal_chunk() -> None:
    worker = FakeWorker()
    worker.refusal = Overloaded("too many")
    chunks = [each async for each in EmbeddedConnection(worker).decode(REQUEST, None)]
    assert [each.finish_reason for each in chunks] == [FinishReason.ERROR]
    assert chunks[0].error is not None
    assert chunks[0].error.code == "overloaded"
    assert worker.cancelled == []


async def test_an_embedded_connection_is_ready_until_drained_or_closed() -> None:
    worker = FakeWorker()
    connection = EmbeddedConnection(worker)
    states = [connection.is_ready]
    worker.is_draining = True
    states.append(connection.is_ready)
    worker.is_draining = False
    states.append(connection.is_ready)
    await connection.close()
    states.append(connection.is_ready)
    assert states == [True, False, True, False]
