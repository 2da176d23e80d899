"""Which worker gets which GPU and what share of it; the MPS daemon's beginning and end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.gpu_share import PIPE_VARIABLE, has_mps
from cluster.launch import mps
from cluster.launch.external_facts import visible_gpus
from cluster.launch.gpus import (
    place_on_gpus,
    shared_gpus,
    shares_of_others,
    shares_without_effect,
    with_a_gpu,
    without_shares,
)
from cluster.launch.topology import Topology, next_group, plan_topology
from cluster.types import Role


def configured(**document: Any) -> ClusterConfig:
    document = {name: {"engine": {"device": "cuda"}, **pool} for name, pool in document.items()}
    return msgspec.convert(document, ClusterConfig)


def placed(num_gpus: int, *, has_daemon: bool = False, **document: Any) -> Topology:
    config = configured(**document)
    return place_on_gpus(plan_topology(config, 8), config, num_gpus, has_daemon=has_daemon)


def devices(topology: Topology) -> dict[str, tuple[str, int | None, int]]:
    return {
        group.name: (rank.device, rank.gpu_percent, rank.num_sharers)
        for group in topology.groups
        for rank in group.ranks
    }


def test_each_worker_gets_a_gpu_of_its_own_while_there_are_enough() -> None:
    topology = placed(3, prefill={"replicas": 2}, decode={})
    assert devices(topology) == {
        "prefill-0": ("cuda:0", None, 1),
        "prefill-1": ("cuda:1", None, 1),
        "decode-0": ("cuda:2", None, 1),
    }
    assert shared_gpus(topology) == frozenset()


def test_a_gpu_that_was_given_by_number_is_not_dealt_out_while_others_are_free() -> None:
    topology = placed(2, prefill={"engine": {"device": "cuda:0"}}, decode={})
    assert devices(topology) == {"prefill-0": ("cuda:0", None, 1), "decode-0": ("cuda:1", None, 1)}
    topology = placed(4, prefill={"replicas": 2}, decode={"engine": {"device": "cuda:1"}})
    assert [device for device, _, _ in devices(topology).values()] == ["cuda:0", "cuda:2", "cuda:1"]
    topology = placed(2, prefill={"replicas": 2}, decode={"engine": {"device": "cuda:1"}})
    assert [device for device, _, _ in devices(topology).values()] == ["cuda:0", "cuda:0", "cuda:1"]


def test_workers_on_one_gpu_share_its_memory_and_multiprocessors() -> None:
    topology = placed(1, prefill={}, decode={})
    assert devices(topology) == {"prefill-0": ("cuda:0", 80, 2), "decode-0": ("cuda:0", 100, 2)}
    assert shared_gpus(topology) == {"cuda:0"}
    told = placed(1, prefill={"gpu_percent": 40}, decode={"gpu_percent": 80})
    assert devices(told) == {"prefill-0": ("cuda:0", 40, 2), "decode-0": ("cuda:0", 80, 2)}


def test_a_share_of_a_gpu_that_is_not_shared_needs_a_daemon_of_the_operator() -> None:
    """Without one it does nothing, but the worker would do without the library."""
    pools: dict[str, Any] = {"prefill": {"replicas": 2, "gpu_percent": 60}, "decode": {}}
    on_two, on_three = placed(2, **pools), placed(3, **pools)
    assert devices(on_two) == {
        "prefill-0": ("cuda:0", 60, 2),
        "prefill-1": ("cuda:1", None, 1),
        "decode-0": ("cuda:0", 100, 2),
    }
    assert [percent for _, percent, _ in devices(on_three).values()] == [None, None, None]
    assert [percent for _, percent, _ in devices(placed(3, has_daemon=True, **pools)).values()] == [60, 60, None]
    config = configured(**pools)
    (warning,) = shares_without_effect(on_two, config)
    assert warning.startswith(
        "prefill.gpu_percent: 60 has no effect on prefill-1, which has cuda:1 to itself; leave it out"
    )
    assert [text.partition(",")[0][-9:] for text in shares_without_effect(on_three, config)] == [
        "prefill-0",
        "prefill-1",
    ]
    assert shares_without_effect(placed(3, has_daemon=True, **pools), config) == []
    assert shares_without_effect(placed(1, prefill={}, decode={}), configured(prefill={}, decode={})) == []


def test_shares_are_the_business_of_who_places_the_workers() -> None:
    (warning,) = shares_of_others(configured(prefill={"gpu_percent": 60}, decode={}))
    assert warning.startswith("prefill.gpu_percent: 60 has no effect")
    assert shares_of_others(configured(prefill={}, decode={})) == []


class Deployment:
    """Workers on GPUs that come and go, as `cluster scale` has it."""

    def __init__(self, num_gpus: int, *, has_mps: bool = True, **pools: Any) -> None:
        self.config, self.num_gpus, self.has_mps = configured(**pools), num_gpus, has_mps
        self.groups = list(placed(num_gpus, **pools).groups)

    def leave(self, *names: str) -> None:
        self.groups = [group for group in self.groups if group.name not in names]

    def join(self, role: Role) -> tuple[str, str, int | None, int]:
        like = next(group for group in self.groups if group.role is role)
        group = next_group(like, self.groups, 0)
        has_mps = self.has_mps
        group = with_a_gpu(group, self.groups, self.config, self.num_gpus, has_daemon=False, has_mps=has_mps)
        self.groups.append(group)
        (rank,) = group.ranks
        return group.name, rank.device, rank.gpu_percent, rank.num_sharers


def test_a_worker_that_joins_takes_the_gpu_that_is_free() -> None:
    pools: dict[str, Any] = {"prefill": {"replicas": 2}, "decode": {}}
    four = Deployment(4, **pools)
    assert four.join(Role.DECODE) == ("decode-1", "cuda:3", None, 1)
    with pytest.raises(
        ConfigError, match=r"decode-2 would share cuda:\d, and the workers there have claimed its memory"
    ):
        four.join(Role.DECODE)
    four.leave("prefill-1")
    assert four.join(Role.PREFILL) == ("prefill-1", "cuda:1", None, 1)


def test_who_left_can_come_back_where_gpus_are_shared() -> None:
    pools: dict[str, Any] = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    one = Deployment(1, **pools)
    one.leave("prefill-1", "decode-1")
    assert one.join(Role.PREFILL) == ("prefill-1", "cuda:0", 80, 4)
    assert one.join(Role.DECODE) == ("decode-1", "cuda:0", 100, 4)
    with pytest.raises(ConfigError, match="decode-2 would share cuda:0"):
        one.join(Role.DECODE)
    two = Deployment(2, **pools)
    two.leave("prefill-1", "decode-1")
    assert two.join(Role.PREFILL) == ("prefill-1", "cuda:1", None, 2)
    assert two.join(Role.DECODE) == ("decode-1", "cuda:1", 100, 2)


def test_claims_are_fractions_where_these_are_said() -> None:
    decode = {"engine": {"device": "cuda", "gpu_memory_fraction": 0.3}}
    two = Deployment(2, has_mps=False, prefill={}, decode=decode)
    assert [two.join(Role.DECODE) for _ in range(2)] == [
        ("decode-1", "cuda:1", None, 1),
        ("decode-2", "cuda:1", None, 1),
    ]
    with pytest.raises(ConfigError, match=r"decode-3 would share cuda:\d, .* launch with engine.gpu_memory_fraction"):
        two.join(Role.DECODE)


def test_numbered_devices_are_kept_and_those_without_a_gpu_left_alone() -> None:
    pools: dict[str, Any] = {
        "prefill": {"replicas": 2, "engine": {"device": "cpu"}},
        "decode": {"engine": {"device": "cuda:1", "kv_cache_bytes": 1 << 30}},
    }
    mixed = Deployment(2, **pools)
    assert mixed.join(Role.PREFILL) == ("prefill-2", "cpu", None, 1)
    assert mixed.join(Role.DECODE) == ("decode-1", "cuda:1", 100, 1)  # what its pool takes is the user's business
    config = configured(prefill={"engine": {"device": "cpu"}, "gpu_percent": 40}, decode={})
    (warning,) = shares_without_effect(place_on_gpus(plan_topology(config, 8), config, 1, has_daemon=False), config)
    assert warning == "prefill.gpu_percent: 40 has no effect on prefill-0, which computes on cpu; leave it out"


def test_nobody_is_told_of_a_share_where_the_daemon_did_not_start() -> None:
    topology = without_shares(placed(1, prefill={"gpu_percent": 40}, decode={}))
    assert devices(topology) == {"prefill-0": ("cuda:0", None, 2), "decode-0": ("cuda:0", None, 2)}


def test_a_daemon_of_the_operator_is_known_by_its_pipe(tmp_path: Path) -> None:
    assert not has_mps({}, tmp_path / "control")
    assert has_mps({PIPE_VARIABLE: "/mps"}, tmp_path / "control")
    (tmp_path / "control").touch()
    assert has_mps({}, tmp_path / "control")


def test_a_numbered_device_is_taken_as_said_and_a_missing_one_refused_by_name() -> None:
    topology = placed(2, prefill={"engine": {"device": "cuda:1"}}, decode={"engine": {"device": "cuda:0"}})
    assert [device for device, _, _ in devices(topology).values()] == ["cuda:1", "cuda:0"]
    with pytest.raises(ConfigError, match=r"decode\.engine\.device: 'cuda:2' was asked for, .* has 2 GPUs"):
        placed(2, prefill={}, decode={"engine": {"device": "cuda:2"}})
    with pytest.raises(ConfigError, match=r"prefill\.engine\.device: 'cuda' was asked for, .* has 0 GPUs"):
        placed(0, prefill={}, decode={})


def test_workers_on_cpus_are_left_alone() -> None:
    config = ClusterConfig()
    topology = plan_topology(config, 4)
    assert place_on_gpus(topology, config, 0, has_daemon=False) is topology


def test_visible_gpus_are_counted() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,5"}) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


_FAKE_CONTROL = """#!{python} -I
import os, socket, sys, time
path = os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control"
command = sys.argv[1] if sys.argv[1:] else sys.stdin.read().strip()
with open("{calls}", "a") as calls:
    print(command, os.environ.get("{shown}", ""), sep="|", file=calls)
if {exit_code}:
    print("trouble", file=sys.stderr)
    sys.exit({exit_code})
if {is_deaf}:
    time.sleep(60)
with socket.socket(socket.AF_UNIX) as control:
    if command == "quit":
        control.connect(path)
        control.sendall(b"quit")
        sys.exit()
    control.bind(path)
    control.listen()
    while control.accept()[0].recv(8) != b"quit":
        pass
time.sleep({lingers_s})
"""


def fake_control(
    tmp_path: Path, exit_code: int, shown: str = PIPE_VARIABLE, *, is_deaf: bool = False, lingers_s: float = 0.0
) -> None:
    """Notes what it was asked and the variable `shown`, and listens until it is told to quit. `is_deaf`: it never
    listens. `lingers_s`: from the moment it no longer listens to its end."""
    tool = tmp_path / mps.CONTROL
    words = {"python": sys.executable, "calls": tmp_path / "calls", "shown": shown}
    tool.write_text(_FAKE_CONTROL.format(**words, exit_code=exit_code, is_deaf=is_deaf, lingers_s=lingers_s))
    tool.chmod(0o755)


def without_a_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs none, and the fake control is found first."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPE_VARIABLE, raising=False)


def test_the_daemon_lives_as_long_as_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_control(tmp_path, 0)
    without_a_daemon(tmp_path, monkeypatch)
    with mps.mps_daemon(True, tmp_path) as warning:
        assert warning is None
        assert os.environ[PIPE_VARIABLE] == str(tmp_path / "mps")
        assert (tmp_path / "mps").stat().st_mode & 0o777 == 0o700
    assert PIPE_VARIABLE not in os.environ
    assert (tmp_path / "calls").read_text().splitlines() == [f"-f|{tmp_path}/mps", f"quit|{tmp_path}/mps"]


def test_the_daemon_sees_every_gpu_so_that_workers_choose_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would renumber what it is shown: a worker told "1" found no device (seen on a machine with two GPUs)."""
    fake_control(tmp_path, 0, shown="CUDA_VISIBLE_DEVICES")
    without_a_daemon(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with mps.mps_daemon(True, tmp_path):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert (tmp_path / "calls").read_text().splitlines() == ["-f|", "quit|"]


def test_a_slice_of_a_gpu_is_named_to_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_control(tmp_path, 0, shown="CUDA_VISIBLE_DEVICES")
    without_a_daemon(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-41b3")
    with mps.mps_daemon(True, tmp_path):
        pass
    assert (tmp_path / "calls").read_text().splitlines() == ["-f|MIG-41b3", "quit|MIG-41b3"]


def test_without_mps_the_warning_names_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PIPE_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with mps.mps_daemon(True, tmp_path) as warning:
        assert warning is not None
        assert "not installed" in warning
        assert "more than twice as long" in warning
    fake_control(tmp_path, 3)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with mps.mps_daemon(True, tmp_path) as warning:
        assert warning is not None
        assert "did not start (trouble)" in warning
    assert PIPE_VARIABLE not in os.environ
    assert (tmp_path / "calls").read_text().splitlines() == [f"-f|{tmp_path}/mps"]


def test_a_daemon_that_never_listens_is_given_up_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_control(tmp_path, 0, is_deaf=True)
    without_a_daemon(tmp_path, monkeypatch)
    monkeypatch.setattr(mps, "_TIMEOUT_S", 1.0)
    with mps.mps_daemon(True, tmp_path) as warning:
        assert warning is not None
        assert "does not listen" in warning
    assert PIPE_VARIABLE not in os.environ
    assert not running(str(tmp_path))


def test_a_daemon_that_does_not_quit_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_control(tmp_path, 0)
    without_a_daemon(tmp_path, monkeypatch)
    with mps.mps_daemon(True, tmp_path):
        fake_control(tmp_path, 4)
    assert "did not end and is killed: trouble" in caplog.text
    assert not running(str(tmp_path))


@pytest.mark.parametrize("lingers_s", [0.0, 0.5])
def test_a_daemon_that_ends_before_the_launch_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lingers_s: float
) -> None:
    """Also one that still ends while it is asked: a dying process closes its sockets before it can be waited for."""
    monkeypatch.setattr(mps, "_ENDING_S", 20.0)
    fake_control(tmp_path, 0, lingers_s=lingers_s)
    without_a_daemon(tmp_path, monkeypatch)
    with mps.mps_daemon(True, tmp_path):
        subprocess.run([str(tmp_path / mps.CONTROL)], input=b"quit", check=True)
        deadline_s = time.monotonic() + 20.0
        while has_mps():
            assert time.monotonic() < deadline_s, "the daemon still listens"
            time.sleep(0.01)
    assert "ended before the launch (exit code 0)" in caplog.text
    assert "killed" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_the_daemon_does_not_outlive_a_launch_that_is_killed(tmp_path: Path) -> None:
    fake_control(tmp_path, 0)
    code = (
        "import pathlib, sys, time\nfrom cluster.launch import mps\n"
        "with mps.mps_daemon(True, pathlib.Path(sys.argv[1])) as warning:\n"
        "    print(warning, flush=True)\n    time.sleep(60)"
    )
    environment = {name: value for name, value in os.environ.items() if name != PIPE_VARIABLE}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launch:
        assert launch.stdout is not None
        assert launch.stdout.readline() == "None\n"
        daemon = str(tmp_path / mps.CONTROL)
        assert running(daemon)
        launch.kill()
    deadline_s = time.monotonic() + 20.0
    while running(daemon) or has_mps({PIPE_VARIABLE: str(tmp_path / "mps")}):
        assert time.monotonic() < deadline_s, "the daemon is still there"
        time.sleep(0.05)


def running(word: str) -> list[str]:
    """Commands of living processes that name it, this one's not counted."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in words and int(entry.name) != os.getpid():
                found.append(words)
    return found


def test_a_daemon_of_the_operator_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_control(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv(PIPE_VARIABLE, "/tmp/theirs")
    with mps.mps_daemon(True, tmp_path) as warning:
        assert warning is None
    assert not (tmp_path / "calls").exists()
    with mps.mps_daemon(False, tmp_path) as warning:
        assert warning is None
    monkeypatch.delenv(PIPE_VARIABLE)
    (tmp_path / "control").touch()
    with mps.mps_daemon(True, tmp_path, default_pipe=tmp_path / "control") as warning:
        assert warning is None, "one that listens where CUDA looks by itself"
        assert PIPE_VARIABLE not in os.environ
    assert not (tmp_path / "calls").exists()


def test_a_daemon_of_the_operator_that_is_gone_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_control(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(theirs / "control"))
    monkeypatch.setenv(PIPE_VARIABLE, str(theirs))
    with mps.mps_daemon(True, tmp_path) as warning:
        assert warning is None
        assert os.environ[PIPE_VARIABLE] == str(tmp_path / "mps")
    assert os.environ[PIPE_VARIABLE] == str(theirs)
