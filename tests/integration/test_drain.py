"""Workers of a running launch are drained and replaced under load, seen through two routers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.deployment import Deployment, deployment
from benchmarks.drain import SETTINGS, prove
from cluster.launch.control_messages import Answer, Command, Drain, Refused, Scale
from cluster.launch.control_socket import ask, find_launch
from cluster.process_events import Ready, parse
from cluster.types import Role

NUM_STREAMS = 12

pytestmark = pytest.mark.timeout(400)


def tell(running: Deployment, command: Command) -> Answer:
    return ask(find_launch(running.launcher.pid), command, lambda what: None)


@contextmanager
def second_router(running: Deployment) -> Iterator[str]:
    """The same configuration on a port of its own."""
    config = json.loads((find_launch(running.launcher.pid) / "router.json").read_bytes())
    path = running.log.with_name("second-router.json")
    path.write_text(json.dumps({**config, "port": 0}))
    command = [sys.executable, "-m", "cluster.router", "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as router:
        assert router.stdout is not None
        ready = next(event for line in router.stdout if isinstance(event := parse(line), Ready))
        yield f"http://{ready.address}"
        router.terminate()
        assert router.wait(60) == 0


def answer_of(url: str) -> object:
    body = {"model": "demo", "prompt": "One, two,", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_drain_and_replace_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with deployment("demo", SETTINGS) as running, second_router(running) as other_url:
        expected = answer_of(running.url)
        assert answer_of(other_url) == expected
        outcome = asyncio.run(prove(running, NUM_STREAMS))
        assert (outcome.lost, outcome.wrong, outcome.leaked_blocks) == (0, 0, 0)
        assert outcome.replaced == 4
        assert outcome.drained_under_load >= 1
        assert answer_of(running.url) == expected
        assert answer_of(other_url) == expected, "the second router has not followed the workers"

        assert isinstance(tell(running, Drain("prefill-7")), Refused)
        assert isinstance(tell(running, Scale({Role.DECODE: 0})), Refused)
        assert not isinstance(tell(running, Scale({Role.PREFILL: 1, Role.DECODE: 1})), Refused)
        refusal = tell(running, Drain("decode-0"))
        assert isinstance(refusal, Refused)
        assert "only" in refusal.why
        assert answer_of(other_url) == expected
