"""`python -m tests.integration.fake_rank launch ...` is `cluster launch`, save that each part is a small fake process.

FAKE_BEHAVIOURS="decode-0=deaf,router=serve" says what the parts do (see `fake_process`); they `serve` otherwise.
FAKE_SILENCE_S: after which silence a peer is gone. FAKE_ECHO_S: for how long a second signal is the first one's echo.
FAKE_TELL_S: for how long rank 0 waits for ranks that have not come, to tell them that the launch has failed.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import stop
from cluster.cli import main
from cluster.launch import external_follower, external_leader
from cluster.launch.external_channel import Channel
from cluster.launch.process import ProcessSpec
from cluster.launch.specs import router_spec, worker_spec

VARIABLE = "FAKE_BEHAVIOURS"
SILENCE_VARIABLE = "FAKE_SILENCE_S"
ECHO_VARIABLE = "FAKE_ECHO_S"
TELL_VARIABLE = "FAKE_TELL_S"
REPOSITORY = Path(__file__).parents[2]


def faked(spec: ProcessSpec) -> ProcessSpec:
    """The real one has written its config file."""
    behaviours = dict(entry.split("=", 1) for entry in os.environ.get(VARIABLE, "").split(",") if entry)
    behaviour = behaviours.get(spec.name, "serve")
    command = ("tests.integration.fake_process", *behaviour.split(":", 1))
    return replace(spec, command=command, environment={**spec.environment, "PYTHONPATH": str(REPOSITORY)})


async def healthy(url: str) -> None:
    """The fake router answers nothing."""


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_leader, "router_spec", lambda *given: faked(router_spec(*given)))
        patch.setattr(external_follower, "worker_spec", lambda *given: faked(worker_spec(*given)))
        patch.setattr(external_leader, "answers_health", healthy)
        if silence_s := os.environ.get(SILENCE_VARIABLE):
            patch.setattr(Channel.receive, "__defaults__", (float(silence_s),))
        if echo_s := os.environ.get(ECHO_VARIABLE):
            patch.setattr(stop, "ECHO_S", float(echo_s))
        if tell_s := os.environ.get(TELL_VARIABLE):
            patch.setattr(external_leader, "TELL_S", float(tell_s))
        main()
