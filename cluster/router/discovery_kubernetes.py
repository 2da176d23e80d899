"""Workers from the EndpointSlices of a Kubernetes service, over the API server's HTTP interface.

Each round lists all slices, then watches from there: any event ends the watch and begins the next round,
and so does the end of a watch after `RESYNC_S`. The list alone decides, so a missed or reordered event
costs time and never correctness. Needs `get`, `list` and `watch` on `endpointslices` in one namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import msgspec

from cluster.addresses import join_address
from cluster.router.discovery import API_HOST_VARIABLE, OnAddresses, bounded, nameless

log = logging.getLogger(__name__)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
RESYNC_S = 60
WATCH_MARGIN_S = 10.0  # beyond RESYNC_S, for a server that does not end the watch itself
REQUEST_TIMEOUT_S = 10.0
PAUSE_S = 1.0  # after a failure
GATHER_S = 0.1  # events come in groups
MAX_ANSWER_BYTES = 32 << 20


class _Conditions(msgspec.Struct, frozen=True):
    terminating: bool | None = None


class _Endpoint(msgspec.Struct, frozen=True):
    addresses: list[str]
    conditions: _Conditions = _Conditions()


class _Port(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None


class _Slice(msgspec.Struct, frozen=True):
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _ListMetadata(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""


class _SliceList(msgspec.Struct, frozen=True):
    items: list[_Slice]
    metadata: _ListMetadata = _ListMetadata()


def in_cluster_api() -> httpx.AsyncClient:
    """A client for the API server of the pod this process runs in."""
    host, port = os.environ[API_HOST_VARIABLE], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    tls = ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt"))
    url = f"https://{join_address(host, int(port))}"
    return httpx.AsyncClient(base_url=url, verify=tls, timeout=REQUEST_TIMEOUT_S, trust_env=False, auth=_TokenFile())


class _TokenFile(httpx.Auth):
    """Read for every request: the kubelet replaces the token before it expires."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        with contextlib.suppress(OSError):  # the server's 401 says the rest
            request.headers["Authorization"] = f"Bearer {(SERVICE_ACCOUNT / 'token').read_text().strip()}"
        yield request


class EndpointSliceSource:
    """The pods of one service. Pods that are terminating are left out, pods that are not ready yet are not:
    the session with a worker says when it serves."""

    def __init__(self, make_api: Callable[[], httpx.AsyncClient], namespace: str, service: str, port: str) -> None:
        """`port`: a number, or the name of a port of the service."""
        self._make_api = make_api
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._selector = {"labelSelector": f"kubernetes.io/service-name={service}"}
        self._origin = f"service {namespace}/{service}"
        self._port = port

    async def follow(self, on_addresses: OnAddresses) -> None:
        complaint = ""
        async with self._make_api() as api:
            while True:
                try:
                    slices = await self._list(api)
                    on_addresses(bounded(nameless(self._addresses(slices)), self._origin))
                    complaint = ""
                    await self._until_changed(api, slices.metadata.resource_version)
                except (httpx.HTTPError, msgspec.DecodeError, TimeoutError) as error:
                    if complaint != (complaint := f"{type(error).__name__}: {error}"):
                        log.warning("cannot follow %s: %s", self._origin, complaint)
                    await asyncio.sleep(PAUSE_S)

    async def _list(self, api: httpx.AsyncClient) -> _SliceList:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            answer = await api.get(self._path, params=self._selector)
        answer.raise_for_status()
        if len(answer.content) > MAX_ANSWER_BYTES:
            raise msgspec.DecodeError(f"an answer of {len(answer.content)} bytes")
        return msgspec.json.decode(answer.content, type=_SliceList)

    async def _until_changed(self, api: httpx.AsyncClient, version: str) -> None:
        """Returns at the first event, and at the end of the watch."""
        params = {**self._selector, "watch": "1", "resourceVersion": version, "timeoutSeconds": str(RESYNC_S)}
        async with asyncio.timeout(RESYNC_S + WATCH_MARGIN_S):
            timeout = httpx.Timeout(REQUEST_TIMEOUT_S, read=None)
            async with api.stream("GET", self._path, params=params, timeout=timeout) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_raw():
                    break
        await asyncio.sleep(GATHER_S)

    def _addresses(self, slices: _SliceList) -> frozenset[str]:
        return frozenset(
            join_address(address, port)
            for each in slices.items
            for port in self._ports(each)
            for endpoint in each.endpoints or ()
            if not endpoint.conditions.terminating
            for address in endpoint.addresses[:1]  # further ones are the same pod
        )

    def _ports(self, each: _Slice) -> list[int]:
        if self._port.isdigit():
            return [int(self._port)]
        return [port.port for port in each.ports or () if port.name == self._port and port.port is not None]
