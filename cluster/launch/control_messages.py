"""What is said over the control socket of a launch: one request, any number of `Doing`, one other answer.

One JSON object per line, both ways. The socket lies in the private directory of the launch.
"""

from __future__ import annotations

import msgspec

from cluster.types import Role

SOCKET_NAME = "control.sock"
MAX_LINE_BYTES = 1 << 20


class Status(msgspec.Struct, frozen=True, tag="status"):
    pass


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    worker: str  # "prefill-0"


class Scale(msgspec.Struct, frozen=True, tag="scale"):
    replicas: dict[Role, int]


Command = Status | Drain | Scale


class Doing(msgspec.Struct, frozen=True, tag="doing"):
    """Progress, for people."""

    what: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    what: str
    is_clean: bool = True  # no worker had to be killed: whoever asked is to see it


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    why: str


class WorkerStatus(msgspec.Struct, frozen=True):
    name: str
    role: Role
    address: str
    state: str  # starting, ready, silent (it was ready, and does not answer), draining, restarting
    pid: int = 0
    engine_id: str = ""  # empty: it does not answer
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0


class Deployment(msgspec.Struct, frozen=True, tag="deployment"):
    url: str
    model_name: str
    workers: tuple[WorkerStatus, ...]


Answer = Doing | Done | Refused | Deployment

command_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
