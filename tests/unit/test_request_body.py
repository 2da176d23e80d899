"""Reading the body of a request: what is said of one that is too large, or does not come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.errors import BodyTooLarge, InvalidRequest
from cluster.router.asgi import read_body


async def read(pieces: list[bytes], declared: int | None = None) -> bytes:
    """Of a client that sends these pieces and then stays away; at most 10 bytes are accepted."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    return await read_body({"headers": headers}, receive, max_bytes=10, timeout_s=0.1)


@pytest.mark.parametrize(("pieces", "declared"), [([b"123456", b"789012"], None), ([b"1"], 12), ([], 12)])
async def test_of_a_body_that_is_too_large_and_stops_coming_the_size_is_told(
    pieces: list[bytes], declared: int | None
) -> None:
    with pytest.raises(BodyTooLarge, match="has at least 12 bytes, at most 10 are accepted"):
        await read(pieces, declared)


@pytest.mark.parametrize(("pieces", "declared"), [([b"123456"], None), ([b"1"], 10), ([], None)])
async def test_a_body_that_stops_coming_is_told(pieces: list[bytes], declared: int | None) -> None:
    with pytest.raises(InvalidRequest, match=r"did not arrive within 0\.1 s") as told:
        await read(pieces, declared)
    assert told.value.http_status == 400
