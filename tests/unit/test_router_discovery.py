"""Which workers a router is told of, by each kind of source; and what the pool does when they come and go."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from cluster.errors import ConfigError
from cluster.router import discovery_kubernetes
from cluster.router.discovery import DnsSource, FileSource, Source, open_sources, parse_source
from cluster.router.discovery_kubernetes import EndpointSliceSource
from cluster.router.membership import Membership
from cluster.router.pool import WorkerPool
from cluster.types import Role
from tests.fakes import FakeWorker
from tests.waiting import until

WAIT_S = 10.0


@asynccontextmanager
async def followed(source: Source) -> AsyncIterator[Callable[[set[str] | dict[str, str]], Awaitable[None]]]:
    """Yields a wait for the addresses that the source says now."""
    told: list[Mapping[str, str]] = []
    task = asyncio.create_task(source.follow(told.append))

    async def says(addresses: set[str] | dict[str, str]) -> None:
        """A set: without names."""
        wanted = addresses if isinstance(addresses, dict) else dict.fromkeys(addresses, "")
        async with asyncio.timeout(WAIT_S):
            while not told or told[-1] != wanted:
                assert not task.done()
                await asyncio.sleep(0.01)

    yield says
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    "entry",
    ["", "host", "host:0", "host:70000", "dns:name", "file:here", "kubernetes:prefill:1", "http://a:1", "a:1/b"],
)
def test_a_wrong_entry_is_refused_with_what_was_expected(entry: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_source(entry)


async def test_a_static_entry_is_one_worker() -> None:
    async with followed(parse_source("[::1]:7001")) as says:
        await says({"[::1]:7001"})


async def test_dns_gives_all_addresses_and_keeps_them_while_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    records = ["10.0.0.1", "10.0.0.2", "fd00::1"]

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if not records:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(None, None, 0, "", (record, port)) for record in records]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    async with followed(DnsSource("prefill.serving", 7001, pause_s=0.01)) as says:
        await says({"10.0.0.1:7001", "10.0.0.2:7001", "[fd00::1]:7001"})
        records.clear()
        await asyncio.sleep(0.05)
        await says({"10.0.0.1:7001", "10.0.0.2:7001", "[fd00::1]:7001"})
        records.append("10.0.0.2")
        await says({"10.0.0.2:7001"})


async def test_a_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "members"
    async with followed(FileSource(path, pause_s=0.01)) as says:
        path.write_text('["127.0.0.1:1"]')
        await says({"127.0.0.1:1"})
        path.write_text('["127.0.0.1:1", 5]')
        await asyncio.sleep(0.05)
        await says({"127.0.0.1:1"})
        path.write_text("[]")
        await says(set())
        path.write_text('{"prefill-1": "127.0.0.1:10000", "prefill-0": "127.0.0.1:9999"}')
        await says({"127.0.0.1:10000": "prefill-1", "127.0.0.1:9999": "prefill-0"})
        path.write_text('{"prefill-1": "nowhere"}')
        await asyncio.sleep(0.05)
        await says({"127.0.0.1:10000": "prefill-1", "127.0.0.1:9999": "prefill-0"})


class FakeApiServer:
    """The two requests that are made of a Kubernetes API server, over a real socket."""

    def __init__(self) -> None:
        self.url = ""
        self.slices: list[dict[str, object]] = []
        self.changed = asyncio.Event()
        self.is_broken = False
        self.num_lists = 0
        self.authorizations: set[str] = set()

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, trust_env=False, auth=discovery_kubernetes._TokenFile())

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.authorizations |= {line for line in head.split("\r\n") if line.lower().startswith("authorization")}
        target = head.split(" ", 2)[1]
        assert target.startswith("/apis/discovery.k8s.io/v1/namespaces/serving/endpointslices?labelSelector=")
        assert "service-name%3Dprefill" in target
        if self.is_broken:
            writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        elif "watch=1" in target:
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            await self.changed.wait()
            self.changed.clear()
            writer.write(b'{"type": "MODIFIED"}\n')
        else:
            self.num_lists += 1
            body = json.dumps({"metadata": {"resourceVersion": "7"}, "items": self.slices}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApiServer]:
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(discovery_kubernetes, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr(discovery_kubernetes, "PAUSE_S", 0.01)
    monkeypatch.setattr(discovery_kubernetes, "GATHER_S", 0.0)
    server = FakeApiServer()
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield server
        server.changed.set()


def endpoint(address: str, **conditions: bool) -> dict[str, object]:
    return {"addresses": [address], "conditions": conditions}


async def test_endpoint_slices_are_followed(api: FakeApiServer) -> None:
    ports = [{"name": "metrics", "port": 9}, {"name": "grpc", "port": 7001}]
    first: dict[str, object] = {
        "ports": ports,
        "endpoints": [endpoint("10.0.0.1", ready=True), endpoint("10.0.0.2", ready=False)],
    }
    api.slices = [first, {"ports": ports, "endpoints": None}]
    async with followed(EndpointSliceSource(api.client, "serving", "prefill", "grpc")) as says:
        await says({"10.0.0.1:7001", "10.0.0.2:7001"})
        leaving = endpoint("10.0.0.1", ready=False, serving=True, terminating=True)
        api.slices = [{"ports": ports, "endpoints": [leaving, endpoint("fd00::3")]}]
        api.changed.set()
        await says({"[fd00::3]:7001"})
        api.is_broken = True
        api.changed.set()
        await asyncio.sleep(0.1)
        await says({"[fd00::3]:7001"})
        api.is_broken = False
        api.slices = []
        await says(set())
    assert api.authorizations == {"Authorization: Bearer secret"}


async def test_a_port_by_number(api: FakeApiServer) -> None:
    api.slices = [{"ports": [{"name": "", "port": 1}], "endpoints": [endpoint("10.0.0.1")]}]
    async with followed(EndpointSliceSource(api.client, "serving", "prefill", "7001")) as says:
        await says({"10.0.0.1:7001"})


def test_no_pod_no_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
        open_sources(["kubernetes:serving/prefill:7001"])


async def test_workers_are_called_what_their_launch_calls_them(tmp_path: Path) -> None:
    """Or metrics and logs would name another one than `cluster status` and `cluster drain`."""
    members = tmp_path / "members"
    members.write_text('{"decode-0": "127.0.0.1:9999", "decode-2": "127.0.0.1:10000"}')
    pool = WorkerPool(prefill=None, decode=[])
    membership = Membership(
        pool, {Role.DECODE: [FileSource(members, pause_s=0.01)]}, lambda address, role: FakeWorker(role, address)
    )
    task = asyncio.create_task(membership.follow())
    await until(lambda: len(pool.decode) == 2)
    assert {worker.name: worker.connection.address for worker in pool.decode} == {
        "decode-0": "127.0.0.1:9999",
        "decode-2": "127.0.0.1:10000",
    }
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await pool.close()


async def test_a_worker_that_leaves_keeps_its_requests_and_gets_no_more(tmp_path: Path) -> None:
    made: dict[str, FakeWorker] = {}

    def connect(address: str, role: Role) -> FakeWorker:
        made[address] = worker = FakeWorker(role, address)
        return worker

    def publish(*addresses: str) -> None:
        (tmp_path / "new").write_text(json.dumps(addresses))
        (tmp_path / "new").replace(tmp_path / "members")

    pool = WorkerPool(prefill=None, decode=[])
    publish("10.0.0.1:1")
    sources = {Role.DECODE: [FileSource(tmp_path / "members", pause_s=0.01)]}
    task = asyncio.create_task(Membership(pool, sources, connect).follow())
    await until(lambda: len(pool.decode) == 1)
    [first] = pool.decode
    with first.counted():
        publish("10.0.0.2:1")
        await until(lambda: pool.addresses(Role.DECODE) == {"10.0.0.2:1"})
        assert [worker.name for worker in pool.workers] == ["decode-1", "decode-0"]
        pair = pool.place(affinity=b"", avoid=())
        assert pair is not None
        assert pair.decode.connection.address == "10.0.0.2:1"
        await asyncio.sleep(0.3)
        assert not made["10.0.0.1:1"].is_closed, "its request still runs"
        publish("10.0.0.1:1", "10.0.0.2:1")
        await until(lambda: len(pool.decode) == 2)
        assert first in pool.decode, "a worker that comes back keeps its connection"
        publish("10.0.0.2:1")
        await until(lambda: len(pool.decode) == 1)
    await until(lambda: made["10.0.0.1:1"].is_closed)
    assert len(pool.workers) == 1
    [second] = pool.decode
    with second.connection.promised():
        publish()
        await until(lambda: not pool.decode)
        await asyncio.sleep(0.3)
        assert not made["10.0.0.2:1"].is_closed, "a request that was placed there is still to come"
    await until(lambda: made["10.0.0.2:1"].is_closed)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await pool.close()
