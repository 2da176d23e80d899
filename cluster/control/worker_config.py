"""What a worker process is told at start; `python -m prefill --config FILE.json` reads its JSON form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.addresses import is_loopback
from cluster.config_checks import engine_problems
from cluster.engine.config import EngineConfig
from cluster.errors import ConfigError
from cluster.sizes import parse_size
from kvconnector.ticket import MAX_LEASE_S, MIN_KEY_BYTES

KEY_FILE_VARIABLE = "TANDEM_CLUSTER_KEY_FILE"
ADVERTISED_HOST_VARIABLE = "TANDEM_ADVERTISED_HOST"  # differs between processes that share one config file


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prefill or decode worker; the role is the module that is started, not a field."""

    model: str  # a directory, a .gguf file, a Hugging Face id or `demo`
    model_name: str = ""  # what the router is told; empty: the model's own
    model_revision: str = ""  # of a Hugging Face id that was resolved to a path before
    model_quantization: Literal["fp8"] | None = None  # fp8: make FP8 of a checkpoint that is not FP8 already
    model_residual_dtype: Literal["bfloat16", "float32"] | None = None  # see `models/residual.py`
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one is chosen, see the ready event
    advertised_host: str = ""  # where peers reach this worker; empty: TANDEM_ADVERTISED_HOST, else `host`
    engine: EngineConfig = EngineConfig()
    cluster_key_file: str = ""  # empty: the path in TANDEM_CLUSTER_KEY_FILE
    transport: Literal["nixl", "loopback"] = "nixl"  # loopback: no peers, for a decode worker that computes prompts
    lease_s: float = 30.0  # how long a prefill worker keeps blocks for a silent reader
    load_timeout_s: float = 30.0  # bound of one hand-over on a decode worker, waiting for blocks included
    on_failure: Literal["recompute", "fail"] = "recompute"  # of a hand-over
    max_requests: int = 4096  # running and waiting; more are refused as overload
    drain_timeout_s: float = 30.0  # after SIGTERM, for running requests and leases
    allow_plaintext_network: bool = False  # permit a `host` that other machines reach
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"


def read_config(text_or_path: str) -> WorkerConfig:
    """From a JSON file, or from JSON itself (an argument that begins with "{"). `ConfigError` names the
    field that is wrong."""
    is_inline = text_or_path.lstrip().startswith("{")
    origin = "--config" if is_inline else text_or_path
    try:
        content = text_or_path.encode() if is_inline else Path(text_or_path).read_bytes()
        config = msgspec.convert(_with_sizes(msgspec.json.decode(content)), WorkerConfig)
    except OSError as error:
        raise ConfigError(f"cannot read {origin}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if problems := list(_problems(config)):
        raise ConfigError(f"{origin}: " + "; ".join(problems))
    if not config.advertised_host:
        config = msgspec.structs.replace(config, advertised_host=os.environ.get(ADVERTISED_HOST_VARIABLE, ""))
    return config


def _with_sizes(tree: Any) -> Any:
    """The KV pool may be written as people write it, with a unit: values of a chart come here as they are."""
    engine = tree.get("engine") if isinstance(tree, dict) else None
    if isinstance(engine, dict) and isinstance(text := engine.get("kv_cache_bytes"), str):
        size = parse_size(text)
        return {**tree, "engine": {**engine, "kv_cache_bytes": text if size is None else size}}
    return tree


def _problems(config: WorkerConfig) -> Iterator[str]:
    if not 0 <= config.port <= 65_535:
        yield f"port must be between 0 and 65535, got {config.port}"
    if not 0 < config.lease_s <= MAX_LEASE_S:
        yield f"lease_s must be above 0 and at most {MAX_LEASE_S:g}, got {config.lease_s}"
    if not 0 < config.load_timeout_s <= MAX_LEASE_S:
        yield f"load_timeout_s must be above 0 and at most {MAX_LEASE_S:g}, got {config.load_timeout_s}"
    if not 0 <= config.drain_timeout_s <= 3600:
        yield f"drain_timeout_s must be between 0 and 3600, got {config.drain_timeout_s}"
    if config.max_requests < 1:
        yield f"max_requests must be at least 1, got {config.max_requests}"
    yield from engine_problems("engine", config.engine, least_pool_bytes=1)
    if not config.allow_plaintext_network and not is_loopback(config.host):
        yield (
            f"host {config.host} lets other machines reach this worker, and nothing is encrypted; use 127.0.0.1, "
            "or accept it with allow_plaintext_network"
        )


def read_cluster_key(config: WorkerConfig) -> bytes:
    """The key that signs tickets. It goes through files only, never through arguments or logs."""
    path = config.cluster_key_file or os.environ.get(KEY_FILE_VARIABLE, "")
    if not path:
        raise ConfigError(f"cluster_key_file is not set, nor is {KEY_FILE_VARIABLE}")
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cluster_key_file: cannot read {path}: {error.strerror}") from error
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"cluster_key_file: {path} holds {len(key)} bytes, at least {MIN_KEY_BYTES} are needed")
    return key
