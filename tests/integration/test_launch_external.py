"""Ranks of outer launchers as processes, each with a fake part: how they start, drain, fail, and what they say."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.outer_launchers import FAKES, FOREIGN_NAMES, FOREIGN_PREFIXES, Job, is_available, running_job
from benchmarks.processes import wait_gone
from tests.integration.fake_rank import ECHO_VARIABLE, SILENCE_VARIABLE, TELL_VARIABLE, VARIABLE

START_S, END_S = 60.0, 60.0
MODULE = "tests.integration.fake_rank"
ARGUMENTS = ("launch", "demo", "--prefill", "2", "--decode", "1", "--port", "0")
HOST = socket.gethostname()

every_launcher = pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=pytest.mark.skipif(not is_available(name), reason=f"{name} is not installed"))
        for name in ("torchrun", "mpirun", *FAKES)
    ],
)


@contextlib.contextmanager
def job_of(
    directory: Path, launcher: str = "slurm-env", num_ranks: int = 4, settings: Sequence[str] = ()
) -> Iterator[Job]:
    flags = [word for setting in settings for word in ("--set", setting)]
    with running_job(launcher, num_ranks, (*ARGUMENTS, *flags), directory, module=MODULE) as job:
        yield job


def serving(job: Job) -> Job:
    job.wait_for("Serving demo at", START_S)
    return job


def parts_pids(job: Job) -> list[int]:
    return [int(line.rsplit("pid ", 1)[1]) for line in job.lines if "ready at" in line]


def private_directories(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.name != "log"]


@every_launcher
def test_each_rank_takes_its_part_and_the_router_drains_first(launcher: str, tmp_path: Path) -> None:
    with job_of(tmp_path, launcher) as job:
        serving(job)
        pids = job.rank_pids()
        assert sorted(pids) == [0, 1, 2, 3]
        parts = parts_pids(job)
        assert len(parts) == 4
        os.kill(pids[0], signal.SIGTERM)
        assert set(job.wait(END_S)) == {0}, job.log_tail()
        drained = [line.split("|")[0].strip() for line in job.lines if line.endswith("| drained")]
        assert drained[0] == "router"
        assert sorted(drained[1:]) == ["decode-0", "prefill-0", "prefill-1"]
        for rank, name in enumerate(("prefill-0", "prefill-1", "decode-0"), 1):
            assert any(f"{name} | rank {rank} on {HOST}, port " in line for line in job.lines)
        wait_gone(parts, END_S)
        assert private_directories(tmp_path) == [], "a private directory with the cluster key is left"


def test_a_signal_to_all_ranks_at_once_drains_in_order(tmp_path: Path) -> None:
    with job_of(tmp_path) as job:
        serving(job).drain()
        assert job.wait(END_S) == [0, 0, 0, 0], job.log_tail()
        drained = [line for line in job.lines if line.endswith("| drained")]
        assert "router" in drained[0]
        assert len(drained) == 4


def test_a_signal_to_a_worker_rank_drains_the_job(tmp_path: Path) -> None:
    with job_of(tmp_path) as job:
        os.kill(serving(job).rank_pids()[3], signal.SIGUSR1)
        assert job.wait(END_S) == [0, 0, 0, 0], job.log_tail()
        job.wait_for(f"SIGUSR1 at rank 3 (decode-0) on {HOST}: draining, the router first", 0)


@pytest.mark.parametrize(
    ("victim", "name"), [(0, "router"), (2, "prefill-1")], ids=["the router's rank", "a worker's rank"]
)
def test_when_a_rank_is_killed_the_others_end_and_say_which(victim: int, name: str, tmp_path: Path) -> None:
    with job_of(tmp_path) as job:
        parts = parts_pids(serving(job))
        os.kill(job.rank_pids()[victim], signal.SIGKILL)
        exit_codes = job.wait(END_S)
        assert exit_codes.pop(victim) == -signal.SIGKILL
        assert exit_codes == [1, 1, 1], job.log_tail()
        said = [line for line in job.lines if f"rank {victim} ({name}) on {HOST} is gone: its connection" in line]
        assert len(said) == 3, job.log_tail()
        assert sum(line.endswith("| drained") for line in job.lines) == 3
        wait_gone(parts, END_S)


def test_a_rank_that_is_silent_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, not dead: its connection stays open."""
    monkeypatch.setenv(SILENCE_VARIABLE, "8")
    with job_of(tmp_path) as job:
        pids = serving(job).rank_pids()
        os.kill(pids[1], signal.SIGSTOP)
        try:
            job.wait_for(f"rank 1 (prefill-0) on {HOST} is gone: it has been silent for 8 s", START_S)
            for rank in (0, 2, 3):
                assert job.outer[rank].wait(END_S) == 1, job.log_tail()
        finally:
            os.kill(pids[1], signal.SIGCONT)


def test_a_wrong_world_is_told_once_and_every_rank_ends(tmp_path: Path) -> None:
    with job_of(tmp_path, num_ranks=6) as job:
        assert job.wait(END_S) == [2] * 6, job.log_tail()
        [message] = job.lines
        assert message.startswith("configuration: srun started 6 ranks, but this configuration means 4 ranks")


def test_torchrun_shows_why_a_world_is_wrong(tmp_path: Path) -> None:
    with job_of(tmp_path, "torchrun", num_ranks=2) as job:
        assert job.wait(END_S) == [1]
        told = [line for line in job.lines if "torchrun started 2 ranks, but this configuration means 4 ranks" in line]
        assert told[0].startswith("configuration: ")
        assert sum(line.startswith("configuration: ") for line in told) == 1
        assert any("traceback :" in line for line in told), "torchrun's own summary does not say it"


def test_a_taken_port_is_told_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with job_of(tmp_path, settings=[f"router.port={port}"]) as job:
            exit_codes = job.wait(END_S)
            assert all(exit_codes), exit_codes
            told = [line for line in job.lines if f"router.port: port {port} on 127.0.0.1 is already taken" in line]
            assert len(told) == 1, job.log_tail()


def test_a_part_that_cannot_start_ends_the_job_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "prefill-1=fail-at-start")
    with job_of(tmp_path) as job:
        assert job.wait(END_S) == [1, 1, 1, 1], job.log_tail()
        reason = f"rank 2 (prefill-1) on {HOST} has failed: prefill-1 could not start"
        assert sum(reason in line for line in job.lines) == 3
        assert any("model_error: missing tensor" in line for line in job.lines)


def test_a_job_with_a_part_that_is_never_ready_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "decode-0=never-ready")
    with job_of(tmp_path, settings=["launch.start_timeout_s=10"]) as job:
        assert job.wait(END_S) == [1, 1, 1, 1], job.log_tail()
        assert any("decode-0 could not start (not ready after 10 s)" in line for line in job.lines)
        assert not any("Serving" in line for line in job.lines)


def test_a_router_that_cannot_start_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "router=crash-at-start")
    with job_of(tmp_path) as job:
        assert job.wait(END_S) == [1, 1, 1, 1], job.log_tail()
        assert sum(f"rank 0 (router) on {HOST} has failed: router could not start" in line for line in job.lines) == 3
        assert any("the weights are not here" in line for line in job.lines)


def test_a_part_that_dies_is_started_again_and_the_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path.with_name(f"{tmp_path.name}-died")
    monkeypatch.setenv(VARIABLE, f"decode-0=crash-once:{marker}")
    with job_of(tmp_path) as job:
        serving(job)
        marker.with_suffix(".go").touch()
        job.wait_for("decode-0 | died (killed by SIGKILL), starting it again", START_S)
        deadline = time.monotonic() + START_S
        while sum("decode-0 | ready at" in line for line in job.lines) < 2:
            assert time.monotonic() < deadline, job.log_tail()
            time.sleep(0.05)
        job.drain()
        assert job.wait(END_S) == [0, 0, 0, 0], job.log_tail()


def test_ranks_do_not_outlive_a_launcher_that_was_killed(tmp_path: Path) -> None:
    with job_of(tmp_path, "torchrun") as job:
        parts = parts_pids(serving(job))
        ranks = list(job.rank_pids().values())
        job.outer[0].kill()
        wait_gone([*ranks, *parts], END_S)
        assert any("the death of the process that started this rank" in line for line in job.lines)
        assert private_directories(tmp_path) == []


def test_a_second_signal_does_not_wait_for_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "router=deaf,decode-0=deaf")
    monkeypatch.setenv(ECHO_VARIABLE, "6")
    with job_of(tmp_path, settings=["launch.drain_timeout_s=300"]) as job:
        parts = parts_pids(serving(job))
        job.drain()
        job.wait_for("draining, the router first", START_S)
        time.sleep(0.5)
        job.drain()  # the same stop, told twice
        time.sleep(2.0)
        assert None in [process.poll() for process in job.outer], "an echo of the signal must not kill"
        deadline = time.monotonic() + END_S  # the drain time would be 300 s for each stage
        while None in [process.poll() for process in job.outer]:
            assert time.monotonic() < deadline, job.log_tail()
            job.drain()  # again: where the first signal was heard late, this is still its echo
            time.sleep(1.0)
        wait_gone(parts, END_S)


def test_a_stop_before_all_have_come_ends_the_wait(tmp_path: Path) -> None:
    with job_of(tmp_path) as job:
        os.kill(job.outer[3].pid, signal.SIGKILL)  # before it can have come
        job.wait_for("waiting for the others", START_S)
        job.drain()
        exit_codes = job.wait(END_S)
        assert exit_codes[0] == 1
        assert all(exit_codes), job.log_tail()
        assert any("SIGTERM while rank 0 waited for the other ranks" in line for line in job.lines)


def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    environment = FAKES["slurm-env"](0, 4, secrets.token_hex(4))
    command = [sys.executable, "-m", MODULE, *ARGUMENTS, "--set", "launch.join_timeout_s=1"]
    done = subprocess.run(
        command,
        env={**clean_environment(), **environment, "XDG_RUNTIME_DIR": str(tmp_path), TELL_VARIABLE: "2"},
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert done.returncode == 1
    assert f"after 1 s rank 0 on {HOST} still waits for ranks 1, 2, 3 of 4" in done.stderr


def test_the_process_group_of_the_launcher_is_left_alone(tmp_path: Path) -> None:
    """The ranks stay in the group they were started in, and what else is in it lives on."""
    environment = {**clean_environment(), "XDG_RUNTIME_DIR": str(tmp_path)}
    job = secrets.token_hex(4)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0) as bystander:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", MODULE, *ARGUMENTS],
                env={**environment, **FAKES["slurm-env"](rank, 4, job)},
                stdout=subprocess.PIPE,
                process_group=bystander.pid,
                text=True,
            )
            for rank in range(4)
        ]
        try:
            assert ranks[0].stdout is not None
            assert any("Serving demo at" in line for line in ranks[0].stdout)
            assert {os.getpgid(rank.pid) for rank in ranks} == {bystander.pid}
            ranks[0].terminate()
            for rank in ranks:
                rank.communicate(timeout=END_S)
            assert [rank.returncode for rank in ranks] == [0, 0, 0, 0]
            assert bystander.poll() is None
        finally:
            bystander.kill()
            for rank in ranks:
                rank.kill()


def clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN_PREFIXES) and name not in FOREIGN_NAMES
    }


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    salt = secrets.token_hex(3)
    names = (f"tandem-{salt}-a", f"tandem-{salt}-b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)


@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces need root")
def test_ranks_on_two_hosts_find_each_other_and_tell_where_they_are(tmp_path: Path) -> None:
    settings = ["prefill.host=0.0.0.0", "decode.host=0.0.0.0", "security.allow_plaintext_network=true"]
    settings.append("security.send_key_over_network=true")
    flags = [word for setting in settings for word in ("--set", setting)]
    variables = {"LWS_LEADER_ADDRESS": "10.77.0.1", "LWS_GROUP_SIZE": "4"}
    with two_hosts() as names, contextlib.ExitStack() as stack:
        outputs, ranks = [], []
        for rank in range(4):
            directory = tmp_path / str(rank)
            directory.mkdir()
            outputs.append(stack.enter_context((directory / "log").open("wb")))
            environment = {**clean_environment(), **variables, "LWS_WORKER_INDEX": str(rank)}
            ranks.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", names[rank // 2], sys.executable, "-m", MODULE, *ARGUMENTS, *flags],
                    env={**environment, "XDG_RUNTIME_DIR": str(directory)},
                    stdout=outputs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
            stack.callback(ranks[-1].kill)
        job = Job("lws", 4, ranks, tmp_path / "0" / "log")
        job.wait_for("Serving demo at", START_S)
        [config] = (tmp_path / "0").glob("tandem-launch-*/router.json")
        router = json.loads(config.read_bytes())
        hosts = [address.split(":")[0] for address in router["prefill"] + router["decode"]]
        assert hosts == ["10.77.0.1", "10.77.0.2", "10.77.0.2"]
        for rank, host in enumerate(hosts, 1):
            [pid] = parts_pids(Job("lws", 4, ranks, tmp_path / str(rank) / "log"))
            told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert f"TANDEM_ADVERTISED_HOST={host}".encode() in told, "its peers would look on their own host"
        keys = {path.read_bytes() for path in tmp_path.glob("*/tandem-launch-*/cluster.key")}
        assert len(keys) == 1, "the ranks have different keys"
        assert len(list(tmp_path.glob("*/tandem-launch-*/cluster.key"))) == 4
        ranks[0].send_signal(signal.SIGTERM)
        assert job.wait(END_S) == [0, 0, 0, 0], job.log_tail()
