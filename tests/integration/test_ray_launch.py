"""`cluster launch --ray` in a real Ray of this machine: placed, killed, replaced, scaled, gone."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.deployment import Deployment, DeploymentFailed
from benchmarks.drain import status, tell
from benchmarks.launch_ray import prove
from benchmarks.ray_head import RayHead, ray_head
from cluster.launch.control_messages import Done, Drain
from cluster.types import Role
from tests.integration.ray_deployments import (
    RUN_S,
    answer_of,
    answering_workers,
    assert_gone,
    failed_launch,
    needs_ray,
    on_ray,
    processes_of,
    tiny_model,
)

pytestmark = [needs_ray, pytest.mark.timeout(400), pytest.mark.slow]
NUM_CPUS = 5
CONCURRENCY = 2  # the workers that are started meanwhile need the cores too


@pytest.fixture(scope="module", autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where launches and actors keep their private directories, and control commands look for them."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        yield directory


@pytest.fixture(scope="module")
def head(runtime: Path) -> Iterator[RayHead]:
    with ray_head(NUM_CPUS) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def running(head: RayHead, model: Path, runtime: Path) -> Iterator[Deployment]:
    with on_ray(head, model, "decode.replicas=2") as running:
        yield running
        pids = processes_of(answering_workers(running))
    assert_gone(pids)
    assert list(runtime.iterdir()) == [], "a private directory is left"
    assert placement_groups(head) == {}


def placement_groups(head: RayHead) -> dict[str, tuple[str, str]]:
    """Name to state and strategy of those that are reserved or asked for. A driver of its own asks."""
    script = (
        "import json, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); "
        "groups = ray.util.placement_group_table().values(); "
        "print(json.dumps([(each['name'], each['state'], each['strategy']) for each in groups]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, head.address],
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=True,
    )
    groups = json.loads(done.stdout.splitlines()[-1])
    return {name: (state, strategy) for name, state, strategy in groups if state != "REMOVED"}


def test_pools_are_placed(running: Deployment, head: RayHead) -> None:
    names = {worker.name for worker in asyncio.run(status(running)).workers}
    assert placement_groups(head) == {f"tandem-{name}": ("CREATED", "STRICT_PACK") for name in names}


def test_an_actor_dies_and_a_pool_changes_under_load_and_nothing_is_lost(running: Deployment) -> None:
    before = answering_workers(running)
    expected = answer_of(running.url)
    proof = asyncio.run(prove(running, CONCURRENCY, [Role.DECODE]))
    assert proof.tally.streams > 0
    assert (proof.tally.lost, proof.tally.not_one_end, proof.tally.wrong, proof.leaked_blocks) == (0, 0, 0, 0)
    assert (proof.replaced, proof.scaled) == (1, 2)
    assert answer_of(running.url) == expected
    after = answering_workers(running)
    assert len({worker.engine_id for worker in before} & {worker.engine_id for worker in after}) == 2


def test_a_worker_is_drained_and_its_place_given_up(running: Deployment, head: RayHead) -> None:
    drained = asyncio.run(tell(running, Drain("decode-0")))
    assert drained == Done("decode-0 has left")
    assert "tandem-decode-0" not in placement_groups(head)


def test_a_killed_launcher_takes_actors_and_workers_with_it(head: RayHead, model: Path) -> None:
    with pytest.raises(DeploymentFailed, match="exit code -9"), on_ray(head, model) as victim:  # noqa: PT012
        pids = processes_of(answering_workers(victim))
        assert len(pids) == 4
        victim.launcher.kill()
    assert_gone(pids)


def test_too_little_is_told_with_what_was_asked_for_and_what_there_is(head: RayHead, model: Path) -> None:
    settings = ("launch.ray.cpus_per_rank=100", "launch.ray.placement_timeout_s=1")
    done = failed_launch(head, model, *settings)
    assert done.returncode == 1
    assert "placement_timeout_s (1 s)" in done.stderr
    assert "asked for: 1 bundle of CPU 100 (STRICT_PACK)" in done.stderr
    assert f"CPU {NUM_CPUS}" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_no_ray_there_is_told(head: RayHead, model: Path) -> None:
    done = failed_launch(head, model, "launch.ray.address=127.0.0.1:1", "launch.ray.connect_timeout_s=1")
    assert done.returncode == 1
    assert "nothing listens at 127.0.0.1:1 for 1 s" in done.stderr
