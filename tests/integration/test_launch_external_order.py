"""What ranks say in an order that is rare: one is fast, another slow, and the launch ends between their words."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, StartupError, TandemError
from cluster.launch import external, external_follower, external_leader
from cluster.launch.external_channel import Channel
from cluster.launch.external_follower import Follower
from cluster.launch.external_join import report_problem
from cluster.launch.external_leader import Leader
from cluster.launch.external_messages import Assigned, Failed, Listening, Refused, State, StopWanted
from cluster.launch.external_outcome import Outcome
from cluster.launch.external_rendezvous import Rendezvous, open_rendezvous
from cluster.launch.run_directory import cluster_key_file
from cluster.launch.specs import worker_spec
from cluster.launch.topology import plan_topology
from tests.integration.fake_rank import faked, healthy
from tests.integration.test_launch_rendezvous import CONFIG, configured, identity, joined, next_news, own_ports
from tests.waiting import until

__all__ = ["own_ports"]  # a fixture
WAIT_S = 60.0


@pytest.fixture
def survives_sigterm() -> Iterator[None]:
    """Where nobody handles it the test fails, and not all tests end."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


class FakeLauncher:
    """Serves, as rank 0 sees it, once its probe says so."""

    served = False

    def __init__(
        self, specs: object, settings: object, view: object, probe: Callable[[], Awaitable[None]], **_: object
    ) -> None:
        self._probe = probe
        self.is_stopping = False

    async def run(self) -> None:
        await self._probe()
        FakeLauncher.served = True


def leader(config: ClusterConfig, shown: list[TandemError]) -> Leader:
    """Of a prefill and a decode worker."""
    topology = plan_topology(config, 1)
    assert len(topology.groups) == 2
    return Leader(config, identity(0), topology, Console(file=io.StringIO()), shown.append)


async def leader_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[Channel, Channel], Awaitable[None]]
) -> tuple[Outcome, str]:
    """How rank 0 ends beside two ranks that have joined and do what `story` says, and what it has shown. It waits for
    no rank that knows already, or is gone."""
    shown: list[TandemError] = []
    monkeypatch.setattr(external_leader, "LocalLauncher", FakeLauncher)
    monkeypatch.setattr(external_leader, "answers_health", healthy)
    monkeypatch.setattr(external_leader, "TELL_S", 10 * WAIT_S)
    monkeypatch.setattr(FakeLauncher, "served", False)
    running = asyncio.create_task(leader(CONFIG, shown).run(tmp_path, cluster_key_file(tmp_path, None), None))
    try:
        async with asyncio.timeout(WAIT_S), joined(1) as one, joined(2) as two:
            await story(one, two)
            for channel in (one, two):
                await channel.close()
            return await running, "\n".join(error.message for error in shown)
    finally:
        running.cancel()


async def assigned(channel: Channel) -> None:
    assert isinstance(await channel.receive(), Assigned)


async def test_a_rank_may_be_ready_before_another_has_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fast: Channel, slow: Channel) -> None:
        await assigned(fast)
        fast.send(Listening(7001))
        fast.send(State("ready", 1))
        await assigned(slow)
        await asyncio.sleep(0.1)  # so that the other's news come first
        slow.send(Listening(7002))
        slow.send(State("ready", 2))
        await until(lambda: FakeLauncher.served)

    await leader_with(tmp_path, monkeypatch, story)
    assert FakeLauncher.served


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (StopWanted("SIGUSR1"), "SIGUSR1 at rank 2 (decode-0)"),
        (Failed("out of memory"), "rank 2 (decode-0) on"),
    ],
)
async def test_a_rank_that_wants_to_stop_before_all_have_ports_ends_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: StopWanted | Failed, expected: str
) -> None:
    async def story(one: Channel, two: Channel) -> None:
        await assigned(one)
        await assigned(two)
        two.send(word)
        await two.close()
        assert isinstance(await one.receive(), Refused)

    outcome, shown = await leader_with(tmp_path, monkeypatch, story)
    assert outcome.exit_code == 1
    assert expected in shown
    assert not FakeLauncher.served


async def test_a_rank_that_fails_while_others_are_awaited_says_why() -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous, joined(1) as one:
        one.send(Failed("SIGTERM while this rank waited for the others"))
        with pytest.raises(StartupError, match=r"rank 1 on .* has failed: SIGTERM while this rank waited"):
            await rendezvous.gather(WAIT_S)


async def test_a_rank_whose_worker_runs_already_ends_with_the_reason_when_rank_0_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_follower, "worker_spec", lambda *given: faked(worker_spec(*given)))
    shown: list[TandemError] = []
    output = io.StringIO()
    follower = Follower(CONFIG, identity(1, 2), "prefill-0", Console(file=output), shown.append)
    async with open_rendezvous(identity(0, 2), CONFIG, None) as rendezvous, asyncio.timeout(WAIT_S):
        running = asyncio.create_task(follower.run(tmp_path, None))
        await rendezvous.gather(WAIT_S)
        await serve_a_part(rendezvous, tmp_path)
        await rendezvous.refuse_everyone("rank 2 (decode-0) on there has failed: no memory\nits last words", 0.0)
        outcome = await running
    assert outcome == Outcome("rank 2 (decode-0) on there has failed: no memory\nits last words", 1)
    assert "rank 0 has given up: rank 2 (decode-0) on there has failed: no memory; ending" in output.getvalue()
    assert not shown, "rank 0 has told the user"


async def serve_a_part(rendezvous: Rendezvous, directory: Path) -> None:
    group = plan_topology(CONFIG, 1).groups[0]
    key_file = cluster_key_file(directory, None)
    rendezvous.send(1, Assigned(group=group, reachable_host=group.host, key_file=str(key_file)))
    state = await next_news(rendezvous, State)
    assert isinstance(state, State)
    assert state.state == "ready"


async def test_rank_0_does_not_wait_for_a_rank_that_has_said_why_it_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_leader, "TELL_S", 10 * WAIT_S)
    shown: list[TandemError] = []
    async with asyncio.timeout(WAIT_S):
        running = asyncio.create_task(leader(CONFIG, shown).run(tmp_path, cluster_key_file(tmp_path, None), None))
        async with joined(1) as one:
            assert await report_problem(identity(2), CONFIG, "no such GPU", WAIT_S)
            assert isinstance(await one.receive(), Refused)
        assert (await running).exit_code == 1
    assert [error.message for error in shown] == [f"rank 2 on {socket.gethostname()}: no such GPU"]


@pytest.mark.usefixtures("survives_sigterm")
async def test_a_signal_ends_rank_0_while_it_waits_for_ranks_that_do_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_leader, "TELL_S", 10 * WAIT_S)
    shown: list[TandemError] = []
    lonely = leader(configured(launch__join_timeout_s=1), shown)
    running = asyncio.create_task(lonely.run(tmp_path, cluster_key_file(tmp_path, None), None))
    await until(lambda: bool(shown))
    signal.raise_signal(signal.SIGTERM)
    assert (await asyncio.wait_for(running, WAIT_S)).exit_code == 1
    assert len(shown) == 1
    assert "still waits for ranks 1, 2 of 3" in shown[0].message


@pytest.mark.usefixtures("survives_sigterm")
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_cannot_start_says_why_also_when_it_is_told_to_stop(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would tell the others, but none comes."""
    monkeypatch.setattr(external, "TELL_S", 10 * WAIT_S)
    monkeypatch.setattr(external, "LISTEN_FOR_RANK_0_S", 10 * WAIT_S)
    shown: list[TandemError] = []
    problem = ConfigError("decode.engine.device: there is no GPU")
    ending = asyncio.create_task(external._fail_together(CONFIG, identity(rank), problem, shown.append))
    await asyncio.sleep(0.3)
    signal.raise_signal(signal.SIGTERM)
    assert (await asyncio.wait_for(ending, WAIT_S)).exit_code == 2
    assert shown == [problem]
