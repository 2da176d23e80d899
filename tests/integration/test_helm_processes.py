"""The containers of the rendered CPU demo as processes of this machine: their commands, environments, configuration
files, probes and grace periods are those of the manifest; only addresses, ports and paths are mapped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from cluster.launch.ports import choose_free_port
from cluster.model_files.cache import cache_directory
from tests.helm_chart import Manifest, named, pod_templates, read_values, render
from tests.helm_metrics import exported_names, used_metrics

pytestmark = pytest.mark.timeout(600)

LOOPBACK = "127.0.0.1"
START_S = 240.0
NUM_STREAMS, NUM_TOKENS = 6, 48
ROLES = ("prefill", "decode", "router")


class Pod:
    """One container, started as the kubelet would."""

    def __init__(self, role: str, template: Manifest, config: str, directory: Path, ports: dict[str, int]) -> None:
        [self.container] = template["spec"]["containers"]
        self.role = role
        self.port = ports[role]
        self.grace_s = template["spec"]["terminationGracePeriodSeconds"]
        self.pre_stop_s = self.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        self.directory = directory
        for mount in self.container["volumeMounts"]:
            self.path(mount["mountPath"]).mkdir(parents=True)
        self.path("/etc/tandem/config.json").write_text(self._mapped(config, ports))
        if role != "router":
            self.path("/var/run/secrets/tandem/cluster-key").write_text("k" * 64)
        self.path("/var/cache/tandem").symlink_to(cache_directory(), target_is_directory=True)
        self.process: asyncio.subprocess.Process | None = None

    def path(self, mounted: str) -> Path:
        return self.directory / mounted.removeprefix("/")

    def _mapped(self, config: str, ports: dict[str, int]) -> str:
        values = json.loads(config)
        assert values["host"] == "0.0.0.0"
        assert values["port"] == self.container["ports"][0]["containerPort"]
        values |= {"host": LOOPBACK, "port": self.port}
        for role in ("prefill", "decode"):
            if role in values:
                assert values[role] == [f"dns:demo-tandem-{role}-workers.serving.svc:9000"]
                values[role] = [f"dns:{LOOPBACK}:{ports[role]}"]
        if "cluster_key_file" in values:
            values["cluster_key_file"] = str(self.path(values["cluster_key_file"]))
        return json.dumps(values)

    def _environment(self) -> dict[str, str]:
        """Nothing of ours but what finds Python and keeps two cores usable."""
        inherited = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
        environment = {**inherited, "OMP_NUM_THREADS": "1"}
        for entry in self.container["env"]:
            match entry:
                case {"value": str(value)}:
                    environment[entry["name"]] = str(self.path(value)) if value.startswith("/") else value
                case {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}:
                    environment[entry["name"]] = LOOPBACK
                case _:
                    raise AssertionError(f"not mapped: {entry}")
        return environment

    async def start(self) -> None:
        program, *arguments = self.container["args"]
        assert program == "python"
        mapped = [str(self.path(word)) if word.startswith("/") else word for word in arguments]
        with (self.directory / "stdout").open("wb") as out, (self.directory / "stderr").open("wb") as err:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *mapped,
                env=self._environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    async def passes(self, probe: str) -> bool:
        match self.container[probe]:
            case {"httpGet": {"path": str(path), "port": "http"}, "timeoutSeconds": timeout_s}:
                try:
                    async with httpx.AsyncClient(trust_env=False) as client:
                        answer = await client.get(f"http://{LOOPBACK}:{self.port}{path}", timeout=timeout_s)
                except httpx.TransportError:
                    return False
                return 200 <= answer.status_code < 400
            case {"grpc": {"port": int(port)}, "timeoutSeconds": timeout_s}:
                assert port == self.container["ports"][0]["containerPort"]
                async with grpc.aio.insecure_channel(f"{LOOPBACK}:{self.port}") as channel:
                    try:
                        stub = health_pb2_grpc.HealthStub(channel)
                        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
                    except grpc.aio.AioRpcError:
                        return False
                    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
            case other:
                raise AssertionError(f"not a probe: {other}")

    async def until(self, probe: str) -> None:
        deadline = time.monotonic() + START_S
        while not await self.passes(probe):
            assert self.process is not None
            assert self.process.returncode is None, f"{self.role}: {self.last_words()}"
            assert time.monotonic() < deadline, f"{self.role}: {probe} did not pass: {self.last_words()}"
            await asyncio.sleep(0.2)

    def last_words(self) -> str:
        return (self.directory / "stdout").read_text()[-500:] + (self.directory / "stderr").read_text()[-1500:]

    async def stop(self) -> int:
        """SIGTERM, and what is left of the grace period after the preStop hook."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), self.grace_s - self.pre_stop_s)


@contextlib.asynccontextmanager
async def running_pods(directory: Path) -> AsyncIterator[dict[str, Pod]]:
    manifests = render(read_values("cpu-demo"))
    ports = {role: choose_free_port(LOOPBACK) for role in ROLES}
    pods = {
        role: Pod(role, template, named(manifests, "ConfigMap", role)["data"]["config.json"], directory / role, ports)
        for role, template in pod_templates(manifests)
    }
    try:
        for role in ROLES:
            await pods[role].start()
        yield pods
    finally:
        for pod in pods.values():
            if pod.process is not None and pod.process.returncode is None:
                pod.process.kill()
                await pod.process.wait()


async def stream(url: str, number: int, started: asyncio.Semaphore) -> tuple[str, str]:
    """(text, finish reason) of one streamed completion; anything but a whole stream fails the test."""
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": f"{number} little bears went to the river and",
        "stream": True,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    text, reason, is_done = "", "", False
    async with (
        httpx.AsyncClient(trust_env=False, timeout=120) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                [choice] = chunk["choices"]
                if not text:
                    started.release()
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    assert is_done
    return text, reason


async def exported(url: str) -> set[str]:
    async with httpx.AsyncClient(trust_env=False) as client:
        page = (await client.get(f"{url}/metrics")).text
    return exported_names(text_string_to_metric_families(page))


async def test_rendered_commands_start_serve_and_drain(tmp_path: Path) -> None:
    async with running_pods(tmp_path) as pods:
        for role in ROLES:
            await pods[role].until("startupProbe")
            await pods[role].until("readinessProbe")
            assert await pods[role].passes("livenessProbe")
        url = f"http://{LOOPBACK}:{pods['router'].port}"

        idle = asyncio.Semaphore(0)
        expected = [await stream(url, number, idle) for number in range(NUM_STREAMS)]
        missing = used_metrics() - await exported(url)
        assert not missing, f"used by dashboards, rules or autoscaling, but not exported: {missing}"

        started = asyncio.Semaphore(0)
        streams = [asyncio.create_task(stream(url, number, started)) for number in range(NUM_STREAMS)]
        for _ in streams:
            await asyncio.wait_for(started.acquire(), 60)
        assert not all(task.done() for task in streams), "nothing was left to drain"
        exit_codes = await asyncio.gather(*(pods[role].stop() for role in ROLES))
        assert await asyncio.gather(*streams) == expected
        assert exit_codes == [0, 0, 0], {role: pods[role].last_words() for role in ROLES}
