"""The edge of HTTP: what clients send that is not one request after the other, in raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
from typing import Any

import pytest

from cluster.router import connection
from cluster.router.connection import MAX_HEAD_BYTES
from cluster.types import Role
from tests.fakes import FakeWorker
from tests.integration.router_harness import RunningRouter, http_client, running_router
from tests.waiting import until

TEXT = "/v1/completions"
LONG_S = 14.0  # less than the router's own limits, where a test sets none
WAIT_S = 60.0


def request_of(num_tokens: int, *headers: str, stream: bool = False) -> bytes:
    body = json.dumps({"prompt": [1, 2, 3], "seed": 11, "max_tokens": num_tokens, "stream": stream}).encode()
    head = [f"POST {TEXT} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


class Client:
    """A connection of which every byte is seen."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @staticmethod
    async def of(router: RunningRouter) -> Client:
        host, port = router.url.removeprefix("http://").split(":")
        return Client(*await asyncio.open_connection(host, int(port)))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read_answer(self) -> tuple[int, bytes]:
        """Status and body of one that has a length."""
        async with asyncio.timeout(WAIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            [length] = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
            return int(head.split()[1]), await self.reader.readexactly(int(length.split()[1]))

    async def read_to_end(self) -> bytes:
        async with asyncio.timeout(LONG_S):
            return await self.reader.read()


def decode_worker(**options: Any) -> FakeWorker:
    return FakeWorker(Role.DECODE, "d0", **options)


async def test_who_waits_for_nothing_makes_room_for_a_probe() -> None:
    """Clients keep their connections after they have been refused; a router that turns probes away would be killed."""
    async with running_router([decode_worker()], max_connections=3) as router:
        clients = [await Client.of(router) for _ in range(3)]
        for client in clients:
            client.send(request_of(1))
            assert (await client.read_answer())[0] == 200
        for _ in range(2):
            probe = await Client.of(router)
            probe.send(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await probe.read_answer())[0] == 200
            probe.writer.close()
            await asyncio.sleep(0.05)
        assert await clients[0].read_to_end() == b"", "it had waited longest"
        clients[2].send(request_of(2))
        assert (await clients[2].read_answer())[0] == 200
        for client in clients:
            client.writer.close()


async def test_over_the_limit_of_connections_in_use_one_more_is_closed() -> None:
    worker = decode_worker(step_s=0.2)
    async with running_router([worker], max_connections=2) as router:
        clients = [await Client.of(router) for _ in range(2)]
        for client in clients:
            client.send(request_of(5))
        await until(lambda: len(worker.running) == 2)
        another = await Client.of(router)
        another.send(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await another.read_answer()
        for client in clients:
            assert (await client.read_answer())[0] == 200
            client.writer.close()


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
async def test_an_upgrade_is_ignored_and_the_request_answered(protocol: str, in_pieces: bool) -> None:
    async with running_router([decode_worker()]) as router:
        client = await Client.of(router)
        whole = request_of(3, "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk", f"Upgrade: {protocol}")
        head_size = whole.index(b"\r\n\r\n") + 4
        for piece in (whole[:head_size], whole[head_size:]) if in_pieces else (whole,):
            client.send(piece)
            await asyncio.sleep(0.02)
        status, body = await client.read_answer()
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 3
        client.send(request_of(4))  # and the connection is as good as before
        assert (await client.read_answer())[0] == 200
        client.writer.close()


@pytest.mark.parametrize("cut_at", ["Upgrade: h2c", "pgrade: h2c", "h2c\r\n", "\r\nUpgrade", "\nUpgrade", "\n\r\n{"])
async def test_an_upgrade_is_ignored_wherever_the_packets_end(cut_at: str) -> None:
    async with running_router([decode_worker()]) as router:
        client = await Client.of(router)
        whole = request_of(3, "Connection: Upgrade", "Upgrade: h2c")
        cut = whole.index(cut_at.encode())
        client.send(b"\r\n" + whole[:cut])
        await asyncio.sleep(0.05)
        client.send(whole[cut:])
        status, body = await client.read_answer()
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 3)
        client.writer.close()


async def test_a_body_behind_an_upgrade_is_never_a_request() -> None:
    worker = decode_worker()
    async with running_router([worker]) as router:
        client = await Client.of(router)
        inner = request_of(2)
        head = f"\r\n\r\nPOST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        client.send(f"{head}Content-Length: {len(inner)}\r\n\r\n".encode())
        await asyncio.sleep(0.05)
        client.send(inner)
        assert (await client.read_answer())[0] == 400  # as JSON it makes no sense
        client.writer.close()
        assert worker.requests == []


@pytest.mark.parametrize("more", [b"G", b"GARBAGE\r\n\r\n", request_of(2), b"\x16\x03\x01\x02\x00"])
@pytest.mark.parametrize("at_once", [False, True])
async def test_what_comes_before_an_answer_is_complete_neither_cuts_nor_garbles_it(more: bytes, at_once: bool) -> None:
    """The stream takes longer than a head may."""
    num_tokens = 150
    worker = decode_worker(step_s=0.01)
    async with running_router([worker], header_timeout_s=1.0) as router:
        client = await Client.of(router)
        first = request_of(num_tokens, stream=True)
        client.send(first + more if at_once else first)
        if not at_once:
            await client.reader.readuntil(b"data: ")
            client.send(more)
            client.send(more)
        rest = await client.read_to_end()
    assert rest.count(b"data: ") >= num_tokens - 1
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"HTTP/1.1 4" not in rest
    assert len(worker.requests) == 1  # the client may ask for the second again: the connection was closed
    assert worker.cancelled == []


async def test_empty_lines_between_requests_are_nothing() -> None:
    async with running_router([decode_worker(step_s=0.01)]) as router:
        client = await Client.of(router)
        client.send(request_of(5))
        await asyncio.sleep(0.02)
        client.send(b"\r\n")
        assert (await client.read_answer())[0] == 200
        client.send(b"\r\n" + request_of(5))
        assert (await client.read_answer())[0] == 200
        client.writer.close()


async def test_empty_lines_alone_do_not_keep_a_connection() -> None:
    async with running_router([decode_worker()], header_timeout_s=1.0) as router:
        client = await Client.of(router)
        client.send(request_of(1))
        assert (await client.read_answer())[0] == 200
        client.send(b"\r\n")
        assert await client.read_to_end() == b""


async def test_a_client_that_sends_two_requests_and_leaves_is_noticed() -> None:
    worker = decode_worker(step_s=0.01, max_model_len=1 << 20)
    async with running_router([worker]) as router:
        client = await Client.of(router)
        client.send(request_of(5000) + request_of(5000))
        await until(lambda: bool(worker.running))
        client.writer.close()
        await router.settle()
        assert len(worker.cancelled) == len(worker.requests) == 1


@pytest.mark.parametrize(
    ("size", "status"), [(MAX_HEAD_BYTES - 1000, 200), (MAX_HEAD_BYTES + 1, 431), (4 * MAX_HEAD_BYTES, 431)]
)
@pytest.mark.parametrize("is_second", [False, True])
async def test_a_head_is_bounded_however_it_arrives(size: int, status: int, is_second: bool) -> None:
    async with running_router([decode_worker()]) as router:
        client = await Client.of(router)
        if is_second:
            client.send(request_of(1))
            assert (await client.read_answer())[0] == 200
        client.send(request_of(1, "X-Long: " + "a" * size))
        assert (await client.read_answer())[0] == status
        client.writer.close()


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
async def test_a_body_is_no_head_wherever_the_packets_end(cut: int) -> None:
    async with running_router([decode_worker()]) as router:
        client = await Client.of(router)
        body = b" " * (2 * MAX_HEAD_BYTES) + b'{"prompt": [1, 2], "max_tokens": 1}'
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        client.send(head[:-cut])
        await asyncio.sleep(0.05)
        client.send(head[-cut:] + body)
        assert (await client.read_answer())[0] == 200
        client.writer.close()


async def test_trailers_are_bounded_and_no_headers() -> None:
    body = b'{"prompt": [1, 2], "max_tokens": 1}'
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode()
    worker = decode_worker()
    async with running_router([worker]) as router:
        client = await Client.of(router)
        client.send(head + body + b"\r\n0\r\nX-Trailer: 1\r\n\r\n")
        assert (await client.read_answer())[0] == 200
        client.send(head + body + b"\r\n0\r\n")
        for _ in range(70):
            client.send(b"X-Trailer: " + b"a" * 1000 + b"\r\n")
            await asyncio.sleep(0.001)
        with contextlib.suppress(ConnectionError):  # if it still sent when the connection was closed
            assert b" 431 " in await client.read_to_end()
        client.writer.close()
    assert len(worker.requests) == 1


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/embeddings"), ("POST", "/v1/models"), ("GET", "/v1/models")]
)
async def test_who_sends_a_large_body_to_a_wrong_place_reads_the_answer(method: str, path: str) -> None:
    async with running_router([decode_worker()]) as router, http_client(router) as client:
        for _ in range(3):
            answer = await client.request(method, path, content=b"x" * 6_000_000)
            assert answer.status_code in (200, 404, 405)


async def test_a_body_of_a_refused_request_that_does_not_come_ends_the_connection() -> None:
    async with running_router([decode_worker()], body_timeout_s=0.2) as router:
        client = await Client.of(router)
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.example\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.send(head.encode() + b"1\r\na\r\n")
        assert b" 400 " in (await client.read_to_end()).splitlines()[0]


async def unread_answer(router: RunningRouter) -> socket.socket:
    """Of some megabytes, of which the first have come to a client that takes no byte."""
    host, port = router.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    body = json.dumps({"prompt": "a" * 900_000, "return_token_strs": True}).encode()
    head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    await asyncio.to_thread(client.sendall, head.encode() + body)
    await until(lambda: bool(select.select([client], [], [], 0.0)[0]))
    return client


def num_bytes_left(client: socket.socket) -> int:
    """To the end of what has been sent to it."""
    num_bytes = 0
    with client, contextlib.suppress(ConnectionResetError):
        client.settimeout(WAIT_S)
        while piece := client.recv(1 << 16):
            num_bytes += len(piece)
    return num_bytes


async def test_an_answer_that_nobody_reads_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", connection.__name__)
    async with running_router([decode_worker()], write_timeout_s=0.3, max_body_bytes=1 << 20) as router:
        client = await unread_answer(router)
        await until(lambda: "a client has read nothing of its answer for 0.3 s" in caplog.text)
        num_bytes = await asyncio.to_thread(num_bytes_left, client)
    assert num_bytes < 5_000_000


async def test_a_router_ends_although_an_answer_is_not_read() -> None:
    async with running_router([decode_worker()], drain_timeout_s=1.0, max_body_bytes=1 << 20) as router:
        client = await unread_answer(router)
        began = asyncio.get_running_loop().time()
    client.close()
    assert asyncio.get_running_loop().time() - began < 12.0


async def test_answers_of_no_endpoint_are_error_objects_and_counted() -> None:
    async with running_router([decode_worker()]) as router, http_client(router) as client:
        for method, path, status in (("POST", f"{TEXT}/", 404), ("GET", "/nothing", 404), ("GET", TEXT, 405)):
            answer = await client.request(method, path, headers={"Host": "evil.example"})
            assert answer.status_code == status
            assert answer.json()["error"]["code"]
            assert "location" not in answer.headers
        raw = await Client.of(router)
        raw.send(b"NONSENSE\r\n\r\n")
        assert (await raw.read_answer())[0] == 400
        page = (await client.get("/metrics")).text
    for status, count in ((404, 2), (405, 1), (400, 1)):
        [line] = [
            line
            for line in page.splitlines()
            if line.startswith("tandem_http_responses_total") and 'handler="none"' in line and f'"{status}"' in line
        ]
        assert line.endswith(f" {count}.0")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_page_cannot_have_a_browser_post_what_it_sends_without_asking(kind: str) -> None:
    worker = decode_worker()
    body = b'{"prompt": [1, 2], "max_tokens": 1}'
    headers = {"content-type": kind} if kind else {}
    async with running_router([worker]) as router, http_client(router) as client:
        forged = await client.post(TEXT, content=body, headers={**headers, "origin": "https://evil.example"})
        assert forged.status_code == 400
        assert "application/json" in forged.json()["error"]["message"]
        assert worker.requests == []
        assert (await client.post(TEXT, content=body, headers=headers)).status_code == 200  # programs may
        json_type = {"content-type": "application/json; charset=utf-8", "origin": "http://localhost:3000"}
        assert (await client.post(TEXT, content=body, headers=json_type)).status_code == 200
