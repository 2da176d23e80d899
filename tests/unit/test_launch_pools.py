"""Which worker leaves: not the last one that serves, and who does not serve leaves first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.launch import pools
from cluster.launch.control_messages import Answer, Command, Doing, Done, Drain, Refused, Scale
from cluster.launch.pools import WorkerPools
from cluster.launch.topology import WorkerGroup
from cluster.launch.view import Serving
from cluster.types import Role


@dataclass(frozen=True)
class FakeProcess:
    name: str


class FakeWorker:
    def __init__(self, role: Role, index: int) -> None:
        self.group = WorkerGroup(f"{role.value}-{index}", role, "127.0.0.1", 9000 + index, ())
        self.process = FakeProcess(self.group.name)

    async def close(self) -> None:
        pass


@dataclass
class FakeLauncher:
    states: dict[str, str] = field(default_factory=dict)  # not ready
    hangs: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    is_serving = True

    def state_of(self, name: str) -> str:
        return self.states.get(name, "ready")

    async def drain(self, name: str) -> bool:
        self.left.append(name)
        return name not in self.hangs


class FakeMembers:
    def leave(self, group: WorkerGroup) -> None:
        pass


async def tell(launcher: FakeLauncher, command: Command, monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Two prefill workers and three decode workers."""
    monkeypatch.setattr(pools, "ROUTER_READS_S", 0.0)
    workers = [
        FakeWorker(role, index) for role, count in ((Role.PREFILL, 2), (Role.DECODE, 3)) for index in range(count)
    ]
    arguments: Any = (
        launcher,
        ClusterConfig(),
        Serving(url="", model_name="", summary=""),
        workers,
        None,
        FakeMembers(),
    )
    return [answer async for answer in WorkerPools(*arguments).handle(command)]


async def test_the_only_worker_that_is_ready_is_not_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = FakeLauncher({"prefill-1": "restarting"})
    assert await tell(launcher, Drain("prefill-0"), monkeypatch) == [
        Refused("prefill-0 is the only prefill worker that is ready (prefill-1 is restarting): try again later")
    ]
    assert launcher.left == []
    assert (await tell(launcher, Drain("prefill-1"), monkeypatch))[-1] == Done("prefill-1 has left")
    nobody = FakeLauncher({"prefill-0": "starting", "prefill-1": "restarting"})
    assert (await tell(nobody, Drain("prefill-0"), monkeypatch))[-1] == Done("prefill-0 has left")


async def test_a_pool_that_shrinks_loses_those_first_that_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = FakeLauncher({"decode-0": "restarting"})
    answers = await tell(launcher, Scale({Role.DECODE: 1}), monkeypatch)
    assert launcher.left == ["decode-0", "decode-2"]
    assert answers[-1] == Done("prefill=2, decode=1")


@pytest.mark.parametrize("command", [Drain("decode-2"), Scale({Role.DECODE: 2})])
async def test_whoever_asked_sees_that_a_worker_had_to_be_killed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    *progress, last = await tell(FakeLauncher(hangs={"decode-2"}), command, monkeypatch)
    killed = "decode-2 was killed, it did not drain in time"
    assert isinstance(last, Done)
    assert not last.is_clean
    assert killed in [last.what, *(each.what for each in progress if isinstance(each, Doing))]
