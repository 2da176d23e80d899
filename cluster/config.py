"""The configuration of a deployment: frozen structs, composed, read from everywhere, checked once.

    defaults  <  cluster.yaml  <  environment (TANDEM_ROUTER__PORT=9000)  <  flags (--set router.port=9000)

`load_config` is the only way in; what it returns has no unknown key, no wrong type and no value out of
range. The comments behind the fields are the text of docs/config.md (`cluster/config_reference.py`).
Measured values, such as the number of KV blocks, are not configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from cluster import config_source
from cluster.addresses import is_loopback
from cluster.config_checks import MIB, between, engine_problems, host_problems
from cluster.engine.config import EngineConfig
from cluster.errors import ConfigError
from cluster.types import Role

ExternalChoice = Literal["auto", "none", "torchrun", "openmpi", "mpich", "slurm", "lws"]


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model is served, and under which name."""

    path: str = "demo"  # `demo`, a directory with safetensors, a .gguf file, or a Hugging Face id
    revision: str | None = None  # commit, tag or branch of a Hugging Face id
    quantization: Literal["fp8"] | None = None  # fp8: FP8 weights and activations out of a bf16 checkpoint
    residual_dtype: Literal["bfloat16", "float32"] | None = None  # on a GPU; null: float32 up to a width of 1,024
    served_name: str | None = None  # what clients put into `model`; null: the model's own short name

    @property
    def reference(self) -> str:
        """As `model_files.resolve_model` takes it."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side, which clients talk to."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 opens it to the network, without authentication
    port: int = 8000  # TCP port; 0: a free one is chosen
    max_body_bytes: int = 8 * MIB  # larger request bodies are answered with 413
    max_running_requests: int = 256  # sequences in flight; more are answered with 503 and Retry-After
    max_sequences_per_request: int = 128  # prompts times `n` of one HTTP request
    max_connections: int = 4096  # open HTTP connections; more are closed at once
    request_timeout_s: float = 600.0  # a request that takes longer is ended with an error
    header_timeout_s: float = 15.0  # for a client to send a request's head
    body_timeout_s: float = 30.0  # for a client to send a request's body
    write_timeout_s: float = 60.0  # a client that takes no byte of its answer for so long is gone
    keep_alive_s: float = 75.0  # an idle connection is closed after it
    max_attempts: int = 4  # of one sequence on different workers, the first included
    failover_wait_s: float = 5.0  # how long a broken stream waits for a worker that can go on with it


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pool of workers of the same role."""

    replicas: int = 1  # number of workers
    host: str = "127.0.0.1"  # address the workers listen on, for the router and the other pool
    port: int = 0  # of the first worker, the next ones count up; 0: free ports are chosen
    gpu_percent: int | None = None  # of a shared GPU's multiprocessors (MPS); null: prefill 80, decode 100
    engine: EngineConfig = EngineConfig()  # see the section `engine`


class ConnectorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV blocks get from a prefill worker to a decode worker."""

    transport: Literal["nixl", "loopback"] = "nixl"  # loopback works inside one process only (tests, monolithic)
    lease_s: float = 30.0  # how long a prefill worker keeps blocks for a reader that is silent
    load_timeout_s: float = 30.0  # bound of one hand-over on a decode worker, waiting for free blocks included
    on_failure: Literal["recompute", "fail"] = "recompute"  # of a hand-over: compute again, or an error to the client


class SecuritySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may talk to the workers."""

    cluster_key_file: str | None = None  # signs the hand-over tickets; null: a new key for each launch
    allow_plaintext_network: bool = False  # let workers listen beyond this machine although nothing is encrypted
    send_key_over_network: bool = False  # rank 0 may send a new key to other hosts in plain text


class LoggingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the processes write to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"  # the least severe level that is written
    format: Literal["text", "json"] = "text"  # json: one object per line, with the request it is about


class RaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How workers are placed with `launch.backend: ray`."""

    address: str = "auto"  # HOST:PORT of the head; auto: the Ray of this machine, else one of our own; local: our own
    connect_timeout_s: float = 30.0  # for the head to answer when the launch begins
    head_timeout_s: float = 20.0  # a head that is silent for so long ends the launch; Ray itself gives up after 60 s
    placement_timeout_s: float = 60.0  # for a group to get its resources; raise it where nodes are added on demand
    cpus_per_rank: float | None = None  # CPUs that Ray reserves for a rank; null: `engine.num_threads`, else 1
    gpus_per_rank: float = 1.0  # GPUs that Ray reserves for a rank whose `engine.device` is cuda
    prefill_labels: dict[str, str] = {}  # node labels that Ray must find for a prefill worker
    decode_labels: dict[str, str] = {}  # node labels that Ray must find for a decode worker
    router: Literal["driver", "actor"] = "driver"  # where the router runs: beside the launcher, or where Ray puts it
    router_labels: dict[str, str] = {}  # node labels that Ray must find for a router that it places
    send_cluster_key: bool = False  # let Ray carry the cluster key to other nodes; else each has it as a file


class LaunchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `cluster launch` treats its processes."""

    backend: Literal["local", "ray"] = "local"  # local: processes of this machine; ray: placed by Ray (`--ray`)
    start_timeout_s: float = 900.0  # a process that is not ready by then counts as failed (downloads included)
    drain_timeout_s: float = 30.0  # bound of a regular end; requests may go on for four fifths of it
    max_restarts: int = 5  # of one process, before the launch is given up; the count starts anew after 5 minutes
    cpu_threads: Literal["shared", "split"] = "shared"  # shared: each pool may use all cores; split: disjoint shares
    external: ExternalChoice = "auto"  # which outer launcher started this process as one rank of several; none: not one
    join_timeout_s: float = 300.0  # how long the ranks of an outer launcher wait for each other at the start
    rendezvous_host: str | None = None  # where rank 0 runs; null: as the outer launcher says
    rendezvous_port: int = 0  # where rank 0 awaits the other ranks; 0: derived from the job's id
    ray: RaySettings = RaySettings()  # see the section `launch.ray`


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One deployment of one model on one machine."""

    monolithic: bool = False  # one process with one engine: no prefill pool, no hand-over
    model: ModelSettings = ModelSettings()  # see the section `model`
    router: RouterSettings = RouterSettings()  # see the section `router`
    prefill: PoolSettings = PoolSettings()  # see the section `prefill` and `decode`
    decode: PoolSettings = PoolSettings()  # see the section `prefill` and `decode`
    connector: ConnectorSettings = ConnectorSettings()  # see the section `connector`
    security: SecuritySettings = SecuritySettings()  # see the section `security`
    logging: LoggingSettings = LoggingSettings()  # see the section `logging`
    launch: LaunchSettings = LaunchSettings()  # see the section `launch`

    def pool(self, role: Role) -> PoolSettings:
        match role:
            case Role.PREFILL:
                return self.prefill
            case Role.DECODE:
                return self.decode


def load_config(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[config_source.Text] = (),
) -> ClusterConfig:
    """Read, merge and check. `overrides` are the command's flags, the last one wins.

    Raises `ConfigError` that lists every problem found, each with its key.
    """
    document = config_source.read_yaml(path) if path is not None else {}
    tree = config_source.check_tree(ClusterConfig, document, origin=str(path))
    tree = config_source.apply_texts(ClusterConfig, tree, config_source.environment_texts(environment or {}))
    tree = config_source.apply_texts(ClusterConfig, tree, overrides)
    config = msgspec.convert(tree, ClusterConfig)
    if problems := list(find_problems(config)):
        raise ConfigError("\n".join(problems))
    return config


def find_problems(config: ClusterConfig) -> Iterator[str]:
    """Everything that is wrong with the values, each with its key and the way out."""
    yield from _model_problems(config.model)
    yield from _router_problems(config.router)
    yield from _pool_problems("decode", config.decode)
    if not config.monolithic:
        yield from _pool_problems("prefill", config.prefill)
        if config.prefill.engine.speculation.method != "none":
            yield (
                "prefill.engine.speculation.method: a prefill worker draws one token of a request, there is nothing "
                "to guess; set it under decode.engine"
            )
    yield from _network_problems(config)
    yield from between("connector.lease_s", config.connector.lease_s, 0.1, 3600)
    yield from between("connector.load_timeout_s", config.connector.load_timeout_s, 0.1, 3600)
    yield from between("launch.start_timeout_s", config.launch.start_timeout_s, 1, 86_400)
    yield from between("launch.drain_timeout_s", config.launch.drain_timeout_s, 0, 3600)
    yield from between("launch.max_restarts", config.launch.max_restarts, 0, 1000)
    yield from between("launch.join_timeout_s", config.launch.join_timeout_s, 1, 86_400)
    yield from between("launch.rendezvous_port", config.launch.rendezvous_port, 0, 65_535, "0 derives one from the job")
    if config.launch.rendezvous_host is not None:
        yield from host_problems("launch.rendezvous_host", config.launch.rendezvous_host)
    yield from _ray_problems(config.launch.ray)


def _model_problems(model: ModelSettings) -> Iterator[str]:
    if model.revision and "/" not in model.path:
        yield f"model.revision: only a Hugging Face id (org/name) has one, {model.path!r} is none; leave it out"
    if not model.path.strip():
        yield "model.path: empty; give `demo`, a directory, a .gguf file or a Hugging Face id"
    if model.served_name is not None and not 1 <= len(model.served_name) <= 256:
        yield f"model.served_name: must have 1 to 256 characters, has {len(model.served_name)}"


def _router_problems(router: RouterSettings) -> Iterator[str]:
    yield from host_problems("router.host", router.host)
    yield from between("router.port", router.port, 0, 65_535, "0 chooses a free one")
    yield from between("router.max_body_bytes", router.max_body_bytes, 1024, 1024 * MIB)
    yield from between("router.max_running_requests", router.max_running_requests, 1, 100_000)
    yield from between("router.max_sequences_per_request", router.max_sequences_per_request, 1, 100_000)
    yield from between("router.max_connections", router.max_connections, 1, 1_000_000)
    for name in ("request_timeout_s", "header_timeout_s", "body_timeout_s", "write_timeout_s", "keep_alive_s"):
        yield from between(f"router.{name}", getattr(router, name), 0.1, 86_400)
    yield from between("router.max_attempts", router.max_attempts, 1, 100)
    yield from between("router.failover_wait_s", router.failover_wait_s, 0, 3600)


def _pool_problems(name: str, pool: PoolSettings) -> Iterator[str]:
    is_none = pool.replicas == 0 and name == "prefill"
    without = "; for a deployment without a prefill pool set `monolithic: true`" if is_none else ""
    yield from between(f"{name}.replicas", pool.replicas, 1, 64, f"a pool needs at least one worker{without}")
    yield from host_problems(f"{name}.host", pool.host)
    yield from between(f"{name}.port", pool.port, 0, 65_535, "0 chooses free ones")
    if pool.gpu_percent is not None:
        yield from between(f"{name}.gpu_percent", pool.gpu_percent, 1, 100, "leave it out to have it chosen")
    yield from engine_problems(f"{name}.engine", pool.engine)


def _network_problems(config: ClusterConfig) -> Iterator[str]:
    if config.monolithic or config.security.allow_plaintext_network:
        return
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        if not is_loopback(pool.host):
            yield (
                f"{name}.host: {pool.host} lets other machines reach the workers, and nothing between them is "
                "encrypted; use 127.0.0.1, or accept it with `security.allow_plaintext_network: true`"
            )


def _ray_problems(ray: RaySettings) -> Iterator[str]:
    host, _, port = ray.address.rpartition(":")
    if ray.address not in ("auto", "local") and not (host and "/" not in host and port.isdecimal()):
        yield (
            f"launch.ray.address: expected auto, local or HOST:PORT of the head (not of a Ray Client, ray://), "
            f"got {ray.address!r}"
        )
    for name in ("connect_timeout_s", "head_timeout_s", "placement_timeout_s"):
        yield from between(f"launch.ray.{name}", getattr(ray, name), 1, 86_400)
    if ray.cpus_per_rank is not None:
        yield from between("launch.ray.cpus_per_rank", ray.cpus_per_rank, 0.01, 1024)
    yield from between("launch.ray.gpus_per_rank", ray.gpus_per_rank, 0.01, 1)
