"""`python -m cluster.router --config FILE.json`: one router process (docs/launch.md says what it owes its launcher)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import uvloop

from cluster.errors import TandemError
from cluster.logs import configure_logging
from cluster.process_events import Progress, emit, emit_failure, emit_ready
from cluster.router.config import RouterConfig, read_config
from cluster.router.discovery import open_sources
from cluster.router.membership import Membership
from cluster.router.server import bind, run_router
from cluster.rpc.client import connect
from cluster.stop import Stop
from cluster.tokenizer import Tokenizer
from cluster.types import Role


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.router", description="The HTTP router of a deployment.")
    parser.add_argument("--config", type=Path, required=True, help="JSON form of RouterConfig")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config)
        configure_logging(config.log_level, config.log_format)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # starts and stops are our own events
        uvloop.run(serve(config))
    except TandemError as error:
        emit_failure(error)
        return 1
    return 0


async def serve(config: RouterConfig) -> None:
    """Run one router until a signal. Raises `StartupError` or `ModelError` before it is ready."""
    listener = bind(config.host, config.port)
    emit(Progress(what="loading tokenizer"))
    codec = Tokenizer.load(config.model_path)
    stop = Stop.at_signals()
    entries = {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
    sources = {role: open_sources(entries[role]) for role in entries}
    await run_router(
        config,
        codec,
        prefill=[] if config.prefill else None,
        decode=[],
        listener=listener,
        stop=stop,
        on_ready=lambda url: emit_ready(url.removeprefix("http://"), url),
        follow_members=lambda pool: Membership(pool, sources, connect).follow(),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
