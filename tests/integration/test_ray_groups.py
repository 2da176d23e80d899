"""Groups of several ranks in a real Ray, with small fake processes in place of workers, and the launcher over them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ray_head import ray_head
from cluster.config import ClusterConfig, LaunchSettings, RaySettings
from cluster.errors import StartupError
from cluster.launch import local
from cluster.launch.local import LocalLauncher
from cluster.launch.ray_cluster import RayCluster, connected
from cluster.launch.ray_group import RayGroup
from cluster.launch.ray_messages import Order, Place
from cluster.launch.ray_plan import placement_request
from cluster.launch.topology import Rank, WorkerGroup
from cluster.types import Role
from tests.integration.fake_launch import no_probe
from tests.integration.ray_deployments import assert_gone, needs_ray
from tests.integration.test_launch_processes import RecordingView

pytestmark = [needs_ray, pytest.mark.timeout(400), pytest.mark.slow]
NUM_CPUS = 4
WAIT_S, STORY_S = 60.0, 300.0
MARK = "TEST_RANK"


class FakeGroup(RayGroup):
    """Ranks that serve nothing, one for each given stage."""

    def __init__(self, cluster: RayCluster, name: str, *stages: int, label: str = "") -> None:
        ranks = tuple(Rank(index, "cpu", 1, stage) for index, stage in enumerate(stages))
        group = WorkerGroup(name, Role.DECODE, "127.0.0.1", 0, ranks)
        labels = {"pool": label} if label else {}
        request = replace(placement_request(ClusterConfig(), group), labels=labels)
        super().__init__(cluster, request, stop_order=1, only_here=True)

    async def _settle(self, places: Sequence[Place]) -> None:
        assert len({place.node_id for place in places}) == 1

    def _order(self, rank: int, place: Place) -> Order:
        environment = {"PYTHONPATH": str(Path(__file__).parents[2]), MARK: f"{self.name}/{rank}"}
        return Order(self.name, ("tests.integration.fake_process", "serve"), environment, {})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        with ray_head(NUM_CPUS) as head:
            for name, value in head.environment.items():
                patch.setenv(name, value)
            with connected(RaySettings(address=head.address, connect_timeout_s=WAIT_S), print) as cluster:
                yield cluster


@pytest.fixture
def impatient(cluster: RayCluster) -> RayCluster:
    """The same one, for a group that finds no place."""
    import ray  # after its environment is set

    return RayCluster(ray, RaySettings(placement_timeout_s=2.0))


def ranks_of(group: str) -> list[int]:
    """Their processes, by their number."""
    found: dict[str, int] = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            marks = [
                entry for entry in path.read_text(errors="replace").split("\0") if entry.startswith(f"{MARK}={group}/")
            ]
            found |= {mark: int(path.parent.name) for mark in marks}
    return [found[mark] for mark in sorted(found)]


async def all_ranks_of(group: str, count: int) -> list[int]:
    """Once that many can be seen: a process that has just been started has no environment yet, and one that has been
    killed may not be gone."""
    async with asyncio.timeout(WAIT_S):
        while len(found := ranks_of(group)) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return found


def actors_of(pids: Sequence[int]) -> list[int]:
    return [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids]


async def until_nothing_is_reserved() -> None:
    import ray  # after its environment is set

    async with asyncio.timeout(WAIT_S):
        while any(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def until_no_cpu_is_free() -> None:
    """The head hears of it a moment after a group has its place."""
    import ray  # after its environment is set

    async with asyncio.timeout(WAIT_S):
        while ray.available_resources().get("CPU", 0.0):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def launched(
    groups: Sequence[FakeGroup], story: Callable[[LocalLauncher, RecordingView], Awaitable[None]]
) -> None:
    view = RecordingView()
    launcher = LocalLauncher(groups, LaunchSettings(drain_timeout_s=1.0), view, no_probe)
    running = asyncio.create_task(launcher.run())
    try:
        async with asyncio.timeout(STORY_S):
            await view.until("cluster", "serving")
            await story(launcher, view)
            launcher.stop("enough")
            await running
    finally:
        running.cancel()
        for group in groups:
            await group.close()
    for group in groups:
        await all_ranks_of(group.name, 0)
    await until_nothing_is_reserved()


async def test_a_group_that_loses_a_rank_is_started_anew(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FIRST_RESTART_PAUSE_S", 0.01)

    async def story(launcher: LocalLauncher, view: RecordingView) -> None:
        first = await all_ranks_of("ranks", 3)
        assert launcher.pid_of("ranks") == first[0]
        actors = actors_of(first)
        assert len(set(actors)) == 3
        os.kill(first[2], signal.SIGKILL)
        await view.until("ranks", "died rank 2, killed by SIGKILL, on node ")
        await view.until("ranks", "ready", count=2)
        second = await all_ranks_of("ranks", 3)
        assert not set(first) & set(second)
        assert sorted(actors_of(second)) == sorted(actors), "the actors are still the same"
        os.kill(actors_of(second)[1], signal.SIGKILL)
        await view.until("ranks", "died rank 1, its Ray actor died")
        await view.until("ranks", "ready", count=3)
        third = await all_ranks_of("ranks", 3)
        assert not set(second) & set(third)
        assert_gone(second)
        assert launcher.state_of("ranks") == "ready"
        assert [what.partition(" ")[0] for name, what in view.news if name == "ranks"].count("died") == 2

    await launched([FakeGroup(cluster, "ranks", 0, 0, 0)], story)


async def test_one_that_has_no_place_is_refused_and_the_others_go_on(
    cluster: RayCluster, impatient: RayCluster
) -> None:
    """The stages of a group take a bundle each."""

    async def story(launcher: LocalLauncher, view: RecordingView) -> None:
        staged = await all_ranks_of("staged", 3)
        await until_no_cpu_is_free()
        added = FakeGroup(impatient, "added", 0, 0)
        with pytest.raises(StartupError) as refusal:
            await launcher.add(added)
        assert "asked for: 2 bundles of CPU 1 (STRICT_PACK)" in refusal.value.message
        assert "free: nothing" in refusal.value.message
        assert f": CPU {NUM_CPUS}" in refusal.value.message
        await added.close()
        assert ranks_of("staged") == staged
        assert await launcher.drain("small")
        await groups[1].close()
        later = FakeGroup(cluster, "later", 0)
        await launcher.add(later)
        assert launcher.state_of("later") == "ready"
        assert await launcher.drain("later")
        await later.close()

    groups = [FakeGroup(cluster, "staged", 0, 0, 1), FakeGroup(cluster, "small", 0)]
    await launched(groups, story)


async def test_what_ray_refuses_is_told_in_its_words(cluster: RayCluster) -> None:
    group = FakeGroup(cluster, "odd", 0, label="not a label!")
    with pytest.raises(StartupError, match=r"odd: Ray says: .*not a label!"):
        await group.prepare(RecordingView())


async def test_a_launch_that_waits_for_a_place_can_be_stopped(cluster: RayCluster) -> None:
    group = FakeGroup(cluster, "large", *[0] * (NUM_CPUS + 1))
    view = RecordingView()
    launcher = LocalLauncher([group], LaunchSettings(), view, no_probe)
    running = asyncio.create_task(launcher.run())
    await view.until("large", "Progress")
    await asyncio.sleep(0.3)
    launcher.stop("enough")
    await asyncio.wait_for(running, RaySettings().placement_timeout_s / 2)  # not the time that a place is waited for
    await until_nothing_is_reserved()
