"""One connection between a rank and rank 0: messages, heartbeats, and the proof that both know the cluster key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from contextlib import suppress

import msgspec

from cluster.launch.external_messages import Beat, Message, decoder
from cluster.launch.silence import within

BEAT_S = 1.0
SILENCE_S = 10.0  # a peer that says nothing for so long is gone; its host may have died without a word
FAREWELL_S = 2.0  # for the last messages to leave
MAX_UNSENT_BYTES = 4 << 20


class ChannelLost(Exception):
    """The other side is gone, or does not speak this protocol. The text says how, for people."""


class Channel:
    """Owns the connection; `close` it. Read by one task."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def own_address(self) -> str:
        """As the other side reaches it; empty if the connection is already gone."""
        return _address(self._writer.get_extra_info("sockname"))

    @property
    def peer_address(self) -> str:
        return _address(self._writer.get_extra_info("peername"))

    def send(self, message: Message) -> None:
        """Does not wait. What cannot be sent any more is dropped: the reader learns that the peer is gone."""
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._writer.transport.abort()
        if not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(message) + b"\n")

    async def receive(self, silence_s: float = SILENCE_S) -> Message:
        """The next message that is no heartbeat. Raises `ChannelLost`."""
        while True:
            try:
                line = await within(silence_s, self._reader.readline())
                if not line.endswith(b"\n"):
                    raise ChannelLost("its connection ended")
                message = decoder.decode(line)
            except TimeoutError:
                raise ChannelLost(f"it has been silent for {silence_s:g} s") from None
            except OSError as error:
                raise ChannelLost(f"its connection broke: {error.strerror or error}") from error
            except ValueError as error:  # a line that is too long, no JSON, or another shape
                raise ChannelLost(f"it speaks another language: {error}") from error
            if not isinstance(message, Beat):
                return _printable(message)

    async def beat(self) -> None:
        """Until cancelled."""
        while True:
            self.send(Beat())
            await asyncio.sleep(BEAT_S)

    async def close(self) -> None:
        """Bounded; what was sent before leaves first."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._writer.drain()
                self._writer.close()
                await self._writer.wait_closed()
        self._writer.transport.abort()


def prove(key: bytes | None, speaker: str, rank: int, nonces: tuple[str, str]) -> str:
    """HMAC-SHA256 of both sides' nonces; empty without a key. `speaker`: no side can hand back the other's proof."""
    if key is None:
        return ""
    text = "\0".join(("tandem rendezvous", speaker, str(rank), *nonces))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def is_proven(key: bytes | None, proof: str, speaker: str, rank: int, nonces: tuple[str, str]) -> bool:
    return hmac.compare_digest(proof.encode(), prove(key, speaker, rank, nonces).encode())


def _printable(message: Message) -> Message:
    """Texts that people are shown: a peer must not be able to write control sequences to their terminals."""
    texts = {name: getattr(message, name) for name in ("why", "host") if name in message.__struct_fields__}
    if all(_is_printable(text) for text in texts.values()):
        return message
    cleaned = {name: "".join(c if _is_printable(c) else "�" for c in text) for name, text in texts.items()}
    return msgspec.structs.replace(message, **cleaned)


def _is_printable(text: str) -> bool:
    return text.replace("\n", "").isprintable()


def _address(name: object) -> str:
    return str(name[0]) if isinstance(name, tuple) else ""
