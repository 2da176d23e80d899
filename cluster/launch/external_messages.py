"""What the ranks of one job say to each other: JSON lines between each rank and rank 0.

    rank 0                                      rank n
    Greeting  who am I, prove yourself    ->
                                          <-    Hello    (or Unable: a rank that cannot start says why)
    Welcome                               ->                                     (or Refused)
    Assigned  your group, devices, key    ->    when all have come
                                          <-    Listening    its port
                                          <-    State    ready, restarting
    Trouble   the job is ending, and why  ->    <-    Failed, StopWanted
              (Refused, if the router has not started)
    Stop      the router has drained      ->
                                          <-    Done

Both send a Beat every second; a peer that is silent for ten is gone.
"""

from __future__ import annotations

import msgspec

from cluster.config import ClusterConfig
from cluster.launch.topology import WorkerGroup

MAX_LINE_BYTES = 256 << 10


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    version: str
    job: str
    nonce: str


class Hello(msgspec.Struct, frozen=True, tag="hello", kw_only=True):
    rank: int
    world_size: int
    host: str  # its name, for people
    config: ClusterConfig
    cpus: tuple[int, ...]  # that it may use
    num_cores: int  # fewer than `cpus` if a control group has a quota
    num_gpus: int
    advertised_host: str
    nonce: str
    proof: str  # that it knows the cluster key; empty without a key file


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    rank: int
    host: str
    why: str


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    host: str  # rank 0's name
    proof: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """`is_told`: rank 0 has said why to the user."""

    why: str
    is_told: bool


class Assigned(msgspec.Struct, frozen=True, tag="assigned", kw_only=True):
    """`port` of the group 0: choose one. The key: a file of rank 0 on the same host, or the key itself, or
    neither if the configuration names a file."""

    group: WorkerGroup
    reachable_host: str
    key_file: str = ""
    key: str = ""


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    port: int


class State(msgspec.Struct, frozen=True, tag="state"):
    state: str  # ready, restarting
    pid: int


class StopWanted(msgspec.Struct, frozen=True, tag="stop_wanted"):
    why: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    why: str


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    why: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    pass


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    pass


Message = (
    Greeting
    | Hello
    | Unable
    | Welcome
    | Refused
    | Assigned
    | Listening
    | State
    | StopWanted
    | Failed
    | Trouble
    | Stop
    | Done
    | Beat
)

decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def first_line(why: str) -> str:
    """Of what went wrong: a process's last words may follow it."""
    return why.partition("\n")[0]
