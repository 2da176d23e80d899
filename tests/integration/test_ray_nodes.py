"""The chart's config for KubeRay on a Ray of several nodes: raylets of this machine with addresses of their own."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.deployment import Deployment, DeploymentFailed, is_healthy
from benchmarks.drain import status
from benchmarks.launch_ray import workers
from benchmarks.ray_head import RayHead, ray_head
from cluster.launch.run_directory import write_private
from cluster.types import Role
from tests.helm_chart import Manifest, named, of_kind, read_values, render
from tests.integration.ray_deployments import answer_of, assert_gone, needs_ray, on_ray, processes_of, tiny_model

pytestmark = [needs_ray, pytest.mark.timeout(400), pytest.mark.slow]

# Ray notices a lost node in 5 s rather than 15 s; with less, a busy machine looks like a lost one.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # After a minute without the head Ray itself would end the launcher, which is to end before: here it does so later.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
DECODE_HOSTS = ("127.0.0.3", "127.0.0.4")
NUM_HEAD_CPUS = 2  # for the prefill worker and the router
HEAD_TIMEOUT_S, DRAIN_S = 6, 2
ENDED_S = HEAD_TIMEOUT_S + 2 * (DRAIN_S + 10) + 30  # two stages with their margins, and what Ray's calls may take


@pytest.fixture
def manifests() -> list[Manifest]:
    return render(read_values("kuberay"))


@pytest.fixture
def head(manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHead]:
    """Nodes like the pods of the chart, with their labels and CPUs; the head is also that of the prefill pool."""
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    [ray] = of_kind(manifests, "RayCluster")
    groups = {group["groupName"]: group for group in ray["spec"]["workerGroupSpecs"]}
    with ray_head(NUM_HEAD_CPUS, "--labels", labels_of(groups["prefill"]), **QUICK) as running:
        num_cpus = groups["decode"]["rayStartParams"]["num-cpus"]
        running.add_nodes(DECODE_HOSTS, "--num-cpus", num_cpus, "--labels", labels_of(groups["decode"]))
        yield running


def labels_of(group: Manifest) -> str:
    """As KubeRay gives them to `ray start`."""
    return ",".join(f"{name}={value}" for name, value in group["labels"].items())


@pytest.fixture
def config(manifests: list[Manifest], head: RayHead, tmp_path: Path) -> Path:
    """With what is other than in a pod, and the options that the chart does not use."""
    config = json.loads(named(manifests, "ConfigMap", "cluster")["data"]["cluster.yaml"])
    config["model"] = {"path": str(tiny_model(tmp_path / "tiny"))}
    config["decode"]["replicas"] = 1
    config["security"]["cluster_key_file"] = str(write_private(tmp_path / "key", b"k" * 64))
    config["launch"] |= {"drain_timeout_s": DRAIN_S}
    config["launch"]["ray"] |= {
        "send_cluster_key": True,
        "router": "actor",
        "router_labels": config["launch"]["ray"]["prefill_labels"],
        "head_timeout_s": HEAD_TIMEOUT_S,
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(config))
    return path


def decode_addresses(running: Deployment) -> list[str]:
    return [worker.address for worker in asyncio.run(workers(running, Role.DECODE))]


def test_the_config_of_the_chart_on_several_nodes_one_of_which_is_lost_and_then_the_head(
    head: RayHead, config: Path
) -> None:
    with pytest.raises(DeploymentFailed) as ending, on_ray(head, config) as running:  # noqa: PT012
        expected = answer_of(running.url)
        [decode_host] = [address.rpartition(":")[0] for address in decode_addresses(running)]
        assert decode_host in DECODE_HOSTS
        placed = processes_of(asyncio.run(status(running)).workers)

        head.kill_node(decode_host)
        [other_host] = {*DECODE_HOSTS} - {decode_host}
        wait_until_healthy_at(running, other_host)
        assert answer_of(running.url) == expected
        placed += processes_of(asyncio.run(status(running)).workers)

        head.kill_control_store()
        running.launcher.wait(ENDED_S)
    assert "exit code 1" in str(ending.value)
    assert re.search(rf"the Ray head \(.*\) has not answered for {HEAD_TIMEOUT_S} s", str(ending.value))
    assert_gone(placed)


def wait_until_healthy_at(running: Deployment, host: str) -> None:
    deadline = time.monotonic() + 180
    while not all(address.startswith(f"{host}:") for address in decode_addresses(running)) or not is_served(running):
        assert time.monotonic() < deadline, running.log_tail()
        time.sleep(0.2)


def is_served(running: Deployment) -> bool:
    """All workers are ready and the router has found them."""
    return all(worker.engine_id for worker in asyncio.run(status(running)).workers) and is_healthy(running.url)
