"""What the launcher and its actors tell each other, as JSON in the bytes of a call or of its answer.

Ray pickles what it carries; bytes have nothing in them that unpickling could run, and both ends check them.
"""

from __future__ import annotations

import msgspec

from cluster.process_events import ProcessEvent


class Place(msgspec.Struct, frozen=True):
    """Where an actor runs."""

    node_id: str
    host: str  # the node's address, as Ray knows it
    directory: str  # private to the actor; for the files of its process
    version: str  # of Tandem there


class Order(msgspec.Struct, frozen=True):
    """One process to be started: `python -m <command>`."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    files: dict[str, bytes]  # name to content, written to the private directory before


class Started(msgspec.Struct, frozen=True, tag="started"):
    pid: int


class NotStarted(msgspec.Struct, frozen=True, tag="not_started"):
    why: str


class Said(msgspec.Struct, frozen=True, tag="said"):
    event: ProcessEvent


class Logged(msgspec.Struct, frozen=True, tag="logged"):
    line: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    exit_code: int
    how: str
    last_words: tuple[str, ...]


News = Said | Logged | Ended


class Batch(msgspec.Struct, frozen=True):
    """News in their order. To ask for more is to acknowledge those before `next_number`."""

    news: tuple[News, ...]
    next_number: int


encode = msgspec.json.encode
place_decoder: msgspec.json.Decoder[Place] = msgspec.json.Decoder(Place)
order_decoder: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
start_decoder: msgspec.json.Decoder[Started | NotStarted] = msgspec.json.Decoder(Started | NotStarted)
batch_decoder: msgspec.json.Decoder[Batch] = msgspec.json.Decoder(Batch)
