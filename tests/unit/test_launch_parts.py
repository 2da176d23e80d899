"""The launcher's parts that need no processes: ports, private files, what is shown."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import msgspec
import pytest
from rich.console import Console

from cluster.errors import ConfigError, StartupError
from cluster.launch.ports import check_port_free, choose_free_port
from cluster.launch.run_directory import cluster_key_file, launches, run_directory, write_config
from cluster.launch.stop_signals import STOP_SIGNALS, heard
from cluster.launch.view import LiveView, PlainView, Serving, launch_view
from cluster.process_events import Failed, Progress, Ready, emit, emit_failure, parse


class Settings(msgspec.Struct):
    port: int


SERVING = Serving(url="http://127.0.0.1:8000", model_name="it's", summary="1 prefill worker, 1 decode worker")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_chosen_port_can_be_listened_on_at_once(host: str) -> None:
    ports = [choose_free_port(host) for _ in range(5)]
    assert len(set(ports)) == 5
    for port in ports:
        check_port_free(host, port, "router.port")


def test_grpc_can_listen_on_a_chosen_port() -> None:
    """It rests in TIME_WAIT; a server without SO_REUSEADDR would be refused."""
    server = grpc.server(None, options=[("grpc.so_reuseport", 0)])  # type: ignore[arg-type]
    port = choose_free_port("127.0.0.1")
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    server.stop(None)


def test_a_taken_port_and_a_foreign_address_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartupError, match=rf"decode\.port: port {port} on 127\.0\.0\.1 is already taken; stop"):
            check_port_free("127.0.0.1", port, "decode.port")
    with pytest.raises(StartupError, match=r"opened on 203\.0\.113\.7 \(Cannot assign requested address\): is it"):
        choose_free_port("203.0.113.7")


def test_the_run_directory_is_private_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with run_directory() as directory:
        assert directory.stat().st_mode & 0o777 == 0o700
        key = cluster_key_file(directory, None)
        config = write_config(directory, "router", Settings(port=1))
        assert {key.stat().st_mode & 0o777, config.stat().st_mode & 0o777} == {0o600}
        assert len(key.read_bytes()) == 64
        assert json.loads(config.read_text()) == {"port": 1}
    assert list(tmp_path.iterdir()) == []


def test_each_launch_has_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with run_directory() as one, run_directory() as two:
        assert cluster_key_file(one, None).read_bytes() != cluster_key_file(two, None).read_bytes()


def test_what_a_killed_launcher_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    hour_ago = time.time() - 3600
    beginning, foreign = tmp_path / "tandem-launch-7-ab12", tmp_path / "tandem-launch-notes"
    abandoned = [  # the process id is somebody's again: of this process, of one that may not be asked about
        tmp_path / f"tandem-launch-{os.getpid()}-ab12",
        tmp_path / "tandem-launch-1-ab12",
    ]
    with run_directory() as living:
        for directory in (*abandoned, beginning, foreign):
            directory.mkdir()
        (abandoned[0] / "lock").touch()
        for directory in (*abandoned, foreign, living):
            os.utime(directory, (hour_ago, hour_ago))
        assert launches() == [(os.getpid(), living)]
        with run_directory() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([beginning, foreign, living, mine])
            assert sorted(launches()) == sorted([(os.getpid(), living), (os.getpid(), mine)])


def test_launches_that_begin_together_clean_up_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a job that was killed, and begins again: what one has listed another has removed."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    abandoned = [tmp_path / f"tandem-launch-{index}-ab12" for index in range(1, 4)]
    for directory in abandoned:
        directory.mkdir()
        os.utime(directory, (1, 1))
    plain = Path.is_symlink

    def removed_by_another(self: Path) -> bool:
        result = plain(self)
        if self in abandoned:
            self.rmdir()
        return result

    monkeypatch.setattr(Path, "is_symlink", removed_by_another)
    with run_directory() as directory:
        assert list(tmp_path.iterdir()) == [directory]


def test_signals_that_were_ignored_before_stay_ignored() -> None:
    """`nohup`: a lost terminal ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert heard(STOP_SIGNALS) == (signal.SIGINT, signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert heard(STOP_SIGNALS) == STOP_SIGNALS
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launch_that_was_killed_holds_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    code = "import time\nfrom cluster.launch.run_directory import run_directory\nwith run_directory() as d:\n"
    code += "    print(d, flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as launch:
        assert launch.stdout is not None
        directory = Path(launch.stdout.readline().strip())
        assert launches() == [(launch.pid, directory)]
        launch.kill()
    assert directory.exists()
    assert launches() == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(StartupError, match=r"cannot create a private directory in .*missing"), run_directory():
        pass


def test_a_runtime_directory_of_another_host_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun hands the variable on to hosts that have no such directory."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with run_directory() as directory:
        assert directory.parent == tmp_path


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (b"k" * 64, 0o644, "others can read"),
        (b"short\n", 0o600, "holds 5 bytes, at least 32 are needed"),
        (None, 0o600, "No such file"),
    ],
)
def test_a_key_file_of_the_user_is_checked(tmp_path: Path, content: bytes | None, mode: int, expected: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        cluster_key_file(tmp_path, str(path))
    assert expected in caught.value.message
    assert "kkkk" not in caught.value.message


@pytest.mark.parametrize(("mode", "is_good"), [(0o440, True), (0o444, False), (0o460, False)])
def test_a_key_file_of_another_user_may_be_read_through_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, is_good: bool
) -> None:
    """As Kubernetes mounts a secret: it is root's, and the process's by group."""
    path = tmp_path / "key"
    path.write_bytes(b"k" * 64)
    path.chmod(mode)
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    if is_good:
        assert cluster_key_file(tmp_path, str(path)) == path
    else:
        with pytest.raises(ConfigError, match="others can read"):
            cluster_key_file(tmp_path, str(path))


def test_a_good_key_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"k" * 64)
    path.chmod(0o600)
    assert cluster_key_file(tmp_path, str(path)) == path


@pytest.mark.parametrize("event", [Progress("loading", 1, 2), Ready("127.0.0.1:1", "x"), Failed("model_error", "a\nb")])
def test_an_event_survives_its_line(event: Progress | Ready | Failed) -> None:
    out = io.StringIO()
    emit(event, out)
    assert out.getvalue().count("\n") == 1
    assert parse(out.getvalue()) == event


@pytest.mark.parametrize(
    "line", ["", "hello", "{", "[1]", '{"event":"dance"}', '{"event":"ready"}', '{"event":"ready","address":1}']
)
def test_other_lines_are_no_events(line: str) -> None:
    assert parse(line) is None


def test_a_failure_names_the_class_of_the_error() -> None:
    out = io.StringIO()
    emit_failure(StartupError("port taken"), out)
    assert parse(out.getvalue()) == Failed("startup_error", "port taken")


def test_the_curl_line_is_one_shell_command_with_valid_json() -> None:
    words = shlex.split(SERVING.curl)
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's"


def test_plain_lines_tell_everything_but_not_every_step() -> None:
    out, now = io.StringIO(), [0.0]
    view = PlainView(SERVING, out, clock=lambda: now[0])
    view.on_start("decode-0")
    for done in range(101):
        now[0] = done / 40  # 2.5 s
        view.on_event("decode-0", Progress("loading", done * 1_000_000, 100_000_000))
    view.on_event("decode-0", Progress("admitting kernels"))
    view.on_event("decode-0", Ready("127.0.0.1:7", "4 blocks"))
    view.on_log("decode-0", "a word")
    view.on_death("decode-0", "killed by SIGKILL", ["last", "words"], 2.0)
    view.on_death("decode-0", "killed by SIGKILL", [], 4.0)
    view.on_serving()
    lines = out.getvalue().splitlines()
    assert [line for line in lines if "loading" in line] == [
        "  decode-0 | loading 0%",
        "  decode-0 | loading 80%",
    ]
    for text in (
        "admitting kernels",
        "ready at 127.0.0.1:7 4 blocks",
        "a word",
        "again in 2 s",
        "    words",
        "again in 4 s. It said nothing.",
        "Try: curl",
    ):
        assert any(text in line for line in lines), text


def test_the_live_table_shows_each_process_and_markup_is_text() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view = LiveView(SERVING, ["router", "decode-0"], console)
    view.on_start("router")
    view.on_event("router", Progress("loading [bold]", 1, 4))
    view.on_log("decode-0", "[red]not markup[/]")
    console.print(view._table())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "1/4" in shown
    assert "loading [bold]" in shown
    assert "[red]not markup[/]" in shown


def test_the_view_fits_where_the_output_goes() -> None:
    with launch_view(SERVING, ["router"], Console(file=io.StringIO())) as view:
        assert isinstance(view, PlainView)
    with launch_view(SERVING, ["router"], Console(file=io.StringIO(), force_terminal=True)) as view:
        assert isinstance(view, LiveView)
