"""What a router has still to send over a session, as frames."""

from __future__ import annotations

import asyncio

from cluster.rpc import convert, limits
from cluster.rpc.pb.serving.v1 import worker_pb2 as pb
from cluster.types import Request

_Key = tuple[str, int]


class Outbox:
    """What waits to be written; merged into one frame while the stream is busy."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self._submits: dict[_Key, pb.Submit] = {}
        self._cancels: list[pb.RequestRef] = []
        self._releases: list[pb.RequestRef] = []

    def submit(self, request: Request, kv: bytes | None) -> None:
        message = pb.Submit(request=convert.request_to_pb(request), kv=kv)
        self._submits[request.request_id, request.attempt] = message
        self.wake.set()

    def cancel(self, key: _Key, *, is_served: bool) -> None:
        if self._submits.pop(key, None) is None:  # else it never left this process
            self._cancels.append(_ref(key, is_served=is_served))
            self.wake.set()

    def release(self, key: _Key) -> None:
        self._releases.append(_ref(key))
        self.wake.set()

    @property
    def has_submits(self) -> bool:
        return bool(self._submits)

    def clear(self) -> None:
        self._submits.clear()
        self._cancels.clear()
        self._releases.clear()

    async def next_frame(self) -> pb.RouterFrame:
        """Wait for news or a heartbeat. A frame holds at most MAX_FRAME_ENTRIES tokens (or one request)."""
        await self.wake.wait()
        self.wake.clear()
        frame = pb.RouterFrame(cancels=self._cancels, releases=self._releases)
        self._cancels.clear()
        self._releases.clear()
        entries = 0
        while self._submits and entries < limits.MAX_FRAME_ENTRIES:
            key = next(iter(self._submits))
            entries += len(self._submits[key].request.token_ids)
            if not frame.submits or entries <= limits.MAX_FRAME_ENTRIES:
                frame.submits.append(self._submits.pop(key))
        if self._submits:
            self.wake.set()
        return frame


def _ref(key: _Key, *, is_served: bool = False) -> pb.RequestRef:
    return pb.RequestRef(request_id=key[0], attempt=key[1], served=is_served)
