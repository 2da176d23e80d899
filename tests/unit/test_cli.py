"""The command line: help that teaches, errors that are messages, and a quick start."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main

COMMANDS = ("launch", "plan", "doctor", "verify", "version")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cluster", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        main()
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert command == "version" or f"cluster {command}" in shown.replace("Usage: cluster", ""), "help has no example"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "demo"], ["version"], ["verify", "--help"], ["launch", "--help"]]
)
def test_light_commands_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from cluster.cli import main\n"
        f"sys.argv = ['cluster', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'nixl', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_shows_the_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", "demo", "--prefill", "2", "--set", "decode.port=7100") == 0
    shown = capsys.readouterr().out
    assert "prefill-1" in shown
    assert "127.0.0.1:7100" in shown


def test_plan_reads_a_file_and_flags_win(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("decode: {replicas: 3}\nprefill: {replicas: 3}\n")
    assert run(monkeypatch, "plan", str(path), "--decode", "1") == 0
    assert "3 prefill workers, 1 decode worker" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "launch"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--set", "router.prot=1"], "router.prot: unknown key; did you mean router.port?"),
        (["demo", "--set", "router.port"], "expected KEY=VALUE"),
        (["demo", "--prefill", "0"], "prefill.replicas: must be between 1 and 64, got 0"),
        (["demo", "--decode", "-1"], "decode.replicas: must be between 1 and 64, got -1"),
        (["demo", "--decode", "1000000"], "got 1,000,000"),
        (["demo", "--monolithic", "--decode", "2"], "do not fit `monolithic: true`"),
        (["demo", "--set", "connector.transport=loopback"], "loopback works inside one process only"),
        (["missing.yaml"], "cannot read the config file missing.yaml"),
    ],
)
def test_a_wrong_configuration_is_a_message_and_exit_code_2(
    command: str,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, command, *arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_environment_settings_reach_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_PREFILL__REPLICAS", "4")
    assert run(monkeypatch, "plan", "demo") == 0
    assert "4 prefill workers" in capsys.readouterr().out


def test_a_taken_port_is_an_error_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(monkeypatch, "launch", "no/such-model", "--port", str(port)) == 1
    assert f"router.port: port {port} on 127.0.0.1 is already taken" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "launch", "./nowhere.gguf", "--port", "0") == 1
    assert "model error: no model './nowhere.gguf'" in capsys.readouterr().err


def test_variables_of_an_allocation_start_nothing_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch script of Slurm, and one variable of a training container."""
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NODELIST": "n[1-2]", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, "launch", "./nowhere.gguf", "--port", "0") == 1
    assert "model error: no model './nowhere.gguf'" in capsys.readouterr().err


def test_an_outer_launcher_that_is_named_must_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "launch", "demo", "--external", "slurm") == 2
    assert "--external slurm: SLURM_PROCID is not set" in capsys.readouterr().err
    assert run(monkeypatch, "launch", "demo", "--external", "pbs") == 2
    assert "launch.external" in capsys.readouterr().err


def test_plan_shows_the_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", "demo", "--prefill", "2") == 0
    assert "4 ranks (rank 0 router, ranks 1-2 prefill, rank 3 decode)" in capsys.readouterr().out


def test_a_cache_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "file" / "cache"))
    assert run(monkeypatch, "launch", "demo", "--port", "0") == 1
    error = capsys.readouterr().err
    assert "set TANDEM_CACHE" in error


@pytest.mark.parametrize("option", ["--prompts", "--max-tokens"])
def test_a_recording_has_its_own_prompts(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "verify", "http://127.0.0.1:1", "--against", "today.json", option, "5") != 0
    shown = capsys.readouterr()
    assert f"{option}: the prompts and the lengths of answers are those of today.json" in shown.out + shown.err
