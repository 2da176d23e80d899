"""The runner of all GPU benchmarks: order on a GPU, time limits, what is said of commands that fail."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import everything
from benchmarks.gpu.everything import Chain, Command, Run, timed_chains, together, work_off


def shell(name: str, script: str, limit_s: float = 20.0) -> Command:
    return Command(name, ("/bin/sh", "-c", script), limit_s)


def test_a_chain_runs_in_order_on_its_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, time.monotonic() + 60)
    chain = Chain("a", tuple(shell(str(i), f"echo {i} $CUDA_VISIBLE_DEVICES >> {tmp_path}/order") for i in range(3)))
    work_off(run, "1", deque([chain]))
    assert (tmp_path / "order").read_text().split() == ["0", "1", "1", "1", "2", "1"]
    assert not run.notes
    assert re.search(r"\b0 in \d+ s", capsys.readouterr().out)


def test_what_fails_or_is_cut_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "END_S", 0.2)
    run = Run(tmp_path, time.monotonic() + 60)
    together(run, [shell("bad", "echo why; exit 3"), shell("slow", "echo begun; sleep 60", 5.0)], ["0"])
    bad, slow = sorted(run.notes)
    assert re.fullmatch(r"FAILED bad in \d+ s: exit code 3; why", bad)
    assert slow.startswith("FAILED slow in ")
    assert slow.endswith("cut off; begun")


def test_an_interrupted_command_may_end_by_itself(tmp_path: Path) -> None:
    """Benchmarks record what they have by then."""
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('recorded')"
    run = Run(tmp_path, time.monotonic() + 60)
    run.execute(Command("split", (sys.executable, "-c", script), 5.0), "0")
    assert (tmp_path / "split.log").read_text().strip() == "recorded"


def test_nothing_is_begun_after_the_deadline(tmp_path: Path) -> None:
    run = Run(tmp_path, time.monotonic() + 1.0)
    assert not run.execute(shell("late", "echo no"), "0")
    assert run.notes == ["NOT RUN late: the time is over"]


def test_a_peer_comes_before_what_is_compared_with_it(tmp_path: Path) -> None:
    chains = timed_chains(tmp_path, "peer --out {out}", None)
    assert [command.name for command in chains[0].commands] == ["peer", "engine", "engine-defaults"]
    assert str(tmp_path / "peer.jsonl") in chains[0].commands[0].words
    assert str(tmp_path / "peer.jsonl") in chains[0].commands[1].words
    assert str(tmp_path / "records") in chains[0].commands[2].words  # where the engine's are by then
    assert [command.name for command in chains[1].commands] == ["engine-fp8"]
