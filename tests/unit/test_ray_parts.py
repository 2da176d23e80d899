"""Launching with Ray, without Ray: what is asked for, what is refused, and the actor's supervision of a process."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cluster.config import ClusterConfig, RaySettings, load_config
from cluster.errors import ConfigError, StartupError
from cluster.launch import ray_actor, ray_cluster
from cluster.launch.pools import Members
from cluster.launch.ray_actor import RankActor
from cluster.launch.ray_cluster import RayCluster, connected
from cluster.launch.ray_handle import RankHandle, RankLost, reason_of
from cluster.launch.ray_messages import (
    Ended,
    Logged,
    News,
    NotStarted,
    Order,
    Said,
    Started,
    batch_decoder,
    encode,
    start_decoder,
)
from cluster.launch.ray_plan import check_ray, placement_request, router_request
from cluster.launch.ray_workers import Blueprint
from cluster.launch.topology import Rank, WorkerGroup, plan_topology
from cluster.launch.topology_table import topology_table
from cluster.model_files.source import ModelSource, SourceKind
from cluster.process_events import Ready
from cluster.types import Role

WAIT_S = 20.0


def configured(*settings: str) -> ClusterConfig:
    pairs = [setting.partition("=") for setting in ("launch.backend=ray", *settings)]
    return load_config(overrides=[("test", key, text) for key, _, text in pairs])


def group_of(*stages: int, role: Role = Role.DECODE) -> WorkerGroup:
    """A group with a rank for each given stage."""
    ranks = tuple(Rank(index, "cpu", 1, stage) for index, stage in enumerate(stages))
    return WorkerGroup(f"{role.value}-0", role, "127.0.0.1", 0, ranks)


def test_one_rank_is_one_bundle() -> None:
    request = placement_request(configured(), group_of(0))
    assert (request.strategy, request.bundles) == ("STRICT_PACK", ({"CPU": 1.0},))


def test_the_ranks_of_one_stage_share_a_node_and_stages_are_packed() -> None:
    config = configured("decode.engine.device=cuda", "decode.engine.num_threads=2")
    one_stage = placement_request(config, group_of(0, 0, 0, 0))
    assert one_stage.strategy == "STRICT_PACK"
    assert one_stage.bundles == ({"CPU": 2.0, "GPU": 1.0},) * 4
    assert one_stage.bundle_of_rank == (0, 1, 2, 3)
    two_stages = placement_request(config, group_of(0, 0, 1, 1))
    assert two_stages.strategy == "PACK"
    assert two_stages.bundles == ({"CPU": 4.0, "GPU": 2.0},) * 2
    assert two_stages.bundle_of_rank == (0, 0, 1, 1)
    assert str(two_stages) == "2 bundles of CPU 4, GPU 2 (PACK)"


def test_labels_are_those_of_the_pool() -> None:
    config = configured("launch.ray.prefill_labels=pool=p, zone=a", "launch.ray.cpus_per_rank=0.5")
    assert placement_request(config, group_of(0, role=Role.PREFILL)).labels == {"pool": "p", "zone": "a"}
    assert placement_request(config, group_of(0)).labels == {}
    assert placement_request(config, group_of(0)).bundles == ({"CPU": 0.5},)
    assert router_request(configured("launch.ray.router_labels=for=router")).labels == {"for": "router"}


def test_threads_are_what_is_reserved() -> None:
    topology = plan_topology(configured("launch.ray.cpus_per_rank=3.5", "decode.engine.num_threads=2"), num_cores=64)
    assert [group.ranks[0].num_threads for group in topology.groups] == [3, 2]


NETWORK = "security.allow_plaintext_network=true"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["monolithic=true"], "`monolithic: true` is one process"),
        ([NETWORK, "prefill.host=10.0.0.5"], "prefill.host: 10.0.0.5 is an address of one machine"),
        ([NETWORK], "security.cluster_key_file: workers may be placed on other nodes"),
        (["decode.engine.device=cuda:1"], "decode.engine.device: Ray gives each rank its own GPU, so cuda:1 is not"),
        (
            ["decode.engine.device=cuda", "launch.ray.gpus_per_rank=0.5"],
            "decode.engine.kv_cache_bytes: must be set with launch.ray.gpus_per_rank 0.5",
        ),
        (
            [NETWORK, "launch.ray.send_cluster_key=true", "launch.ray.router=actor"],
            "router.host: 127.0.0.1 cannot be reached from outside",
        ),
    ],
)
def test_what_cannot_be_had_with_ray_is_named(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ray(configured(*settings))
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("launch.ray.address=ray://head:10001", "not of a Ray Client"),
        ("launch.ray.address=head", "expected auto, local or HOST:PORT"),
        ("launch.ray.cpus_per_rank=0", "launch.ray.cpus_per_rank: must be between"),
        ("launch.ray.gpus_per_rank=2", "launch.ray.gpus_per_rank: must be between"),
        ("launch.ray.head_timeout_s=0", "launch.ray.head_timeout_s: must be between"),
        ("launch.ray.decode_labels=pool", "launch.ray.decode_labels: expected NAME=VALUE,NAME=VALUE, got 'pool'"),
        ("launch.backend=slurm", 'expected "local" or "ray"'),
    ],
)
def test_values_out_of_range_are_named(setting: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(setting)
    assert reason in caught.value.message


def test_what_can_be_had_is_accepted() -> None:
    check_ray(configured())
    check_ray(configured(NETWORK, "security.cluster_key_file=/etc/key", "prefill.host=0.0.0.0"))
    check_ray(configured("decode.engine.device=cuda:0", "launch.ray.router=actor"))


def test_the_plan_shows_what_ray_is_asked_for() -> None:
    config = configured("decode.replicas=2")
    console = Console(file=io.StringIO(), width=200)
    console.print(topology_table(plan_topology(config, num_cores=1), config))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("1 bundle of CPU 1 (STRICT_PACK)") == 3


def test_another_node_is_told_how_to_find_the_model(tmp_path: Path) -> None:
    def reference(path: str, model: ModelSource, *settings: str) -> str:
        config = configured(f"model.path={path}", *settings)
        return Blueprint(config, model, "served", tmp_path / "key", Members(tmp_path)).model_reference

    hub = ModelSource(SourceKind.DIRECTORY, Path("/cache/snapshots/abc"), name="org/model", revision="abc")
    demo = ModelSource(SourceKind.GGUF, Path("/cache/demo.gguf"), name="demo")
    local = ModelSource(SourceKind.DIRECTORY, Path("models/mine"), name="mine")
    assert reference("org/model", hub) == "/cache/snapshots/abc"
    assert reference("org/model", hub, NETWORK) == "org/model@abc"
    assert reference("demo", demo, NETWORK) == "demo"
    assert reference("models/mine", local, NETWORK) == str(Path.cwd() / "models/mine")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StartupError, match=r"tandem-serving\[ray\]"), connected(RaySettings(), print):
        pass


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("The actor died unexpectedly.\n\tclass_name: A\nThe actor is dead because it was killed.", "it was killed."),
        ("The actor died because its node has died. Node Id: 1", "its node has died. Node Id: 1"),
        ("The actor is dead because X. Some common causes include: (1) the moon", "because X."),
        (
            "The actor died because of an error raised in its creation task, A\nValueError: no disk",
            "ValueError: no disk",
        ),
        ("task failed\nModuleNotFoundError: No module named 'cluster'", "install the same Tandem on every node of Ray"),
        ("", ""),
    ],
)
def test_of_what_ray_says_the_reason_is_kept(said: str, reason: str) -> None:
    kept = reason_of(Exception(said))
    assert kept.endswith(reason)
    assert "\n" not in kept


@pytest.fixture
async def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RankActor]:
    """As Ray would run it, on an event loop."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    actor = RankActor()
    yield actor
    await actor.close()
    assert is_empty(tmp_path)


def order(behaviour: str) -> bytes:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return encode(Order("one", ("tests.integration.fake_process", behaviour), environment, {"a.json": b"{}"}))


def is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


def modes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in directory.rglob("*.json")}


async def start(actor: RankActor, behaviour: str) -> int:
    started = start_decoder.decode(await actor.start(order(behaviour)))
    assert isinstance(started, Started)
    return started.pid


def is_end(news: News) -> bool:
    return isinstance(news, Ended)


def is_ready(news: News) -> bool:
    return isinstance(news, Said) and isinstance(news.event, Ready)


async def news_until(actor: RankActor, is_last: Callable[[News], bool]) -> list[News]:
    """All news there are, up to that one."""
    news: list[News] = []
    next_number = 0
    async with asyncio.timeout(WAIT_S):
        while not news or not is_last(news[-1]):
            batch = batch_decoder.decode(await actor.news(next_number))
            next_number = batch.next_number
            news += batch.news
    return news


async def test_an_actor_starts_a_process_and_tells_its_end(actor: RankActor, tmp_path: Path) -> None:
    await start(actor, "crash-at-start")
    assert modes(tmp_path) == {"a.json": 0o600}
    news = await news_until(actor, is_end)
    assert Logged("the weights are not here") in news
    assert news[-1] == Ended(3, "exit code 3", ("looking for the weights", "the weights are not here"))


async def test_news_are_kept_until_they_are_acknowledged(actor: RankActor) -> None:
    await start(actor, "fail-at-start")
    await news_until(actor, is_end)
    first = batch_decoder.decode(await actor.news(0))
    again = batch_decoder.decode(await actor.news(0))
    assert first == again
    rest = batch_decoder.decode(await actor.news(first.next_number - 1))
    assert rest.news == first.news[-1:]
    assert rest.next_number == first.next_number


async def test_a_second_start_ends_the_first_process_and_its_news(actor: RankActor) -> None:
    pid = await start(actor, "deaf")
    await start(actor, "fail-at-start")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    news = await news_until(actor, is_end)
    assert [each.exit_code for each in news if isinstance(each, Ended)] == [1]


async def test_signals_reach_the_process(actor: RankActor) -> None:
    await start(actor, "serve")
    await news_until(actor, is_ready)
    await actor.signal(signal.SIGTERM)
    assert (await news_until(actor, is_end))[-1] == Ended(0, "exit code 0", ("drained",))
    await actor.signal(signal.SIGTERM)  # nobody is there


async def test_what_belongs_to_ray_is_not_inherited(actor: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    pid = await start(actor, "deaf")
    await news_until(actor, is_ready)
    assert "RAY_AUTH_TOKEN" not in environment_of(pid)


async def test_a_process_that_cannot_be_started_is_told(actor: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    answer = start_decoder.decode(await actor.start(order("serve")))
    assert answer == NotStarted("one cannot be started: No such file or directory")


async def test_log_lines_nobody_asks_for_are_bounded(actor: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actor, "MAX_NEWS", 3)
    for number in range(5):
        actor.on_log("one", str(number))
    batch = batch_decoder.decode(await actor.news(0))
    assert batch.news == (Logged("2"), Logged("3"), Logged("4"))
    assert batch.next_number == 5


async def test_an_actor_ends_when_its_launcher_is_silent(actor: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(ray_actor, "LAUNCHER_SILENCE_S", 0.2)
    monkeypatch.setattr(os, "_exit", ended.append)
    pid = await start(actor, "deaf")
    await asyncio.wait_for(actor._end_without_launcher(), WAIT_S)
    assert ended == [1]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_copy_of_the_members_follows_them(tmp_path: Path) -> None:
    (tmp_path / "prefill.members").write_text("[]")
    (tmp_path / "decode.members").write_text("[]")
    members = Members(tmp_path)
    changes = members.changes()
    assert (await anext(changes))["decode.members"] == b"[]"
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    members.join(replace(group_of(0), port=7))
    assert (await asyncio.wait_for(waiting, WAIT_S))["decode.members"] == b'{"decode-0":"127.0.0.1:7"}'
    members.leave(group_of(0))
    assert (await anext(changes))["decode.members"] == b"{}"


async def test_a_head_is_gone_when_it_is_silent_and_was_not_just_missed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause of the launcher itself much time has passed since the last answer, and one probe may fail."""
    answers = iter([True, False, True, False, False])

    async def answers_now(address: str) -> bool:
        return next(answers)

    monkeypatch.setattr(ray_cluster, "_answers", answers_now)
    monkeypatch.setattr(ray_cluster, "PROBE_PAUSE_S", 0.0)
    cluster = RayCluster.__new__(RayCluster)
    cluster._watched = {"10.0.0.1:6379": "head"}
    cluster._settings = RaySettings(head_timeout_s=0.0)
    told: list[str] = []
    await asyncio.wait_for(cluster.watch_head(told.append), WAIT_S)
    assert told == ["the Ray head (10.0.0.1:6379) has not answered for 0 s"]
    assert not list(answers), "it was given up before it was missed twice in a row"


async def test_an_answer_that_came_while_the_launcher_was_paused_counts() -> None:
    class RayError(Exception):
        pass

    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()
    errors = SimpleNamespace(
        RayError=RayError, RayActorError=RayError, ActorUnavailableError=type("Gone", (RayError,), {})
    )
    actor = SimpleNamespace(place=SimpleNamespace(remote=lambda: answer))
    calling = asyncio.create_task(RankHandle(SimpleNamespace(exceptions=errors), actor).call("place", timeout_s=0.5))
    await asyncio.sleep(0.05)
    threading.Timer(0.2, lambda: loop.call_soon_threadsafe(answer.set_result, b"here")).start()
    time.sleep(1.0)  # noqa: ASYNC251  as if by SIGSTOP
    assert await calling == b"here"
    answer = loop.create_future()
    with pytest.raises(RankLost, match=r"did not answer within 0\.1 s"):
        await RankHandle(SimpleNamespace(exceptions=errors), actor).call("place", timeout_s=0.1)
    assert answer.cancelled()
