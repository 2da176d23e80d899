"""The launcher's connection to Ray: reserve resources, make actors, see that the head is still there.

Ray carries orders to actors and what processes say, nothing else: no request, no token and no KV block.
Its calls to the head may block for a minute if the head is gone, so they are made in threads of their own (`off_loop`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import RaySettings
from cluster.errors import StartupError
from cluster.launch.off_loop import Result, off_loop
from cluster.launch.ray_actor import RankActor
from cluster.launch.ray_handle import RankHandle, reason_of
from cluster.launch.ray_plan import PlacementRequest, shown
from cluster.launch.silence import Silence

PROBE_PAUSE_S = 1.0
PROBE_TIMEOUT_S = 3.0
PLACEMENT_SLICE_S = 0.5  # a wait for resources can be given up this often
QUESTION_TIMEOUT_S = 10.0  # for the head
SHUTDOWN_TIMEOUT_S = 15.0
OBJECT_STORE_BYTES = 80 << 20  # of a Ray of our own: nothing is put there
OUR_OWN = "local"  # as `ray.init` calls a cluster that it starts and that ends with this process
NO_RAY, NO_ANSWER = "Could not find any running Ray instance", "no answer"  # the first in Ray's words
AUTH_MODE = "RAY_AUTH_MODE"
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"
INTERNAL_RESOURCES = ("node:", "bundle_group", "object_store_memory", "memory")


class RayCluster:
    """A connection to a Ray cluster, made by `connected`."""

    def __init__(self, ray: Any, settings: RaySettings) -> None:
        self._ray = ray
        self._settings = settings
        self._actor_class = ray.remote(RankActor)
        context = ray.get_runtime_context()
        self.node_id = str(context.get_node_id())
        [node] = [node for node in ray.nodes() if node["NodeID"] == self.node_id]
        self.host = str(node["NodeManagerAddress"])
        self._watched = {
            str(context.gcs_address): "head",
            f"{self.host}:{node['NodeManagerPort']}": "node of this launcher",
        }

    async def reserve(self, request: PlacementRequest, *, only_here: bool) -> Placement:
        """Wait until the resources are reserved, `only_here`: on the launcher's node. Raises `StartupError` that says
        what was asked for and what there is. Cancelled or failed, nothing stays reserved."""
        labels = {**request.labels, **({"ray.io/node-id": self.node_id} if only_here else {})}
        placement = Placement(self._ray, self._actor_class, request, labels)
        try:
            await placement.create()
            if not await placement.is_reserved(self._settings.placement_timeout_s):
                raise StartupError(await ask_ray(self._ray, request.name, self._no_place, request, only_here))
        except BaseException:
            placement.remove_soon()
            raise
        return placement

    async def watch_head(self, fail: Callable[[str], None]) -> None:
        """Calls `fail` and returns when the head or this node has been silent for `head_timeout_s`."""
        silences = {address: Silence() for address in self._watched}
        while True:
            for address, what in self._watched.items():
                if await _answers(address):
                    silences[address].ends()
                elif silences[address].goes_on_for(self._settings.head_timeout_s):
                    fail(f"the Ray {what} ({address}) has not answered for {self._settings.head_timeout_s:g} s")
                    return
            await asyncio.sleep(PROBE_PAUSE_S)

    def _no_place(self, request: PlacementRequest, only_here: bool) -> str:
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        lines = [
            f"{request.name}: Ray has had no place for it within launch.ray.placement_timeout_s "
            f"({self._settings.placement_timeout_s:g} s)",
            f"    asked for: {request}",
            f"    free: {shown(_countable(self._ray.available_resources()))}",
        ]
        for node in nodes:
            labels = [f"{name}={value}" for name, value in node["Labels"].items() if not name.startswith("ray.io/")]
            has = ", ".join([shown(_countable(node["Resources"])), *labels])
            lines.append(f"    node {node['NodeManagerAddress']}: {has}")
        if only_here and len(nodes) > 1:
            lines.append(
                f"    only node {self.host}, the launcher's, may be used, because nothing between nodes is encrypted; "
                "`security.allow_plaintext_network: true` permits the others"
            )
        return "\n".join(lines)


class Placement:
    """A placement group that may not be reserved yet."""

    def __init__(self, ray: Any, actor_class: Any, request: PlacementRequest, labels: dict[str, str]) -> None:
        self._ray = ray
        self._actor_class = actor_class
        self._request = request
        self._labels = labels
        self._group: Any = None
        self._is_unwanted = False
        self._lock = threading.Lock()

    async def create(self) -> None:
        """Ask for it. Raises `StartupError`, as all that asks Ray does."""
        await ask_ray(self._ray, self._request.name, self._create)

    def _create(self) -> None:
        group = self._ray.util.placement_group(
            [dict(bundle) for bundle in self._request.bundles],
            strategy=self._request.strategy,
            name=f"tandem-{self._request.name}",
            bundle_label_selector=[self._labels for _ in self._request.bundles] if self._labels else None,
        )
        with self._lock:
            self._group = group
            is_unwanted = self._is_unwanted
        if is_unwanted:
            self._remove(group)

    async def is_reserved(self, timeout_s: float) -> bool:
        """Also asked after a node was lost: Ray then reserves anew what was there."""
        deadline = time.monotonic() + timeout_s
        while not await ask_ray(self._ray, self._request.name, self._group.wait, PLACEMENT_SLICE_S):
            if time.monotonic() > deadline:
                return False
        return True

    async def start_actor(self, rank: int) -> RankHandle:
        """An actor in the bundle of `rank`. It dies with this process (it is not detached) and Ray does not restart it:
        a new one would know nothing, so it is ours to make and to tell."""
        return await ask_ray(self._ray, self._request.name, self._start_actor, rank)

    def _start_actor(self, rank: int) -> RankHandle:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {
            "num_cpus": self._request.per_rank["CPU"],
            "num_gpus": self._request.per_rank.get("GPU", 0),
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=self._request.bundle_of_rank[rank]
            ),
        }
        return RankHandle(self._ray, self._actor_class.options(**options).remote())

    def remove_soon(self) -> None:
        """And every actor in it."""
        with self._lock:
            self._is_unwanted = True
            group = self._group
        if group is not None:
            threading.Thread(target=self._remove, args=(group,), daemon=True).start()

    def _remove(self, group: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, RuntimeError, OSError):  # it goes with this process
            self._ray.util.remove_placement_group(group)


async def ask_ray(ray: Any, name: str, function: Callable[..., Result], *arguments: object) -> Result:
    """A call to Ray's head on behalf of the process `name`. Raises `StartupError` with what Ray says."""
    try:
        async with asyncio.timeout(QUESTION_TIMEOUT_S) as limit:
            return await off_loop(function, *arguments)
    except TimeoutError as error:  # Ray has timeouts of its own
        said = f"has not answered for {QUESTION_TIMEOUT_S:g} s" if limit.expired() else f"says: {reason_of(error)}"
        raise StartupError(f"{name}: Ray's head {said}") from error
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        raise StartupError(f"{name}: Ray says: {reason_of(error)}") from error


@contextmanager
def connected(settings: RaySettings, tell: Callable[[str], None]) -> Iterator[RayCluster]:
    """Raises `StartupError` when Ray is not installed, not there, or another version there."""
    try:
        import ray
    except ImportError as error:
        raise StartupError(
            f"launch.backend: ray needs the extra `ray`: pip install 'tandem-serving[ray]' ({error})"
        ) from error
    address = _find_ray(settings, tell)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    if address == OUR_OWN:
        os.environ.setdefault(USAGE_STATS, "0")
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:  # on the main thread: the processes of a Ray of our own die with the thread that has started them
        ray.init(address=address, **options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:  # RuntimeError: other version
        raise StartupError(f"Ray at {address}: {error}") from error
    try:
        yield RayCluster(ray, settings)
    finally:
        try:
            asyncio.run(_shut_down(ray))
        except TimeoutError:
            atexit.unregister(ray.shutdown)  # it would wait once more for a head that is gone


def _find_ray(settings: RaySettings, tell: Callable[[str], None]) -> str:
    """What `ray.init` is to be told: an address that answers, or `OUR_OWN`. Asked before, because `ray.init` itself
    waits for minutes where no Ray is."""
    address = os.environ.get("RAY_ADDRESS", "auto") if settings.address == "auto" else settings.address
    if address == OUR_OWN:
        return address
    if address == "auto":
        why_not = _complaint_of_ray([], settings.connect_timeout_s)
        if not why_not:
            return address
        if not why_not.startswith((NO_RAY, NO_ANSWER)):
            raise StartupError(
                "the Ray of this machine does not let us in; for another one set launch.ray.address to HOST:PORT, for "
                f"one of our own to {OUR_OWN}. It says: {why_not}"
            )
        tell("no Ray answers on this machine: starting one for this launch")
        return OUR_OWN
    if address.startswith("ray://"):
        raise StartupError(f"RAY_ADDRESS: {address} is a Ray Client's; the launcher must run on a node of the cluster")
    deadline = time.monotonic() + settings.connect_timeout_s
    while not asyncio.run(_answers(address)):
        if time.monotonic() > deadline:
            raise StartupError(
                f"launch.ray.address: nothing listens at {address} for {settings.connect_timeout_s:g} s; start Ray "
                "there with `ray start --head`, or leave the address out to have one started here"
            )
        time.sleep(PROBE_PAUSE_S)
    if why_not := _complaint_of_ray(["--address", address], settings.connect_timeout_s):
        raise StartupError(f"launch.ray.address: what listens at {address} is no Ray that lets us in: {why_not}")
    return address


def _complaint_of_ray(arguments: list[str], timeout_s: float) -> str:
    """Of its own health check, in a process that can be ended; empty if all is well."""
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", *arguments]
    environment = {**({AUTH_MODE: "token"} if _has_token() else {}), **os.environ}  # as `ray.init` does it
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{NO_ANSWER} within {timeout_s:g} s"
    if done.returncode == 0:
        return ""
    last_line = (done.stderr or done.stdout).decode(errors="replace").strip().rpartition("\n")[2]
    return last_line.partition(": ")[2] or last_line or NO_ANSWER


def _has_token() -> bool:
    """Where Ray looks for one."""
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def _countable(resources: dict[str, float]) -> dict[str, float]:
    """What can be asked for: without Ray's own marks, and without the parts that a placement group has."""
    return {
        name: amount
        for name, amount in resources.items()
        if not name.startswith(INTERNAL_RESOURCES) and "_group_" not in name
    }


async def _shut_down(ray: Any) -> None:
    async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
        await off_loop(ray.shutdown)
