"""A worker process from its command line to its exit code; `python -m prefill` and `python -m decode`
differ in the `RoleParts` they pass.

    read config -> load model -> engine, transport, driver -> listen -> ready event -> serve -> drain -> exit
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch

from cluster.addresses import join_address
from cluster.control.draft_model import load_draft_model
from cluster.control.driver import WorkerDriver
from cluster.control.handshake import HandshakeClient, HandshakeServer
from cluster.control.host import WorkerHost
from cluster.control.identity import kv_identity
from cluster.control.worker_config import WorkerConfig, read_cluster_key, read_config
from cluster.engine.engine import Engine
from cluster.engine.kernels import fingerprint, get_ops
from cluster.engine.kernels.cuda_select import keep_compiled_kernels
from cluster.engine.models.config import WeightFormat
from cluster.engine.models.loader import load_model, read_model_files
from cluster.engine.models.residual import residual_dtype
from cluster.engine.parallel.group import SingleRank
from cluster.engine.scheduler import Policy
from cluster.errors import ConfigError, StartupError, TandemError
from cluster.listening import family_of, why_not_listening
from cluster.logs import configure_logging
from cluster.model_files.source import resolve_model
from cluster.process_events import Progress, ShowProgress, emit, emit_failure, emit_ready
from cluster.rpc import limits
from cluster.rpc.server import WorkerServer
from cluster.stop import Stop
from cluster.types import Role, WorkerInfo
from kvconnector.base import Transport
from kvconnector.core.handshake import KVIdentity
from kvconnector.mapping import Shard

logger = logging.getLogger(__name__)

PROGRESS_PAUSE_S = 0.1
HUNG_S = 300.0  # far more than a step takes, kernels that are compiled for it included
# For routers to take what is pending when the worker ends; one that is silent for longer is gone.
LAST_FRAMES_S = limits.HEARTBEAT_S * limits.MAX_SILENT_TICKS


class RoleParts(Protocol):
    """What makes a worker a prefill or a decode worker."""

    role: Role

    def make_policy(self) -> Policy: ...

    def make_driver(
        self, engine: Engine, transport: Transport, config: WorkerConfig, cluster_key: bytes, engine_id: str
    ) -> WorkerDriver: ...

    def set_endpoint(self, driver: WorkerDriver, endpoint: str) -> None:
        """Where peers reach this worker; called before the first request."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """Everything that takes long to make. Owns the engine and the transport until it is served."""

    config: WorkerConfig
    parts: RoleParts
    info: WorkerInfo
    identity: KVIdentity
    transport: Transport
    driver: WorkerDriver


@dataclass(frozen=True, slots=True)
class ServedWorker:
    address: str
    host: WorkerHost
    server: WorkerServer


def load_worker(
    config: WorkerConfig, parts: RoleParts, show: ShowProgress = lambda what, done, total: None
) -> LoadedWorker:
    """Load model and kernels, allocate the KV pool, register it. Blocks; raises errors of our tree."""
    _refuse_idle_speculation(config, parts.role)
    cluster_key = read_cluster_key(config) if config.transport != "loopback" else secrets.token_bytes(32)
    _check_port_free(config.host, config.port)
    engine_id = f"{parts.role.value}-{secrets.token_hex(8)}"
    torch.set_num_threads(1)  # the kernels bring their own threads, torch's would only contend with them
    source = resolve_model(config.model, lambda done, total: show("fetching the model", done, total))
    source = msgspec.structs.replace(source, revision=config.model_revision or source.revision)
    show("admitting kernels", 0, 0)
    if config.engine.device.startswith("cuda"):
        keep_compiled_kernels()
    files = read_model_files(source)
    residual = residual_dtype(config.model_residual_dtype, config.engine.device, files.config.hidden_size)
    ops = get_ops(config.engine.device, config.engine.num_threads, residual)
    if ops.device.type == "cuda":
        torch.cuda.set_device(ops.device)  # where kernels start that are not told
    loaded = load_model(
        files,
        ops,
        SingleRank(),
        torch.device(config.engine.device),
        max_position=config.engine.max_model_len,
        quantization=config.model_quantization,
        progress=lambda done, total: show("loading weights", done, total),
        hashing=lambda done, total: show("hashing weights", done, total),
    )
    numeric_fingerprint = fingerprint(
        ops,
        with_fp8=loaded.config.weight_format is not WeightFormat.BF16,
        with_latent=loaded.config.latent is not None,
        num_threads=config.engine.compile_threads if ops.device.type == "cuda" else 1,
        progress=lambda done, total: show("fingerprinting kernels", done, total),
    )
    draft_model = load_draft_model(config.engine, source, loaded, ops, show)
    show("allocating the KV pool", 0, 0)
    engine = Engine(loaded.model, config.engine, ops, parts.make_policy(), draft_model=draft_model)
    transport = _make_transport(config, engine_id)
    identity = kv_identity(loaded, engine.layout, numeric_fingerprint, transport.name)
    info = WorkerInfo(
        engine_id=engine_id,
        role=parts.role,
        model_name=config.model_name or source.name,
        model_digest=loaded.identity.digest,
        numeric_fingerprint=numeric_fingerprint,
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        block_size=engine.layout.block_size,
        num_blocks=engine.num_blocks,
    )
    driver = parts.make_driver(engine, transport, config, cluster_key, engine_id)
    return LoadedWorker(config, parts, info, identity, transport, driver)


@asynccontextmanager
async def serving(worker: LoadedWorker) -> AsyncIterator[ServedWorker]:
    """Listen and run the engine thread until the block is left. Raises `StartupError`."""
    config = worker.config
    client = HandshakeClient(worker.info.engine_id, worker.identity)
    host = WorkerHost(
        worker.info,
        worker.driver,
        max_requests=config.max_requests,
        drain_timeout_s=config.drain_timeout_s,
        ask=client.ask,
    )
    handshake = None
    if worker.parts.role is Role.PREFILL:
        shard = Shard(layout=worker.driver.engine.layout)
        answerer = HandshakeServer(worker.info.engine_id, worker.identity, shard, worker.transport.describe())
        handshake = answerer.answer
    async with WorkerServer(host, host, handshake) as server:
        address = await server.listen(config.host, config.port)
        worker.parts.set_endpoint(worker.driver, _endpoint(config.advertised_host, address))
        host.start()
        try:
            yield ServedWorker(address, host, server)
        finally:
            await server.close(LAST_FRAMES_S)
            await host.close()


def _endpoint(advertised_host: str, address: str) -> str:
    """Where peers reach what listens at `address`."""
    return join_address(advertised_host, int(address.rpartition(":")[2])) if advertised_host else address


def main(parts: RoleParts, arguments: list[str] | None = None) -> int:
    """The exit code: 0 after a drain, 1 after a failure that was told as an event, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=parts.role.value, description=f"A {parts.role.value} worker.")
    parser.add_argument("--config", required=True, help="a JSON file, or JSON itself")
    try:
        config = read_config(parser.parse_args(arguments).config)
        configure_logging(config.log_level, config.log_format)
        logging.getLogger("grpc").setLevel(logging.ERROR)  # warns of every session that a drain ends
        worker = load_worker(config, parts, _Throttled())
        return asyncio.run(_serve_until_drained(worker))
    except TandemError as error:
        emit_failure(error)
        return 1
    except KeyboardInterrupt:
        return 130


async def _serve_until_drained(worker: LoadedWorker) -> int:
    async with serving(worker) as served:
        stop = Stop.at_signals()
        loop = asyncio.get_running_loop()
        draining = loop.create_task(_drain_at(stop, served.host))
        info = worker.info
        emit_ready(served.address, f"{info.num_blocks:,} KV blocks of {info.block_size} tokens")
        endings = (served.host.drained, served.host.broken, stop.forced)
        waiters: list[asyncio.Task[Any]] = [loop.create_task(ending.wait()) for ending in endings]
        hanging = loop.create_task(served.host.until_engine_hangs(HUNG_S))
        await asyncio.wait([*waiters, hanging], return_when=asyncio.FIRST_COMPLETED)
        if hanging.done():
            end_hung_process(hanging.result())
        for waiter in (*waiters, hanging, draining):
            waiter.cancel()
        if stop.forced.is_set():
            await served.server.close()  # at once
        if served.host.broken.is_set():
            raise StartupError("the engine thread ended with an error, see the log")
    return 0


async def _drain_at(stop: Stop, host: WorkerHost) -> None:
    await stop.requested.wait()
    if not host.is_draining:  # over its connection it may have been told before, and within which time
        logger.info("draining %d requests", host.drain(None))


def end_hung_process(turn_s: float) -> None:
    """Whoever started this process starts another one; routers of other processes go on elsewhere. The thread that
    hangs cannot be ended, and the interpreter's own end could wait for what it waits for."""
    logger.critical("a step of the engine has lasted %.0f s: it hangs, and so this process ends; its threads:", turn_s)
    faulthandler.dump_traceback(all_threads=True)
    emit_failure(StartupError(f"the engine hangs: a step has lasted {turn_s:.0f} s; the log says where"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class _Throttled:
    """Progress events, a few per second and always the first and last of each kind."""

    def __init__(self) -> None:
        self._last = Progress("")
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        progress, now = Progress(what, done, total), time.monotonic()
        is_due = what != self._last.what or now >= self._next or (total and done >= total)
        if is_due and progress != self._last:
            self._last, self._next = progress, now + PROGRESS_PAUSE_S
            emit(progress)


def _make_transport(config: WorkerConfig, engine_id: str) -> Transport:
    match config.transport:
        case "nixl":
            from kvconnector.nixl import NixlTransport, configure_environment  # takes long to import

            configure_environment(torch.device(config.engine.device))
            return NixlTransport(engine_id)
        case "loopback":
            from kvconnector.loopback import LoopbackHub, LoopbackTransport

            return LoopbackTransport(engine_id, LoopbackHub())


def _refuse_idle_speculation(config: WorkerConfig, role: Role) -> None:
    method = config.engine.speculation.method
    if role is Role.PREFILL and method != "none":
        raise ConfigError(
            f"engine.speculation.method is {method}: a prefill worker draws one token of a request, there is nothing "
            "to guess; set it for the decode workers only"
        )


def _check_port_free(host: str, port: int) -> None:
    """Before minutes are spent on loading. The port is bound for good later."""
    if port == 0:
        return
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartupError(why_not_listening(error, host, port, "port")) from error
