"""`cluster launch --ray` over several nodes: raylets of this machine with addresses of their own."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.deployment import Deployment, DeploymentFailed
from benchmarks.drain import status
from benchmarks.launch_ray import workers
from benchmarks.ray_head import RayHead, ray_head
from cluster.types import Role
from tests.integration.ray_deployments import answer_of, assert_gone, needs_ray, on_ray, processes_of, tiny_model

pytestmark = [needs_ray, pytest.mark.timeout(400), pytest.mark.slow]

# Ray notices a lost node in seconds rather than in half a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}
OTHERS = ("127.0.0.3", "127.0.0.4")
HEAD_TIMEOUT_S, DRAIN_S = 3, 3
ENDED_S = HEAD_TIMEOUT_S + 2 * (DRAIN_S + 10) + 30  # two stages with their margins, and what Ray's calls may take
CONFIG = """
model: {{path: {model}}}
router: {{host: 0.0.0.0}}
security: {{allow_plaintext_network: true}}
launch:
  drain_timeout_s: {drain}
  ray: {{decode_labels: {{pool: decode}}, send_cluster_key: true, router: actor, head_timeout_s: {timeout}}}
"""


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHead]:
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    with ray_head(4, **QUICK) as running:
        running.add_nodes(OTHERS, "--num-cpus", "2", "--labels", "pool=decode")
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Label selectors are mappings, which have no form as a flag."""
    path = tmp_path / "cluster.yaml"
    model = tiny_model(tmp_path / "tiny")
    path.write_text(CONFIG.format(model=model, timeout=HEAD_TIMEOUT_S, drain=DRAIN_S))
    return path


def decode_addresses(running: Deployment) -> list[str]:
    return [worker.address for worker in asyncio.run(workers(running, Role.DECODE))]


def test_workers_on_other_nodes_move_when_one_is_lost_and_all_ends_with_the_head(head: RayHead, config: Path) -> None:
    with pytest.raises(DeploymentFailed) as ending, on_ray(head, config) as running:  # noqa: PT012
        expected = answer_of(running.url)
        [decode_host] = [address.rpartition(":")[0] for address in decode_addresses(running)]
        assert decode_host in OTHERS
        placed = processes_of(asyncio.run(status(running)).workers)

        head.kill_node(decode_host)
        [other_host] = {*OTHERS} - {decode_host}
        wait_until_healthy_at(running, other_host)
        assert answer_of(running.url) == expected
        placed += processes_of(asyncio.run(status(running)).workers)

        head.kill_control_store()
        running.launcher.wait(ENDED_S)
    assert "exit code 1" in str(ending.value)
    assert re.search(r"the Ray head \(.*\) has not answered for 3 s", str(ending.value))
    assert_gone(placed)


def wait_until_healthy_at(running: Deployment, host: str) -> None:
    deadline = time.monotonic() + 90
    while not all(address.startswith(f"{host}:") for address in decode_addresses(running)) or not is_healthy(running):
        assert time.monotonic() < deadline, running.log_tail()
        time.sleep(0.2)


def is_healthy(running: Deployment) -> bool:
    """All workers are ready and the router has found them."""
    are_ready = all(worker.engine_id for worker in asyncio.run(status(running)).workers)
    return are_ready and httpx.get(f"{running.url}/health", timeout=5.0).status_code == 200
