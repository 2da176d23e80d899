"""What a router process is told at start; `python -m cluster.router --config FILE.json` reads its JSON form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from cluster.errors import ConfigError
from cluster.router.discovery import parse_source

MIB = 1 << 20


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One router. Its workers' gRPC endpoints may not listen yet; `discovery.py` says how they can be named."""

    model_name: str  # what clients put into the field `model`
    model_path: str  # tokenizer and chat template: a path, `demo`, or a Hugging Face id (org/name@revision)
    decode: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()  # empty: decode workers compute prompts themselves
    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one is chosen, see the ready event
    max_body_bytes: int = 8 * MIB
    max_running_requests: int = 256  # sequences in flight; more are answered with 503 and Retry-After
    max_sequences_per_request: int = 128  # prompts times n of one HTTP request
    max_connections: int = 4096  # open HTTP connections; more are closed at once
    request_timeout_s: float = 600.0  # from the last byte of the request to the last byte of the answer
    header_timeout_s: float = 15.0  # for a client to send a request's head
    body_timeout_s: float = 30.0  # for a client to send a request's body
    write_timeout_s: float = 60.0  # a client that takes no byte of its answer for so long is gone
    keep_alive_s: float = 75.0  # an idle connection is closed after it
    drain_timeout_s: float = 30.0  # after SIGTERM, for running requests to finish
    max_attempts: int = 4  # of one sequence, the first included
    failover_wait_s: float = 5.0  # how long a broken stream waits for a worker that can go on with it
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"


def read_config(path: Path) -> RouterConfig:
    """Raises `ConfigError` naming the file and the field."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=RouterConfig)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    check_config(config)
    return config


def check_config(config: RouterConfig) -> None:
    if problems := list(_problems(config)):
        raise ConfigError("router configuration: " + "; ".join(problems))


def _problems(config: RouterConfig) -> Iterator[str]:
    for field, entries in (("prefill", config.prefill), ("decode", config.decode)):
        for entry in entries:
            try:
                parse_source(entry)
            except ConfigError as error:
                yield f"{field}: {error.message}"
    if not config.model_name:
        yield "model_name is empty"
    if not 0 <= config.port <= 65_535:
        yield f"port must be between 0 and 65535, got {config.port}"
    for field in (
        "max_body_bytes",
        "max_running_requests",
        "max_sequences_per_request",
        "max_connections",
        "request_timeout_s",
        "header_timeout_s",
        "body_timeout_s",
        "write_timeout_s",
        "keep_alive_s",
        "max_attempts",
    ):
        value = getattr(config, field)
        if not value > 0:
            yield f"{field} must be above 0, got {value}"
    for field in ("drain_timeout_s", "failover_wait_s"):
        value = getattr(config, field)
        if not value >= 0:
            yield f"{field} must not be negative, got {value}"
