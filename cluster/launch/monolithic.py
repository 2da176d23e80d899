"""`python -m cluster.launch.monolithic --config FILE.json`: router and one engine in one process.

The engine has its own thread, as in a worker process; the router calls it directly. The worker's gRPC
port stays, on a free loopback port, for those who want to inspect its blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from pathlib import Path

import msgspec
import uvloop

from cluster.control.host import WorkerHost
from cluster.control.process import HUNG_S, LoadedWorker, end_hung_process, load_worker, serving
from cluster.errors import ConfigError, StartupError, TandemError
from cluster.launch.embedded import EmbeddedConnection
from cluster.launch.monolithic_config import MonolithicConfig
from cluster.logs import configure_logging
from cluster.process_events import Progress, emit, emit_failure, emit_ready
from cluster.router.config import RouterConfig
from cluster.router.server import bind, run_router
from cluster.stop import Stop
from cluster.tokenizer import Tokenizer
from decode.worker import DecodeParts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.launch.monolithic", description="Router and engine.")
    parser.add_argument("--config", type=Path, required=True, help="JSON form of MonolithicConfig")
    try:
        config = _read_config(parser.parse_args(arguments).config)
        configure_logging(config.router.log_level, config.router.log_format)
        listener = bind(config.router.host, config.router.port)  # a taken port is told before anything is loaded
        worker = load_worker(config.worker, DecodeParts(), _show)
        uvloop.run(_serve(config.router, worker, listener))
    except TandemError as error:
        emit_failure(error)
        return 1
    return 0


def _read_config(path: Path) -> MonolithicConfig:
    try:
        return msgspec.json.decode(path.read_bytes(), type=MonolithicConfig)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _show(what: str, done: int, total: int) -> None:
    emit(Progress(what, done, total))


async def _serve(config: RouterConfig, worker: LoadedWorker, listener: socket.socket) -> None:
    """Until a signal; the router drains first, then nothing runs in the engine any more."""
    codec = Tokenizer.load(config.model_path)
    stop = Stop.at_signals()
    async with serving(worker) as served:
        blocks = f"{worker.info.num_blocks:,} KV blocks of {worker.info.block_size} tokens"
        detail = f"{blocks}, worker at {served.address}"
        watch = asyncio.create_task(_stop_when_broken(served.host, stop))
        hanging = asyncio.create_task(_stop_when_hanging(served.host, stop))
        try:
            await run_router(
                config,
                codec,
                prefill=None,
                decode=[EmbeddedConnection(served.host)],
                listener=listener,
                stop=stop,
                on_ready=lambda url: emit_ready(url.removeprefix("http://"), detail),
            )
        finally:
            if hanging.done():  # clients have their last events
                end_hung_process(hanging.result())
            watch.cancel()
            hanging.cancel()
        if served.host.broken.is_set():
            raise StartupError("the engine thread ended with an error, see the log")


async def _stop_when_broken(host: WorkerHost, stop: Stop) -> None:
    await host.broken.wait()
    stop.force()


async def _stop_when_hanging(host: WorkerHost, stop: Stop) -> float:
    """How long a step has lasted then, in seconds."""
    turn_s = await host.until_engine_hangs(HUNG_S)
    stop.force()
    return turn_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
