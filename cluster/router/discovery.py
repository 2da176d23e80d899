"""Where a router's workers are, as an entry of its configuration says it.

    127.0.0.1:7001                             that worker
    dns:prefill.serving.svc:7001               every address of a name (a headless service), asked again and again
    file:/run/tandem/prefill.json              a JSON list of addresses, or an object with their names as keys, that its
                                               owner replaces when it changes
    kubernetes:serving/prefill:7001            every pod of a service, from its EndpointSlices (port: number or name)

A source says which workers there should be, nothing about their health: that is the session's business.
What it said last holds while it cannot be asked: a directory that is down must not empty a pool.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.addresses import join_address
from cluster.errors import ConfigError

log = logging.getLogger(__name__)

DNS_PAUSE_S = 2.0
DNS_TIMEOUT_S = 5.0
FILE_PAUSE_S = 0.2
MAX_ADDRESSES = 1024  # of one source; what is beyond is ignored with a warning
API_HOST_VARIABLE = "KUBERNETES_SERVICE_HOST"
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")
_SERVICE = re.compile(r"([a-z0-9-]+)/([a-z0-9.-]+):([a-z0-9-]+)")

OnAddresses = Callable[[Mapping[str, str]], None]  # each with its name, or an empty one; in the order of joining


class Source(Protocol):
    """One entry of the configuration."""

    async def follow(self, on_addresses: OnAddresses) -> None:
        """Until cancelled. Each call says which addresses there are from now on."""
        ...


class StaticSource:
    def __init__(self, address: str) -> None:
        self._address = address

    async def follow(self, on_addresses: OnAddresses) -> None:
        on_addresses({self._address: ""})


class DnsSource:
    """All A and AAAA records of a name."""

    def __init__(self, host: str, port: int, pause_s: float = DNS_PAUSE_S) -> None:
        self._host = host
        self._port = port
        self._pause_s = pause_s

    async def follow(self, on_addresses: OnAddresses) -> None:
        complaint = ""
        while True:
            try:
                async with asyncio.timeout(DNS_TIMEOUT_S):
                    on_addresses(bounded(nameless(await self._resolve()), self._host))
                complaint = ""
            except (OSError, TimeoutError) as error:
                if complaint != (complaint := str(error) or "no answer in time"):
                    log.warning("cannot resolve %s: %s", self._host, complaint)
            await asyncio.sleep(self._pause_s)

    async def _resolve(self) -> frozenset[str]:
        found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return frozenset(join_address(str(address[0]), self._port) for *_, address in found)


class FileSource:
    """A file that is replaced as a whole (write beside it, rename)."""

    def __init__(self, path: Path, pause_s: float = FILE_PAUSE_S) -> None:
        self._path = path
        self._pause_s = pause_s

    async def follow(self, on_addresses: OnAddresses) -> None:
        content, complaint = b"", ""
        while True:
            try:
                if content != (content := self._path.read_bytes()):
                    told = msgspec.json.decode(content, type=list[str] | dict[str, str])
                    addresses = dict.fromkeys(told, "")
                    if isinstance(told, dict):
                        addresses = {address: name for name, address in told.items()}
                    if wrong := [address for address in addresses if not is_address(address)]:
                        raise ValueError(f"{wrong[0]!r} is not HOST:PORT")
                    on_addresses(bounded(addresses, str(self._path)))
                complaint = ""
            except (OSError, ValueError) as error:  # ValueError: also a JSON error
                if complaint != (complaint := str(error)):
                    log.warning("cannot read %s: %s", self._path, complaint)
            await asyncio.sleep(self._pause_s)


def parse_source(entry: str) -> Source:
    """The source of one entry. Raises `ConfigError` that says what was expected."""
    kind, _, rest = entry.partition(":")
    match kind:
        case "dns":
            if not is_address(rest):
                raise ConfigError(f"{entry!r}: expected dns:NAME:PORT")
            host, _, port = rest.rpartition(":")
            return DnsSource(host.strip("[]"), int(port))
        case "file":
            if not rest.startswith("/"):
                raise ConfigError(f"{entry!r}: expected file: and an absolute path")
            return FileSource(Path(rest))
        case "kubernetes":
            service = _SERVICE.fullmatch(rest)
            if service is None:
                raise ConfigError(
                    f"{entry!r}: expected kubernetes:NAMESPACE/SERVICE:PORT, with the port's number or name"
                )
            from cluster.router.discovery_kubernetes import EndpointSliceSource, in_cluster_api  # imports httpx

            return EndpointSliceSource(in_cluster_api, *service.groups())
    if not is_address(entry):
        raise ConfigError(
            f"{entry!r}: expected HOST:PORT, dns:NAME:PORT, file:PATH or kubernetes:NAMESPACE/SERVICE:PORT"
        )
    return StaticSource(entry)


def open_sources(entries: Sequence[str]) -> list[Source]:
    """As `parse_source`, and raises `ConfigError` for what this process cannot follow."""
    sources = [parse_source(entry) for entry in entries]
    if any(entry.startswith("kubernetes:") for entry in entries) and not os.environ.get(API_HOST_VARIABLE):
        raise ConfigError(f"{API_HOST_VARIABLE} is not set: this process does not run in a Kubernetes pod")
    return sources


def is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and 1 <= int(found[1]) <= 65_535


def nameless(addresses: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(sorted(addresses), "")


def bounded(addresses: Mapping[str, str], origin: str) -> Mapping[str, str]:
    if len(addresses) <= MAX_ADDRESSES:
        return addresses
    log.warning("%s has %d addresses, only the first %d are used", origin, len(addresses), MAX_ADDRESSES)
    return dict(islice(addresses.items(), MAX_ADDRESSES))
